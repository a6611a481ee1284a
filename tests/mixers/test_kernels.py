"""Which kernel is used, and that what is handed to it means the same there: stand-ins for both packages compute it."""

import sys
import types

import pytest
import torch
from torch.nn import functional

from limbeck.mixers.kernels import choose
from limbeck.mixers.selective_scan import selective_scan, selective_scan_loop
from limbeck.mixers.state_space import ssd, ssd_loop

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def stand_in(monkeypatch, path, **functions):
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[path], name, function)


@pytest.fixture
def calls(monkeypatch):
    """Installs stand-ins written from the packages' documentation, token by token."""
    made = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        made.append("selective_scan_fn")
        out, last = selective_scan_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last) if return_last_state else out

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, *, initial_states=None, return_final_states=False):
        made.append("mamba_chunk_scan_combined")
        state = torch.zeros(*x[:, 0].shape, B.shape[-1]) if initial_states is None else initial_states
        outputs = []
        for t in range(x.shape[1]):
            written = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
            state = (dt[:, t] * A).exp()[..., None, None] * state + written
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
        return (torch.stack(outputs, 1), state) if return_final_states else torch.stack(outputs, 1)

    def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, head_first=True):
        made.append("chunk_simple_gla")
        assert not head_first
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
        outputs = []
        for t in range(q.shape[1]):
            decay = 1.0 if g is None else g[:, t].exp()[..., None, None]
            state = decay * state + k[:, t][..., None] * v[:, t][..., None, :]
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(outputs, 1), state if output_final_state else None

    stand_in(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    stand_in(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    return made


def state_space(decays=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 3, 16), (2, 9, 3), (2, 9, 3, 16), (2, 9, 3, 16), (3,), (2, 3, 16, 16))
    X, a, B, C, D, state = (torch.randn(shape, generator=generator) for shape in shapes)
    decay = -functional.softplus(a)
    decay[:, 4] = 0.0  # as at padding
    return X, decay if decays else None, B, C, D, state


@pytest.mark.parametrize("backend", ["fla", "mamba_ssm"])
@pytest.mark.parametrize("starts", [True, False])
def test_state_space_kernels_are_called_in_their_own_terms(calls, backend, starts):
    X, decay, B, C, D, state = state_space()
    state = state if starts else None
    y, last = ssd(X, decay, B, C, D, initial_state=state, backend=backend)
    assert calls == [{"fla": "chunk_simple_gla", "mamba_ssm": "mamba_chunk_scan_combined"}[backend]]
    expected, end = ssd_loop(X, decay, B, C, D, state)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-4)


def test_without_decay_fla_alone_is_asked(calls):
    X, _, B, C, D, _ = state_space()
    y, _ = ssd(X, None, B, C, D, backend="fla")
    torch.testing.assert_close(y, ssd(X, None, B, C, D, backend="torch")[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot do this case"):
        ssd(X, None, B, C, D, backend="mamba_ssm")


def scan_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(2, 4, 9, generator=generator, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(2, 2, 3, 9, generator=generator, dtype=dtype) for _ in range(2))
    return {"u": u, "delta": delta, "A": -torch.rand(4, 3, dtype=dtype), "B": B, "C": C, "z": z, "delta_softplus": True}


def test_the_scan_kernel_is_called_in_its_own_terms(calls):
    inputs = scan_inputs()
    y, last = selective_scan(**inputs, return_last_state=True, backend="mamba_ssm")
    expected, end = selective_scan(**inputs, return_last_state=True, backend="torch")
    torch.testing.assert_close((y, last), (expected, end))
    torch.testing.assert_close(selective_scan(**inputs, backend="mamba_ssm"), expected)
    assert calls == ["selective_scan_fn"] * 2


def test_the_scan_kernel_is_not_used_for_what_it_cannot_do(calls):
    state = torch.zeros(2, 4, 3)
    learning = scan_inputs()
    learning["u"].requires_grad_()
    starting, asking = {**scan_inputs(), "initial_state": state}, {**learning, "return_last_state": True}
    for inputs in (starting, asking, scan_inputs(torch.float64)):
        with pytest.raises(ValueError, match="cannot do this case"):
            selective_scan(**inputs, backend="mamba_ssm")
    selective_scan(**learning, backend="mamba_ssm")
    assert calls == ["selective_scan_fn"]


def test_on_a_gpu_the_first_that_fits_is_chosen(calls):
    assert choose("auto", GPU, {"fla": True, "mamba_ssm": True}) == "fla"
    assert choose("auto", GPU, {"fla": False, "mamba_ssm": True}) == "mamba_ssm"
    assert choose("auto", GPU, {"fla": False, "mamba_ssm": False}) == "torch"
    assert choose("auto", CPU, {"fla": True, "mamba_ssm": True}) == "torch"
    assert choose("torch", GPU, {"fla": True}) == "torch"


@pytest.mark.parametrize(("dtype", "able"), [(torch.bfloat16, True), (torch.float32, False), (torch.float64, False)])
def test_full_precision_is_left_to_torch(dtype, able, monkeypatch):
    asked = []
    monkeypatch.setattr("limbeck.mixers.kernels.choose", lambda *given: asked.append(given) or "torch")
    X, decay, B, C, D, _ = (t.to(dtype) for t in state_space())
    ssd(X, decay, B, C, D)
    assert asked == [("auto", CPU, {"fla": able, "mamba_ssm": able})]


def test_on_a_cpu_nothing_is_asked_of_them(calls):
    X, decay, B, C, D, _ = state_space()
    ssd(X, decay, B, C, D)
    selective_scan(**scan_inputs())
    assert not calls


def test_without_them(monkeypatch):
    for name in ("fla", "mamba_ssm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert choose("auto", GPU, {"fla": True, "mamba_ssm": True}) == "torch"
    with pytest.raises(ImportError):
        choose("fla", GPU, {"fla": True})
