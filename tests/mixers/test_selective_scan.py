"""The selective scan against recorded numbers and the plain recurrence, values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.mixers import selective_scan as module
from limbeck.mixers.selective_scan import selective_scan, selective_scan_loop
from tests.oracles import oracle

OPTIONAL = ("D", "z", "delta_bias")


def draw(batch=2, channels=6, length=37, state=3, groups=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "u": (batch, channels, length),
        "delta": (batch, channels, length),
        "A": (channels, state),
        "B": (batch, groups, state, length),
        "C": (batch, groups, state, length),
        "D": (channels,),
        "z": (batch, channels, length),
        "delta_bias": (channels,),
        "initial_state": (batch, channels, state),
    }
    drawn = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
    drawn["A"] = -drawn["A"].exp()
    return {name: value.to(dtype).requires_grad_() for name, value in drawn.items()}


@pytest.mark.parametrize("name", ["full", "grouped", "plain"])
def test_as_recorded_from_mamba(name):
    case = oracle.load("mamba-mixer")[0]
    given = {k.split(".", 1)[1]: v for k, v in case.tensors.items() if k.startswith(f"{name}.")}
    inputs = {k: given[k].clone().requires_grad_() for k in ("u", "delta", "A", "B", "C", *OPTIONAL) if k in given}
    y, last = selective_scan(**inputs, delta_softplus=name != "plain", return_last_state=True)
    assert (y - given["y"]).abs().max() < 1e-5 * given["y"].abs().max()
    assert (last - given["last_state"]).abs().max() < 1e-5 * given["last_state"].abs().max()
    gradients = torch.autograd.grad((y * given["cotangent"]).sum(), list(inputs.values()))
    for key, gradient in zip(inputs, gradients, strict=True):
        expected = given[f"grad_{key}"]
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), key


@pytest.mark.parametrize("entries", [1, 2**15])
def test_strong_decay_as_recorded(entries, monkeypatch):
    monkeypatch.setitem(module.ENTRIES, "cpu", entries)
    case = oracle.load("mamba-mixer")[0]
    inputs = {name: case.tensors[f"strong.{name}"].clone().requires_grad_() for name in ("u", "delta", "A", "B", "C")}
    assert (inputs["delta"][..., None] * inputs["A"][:, None]).min() < -30
    y = selective_scan(**inputs)
    expected = case.tensors["strong.y"]
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    double = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    exact = torch.autograd.grad(selective_scan_loop(**double)[0].square().sum(), list(double.values()))
    for one, other in zip(torch.autograd.grad(y.square().sum(), list(inputs.values())), exact, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_mamba_block_as_recorded():
    """A whole block around the scan: projection, convolution, step sizes of low rank, gate, projection."""
    case = oracle.load("mamba-mixer")[0]
    p = {k.removeprefix("block.param."): v for k, v in case.tensors.items() if k.startswith("block.param.")}
    hidden = case.tensors["block.x"].clone().requires_grad_()
    x, z = functional.linear(hidden, p["in_proj.weight"]).transpose(1, 2).chunk(2, 1)
    x = functional.conv1d(functional.pad(x, (3, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=16)
    x = functional.silu(x)
    dt, B, C = functional.linear(x.transpose(1, 2), p["x_proj.weight"]).split([1, 4, 4], -1)
    y = selective_scan(
        x,
        functional.linear(dt, p["dt_proj.weight"]).transpose(1, 2),
        -p["A_log"].exp(),
        B.transpose(1, 2),
        C.transpose(1, 2),
        p["D"],
        z,
        p["dt_proj.bias"],
        True,
    )
    out = functional.linear(y.transpose(1, 2), p["out_proj.weight"])
    (gradient,) = torch.autograd.grad((out * case.tensors["block.cotangent"]).sum(), hidden)
    for name, value in (("y", out), ("grad_x", gradient)):
        expected = case.tensors[f"block.{name}"]
        assert (value - expected).abs().max() < 1e-5 * expected.abs().max()


def test_as_recorded_from_group_mamba():
    case = next(case for case in oracle.load("group-mamba") if case.name == "selective_scan")
    names = {"u": "u", "delta": "delta", "A": "A", "B": "Bm", "C": "Cm", "D": "D", "delta_bias": "delta_bias"}
    inputs = {ours: case.inputs[theirs].clone().requires_grad_() for ours, theirs in names.items()}
    y = selective_scan(**inputs, delta_softplus=True)
    case.check("y", y, of_largest=True, rtol=1e-5)
    for name, gradient in zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values())), strict=True):
        case.check(f"gradsq_{name.replace('delta_', '')}", gradient, of_largest=True, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 37, 130])
@pytest.mark.parametrize("entries", [1, 36 * 3, 2**15])  # one lane, a few, as many as there are
def test_equals_the_recurrence(length, entries, monkeypatch):
    monkeypatch.setitem(module.ENTRIES, "cpu", entries)
    inputs = draw(length=length)
    y, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    expected, end = selective_scan_loop(**inputs, delta_softplus=True)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-10, atol=1e-12)
    leaves = list(inputs.values())
    losses = [(a.cos() * a).sum() + b.square().sum() for a, b in ((y, last), (expected, end))]
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in losses)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_against_differences(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    names = list(inputs := draw(1, 4, 8, 2))
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan(**dict(zip(names, t, strict=True)), delta_softplus=True, return_last_state=True),
        list(inputs.values()),
    )


def test_half_precision_and_autocast():
    inputs = {name: value.detach() for name, value in draw(dtype=torch.bfloat16, length=200).items()}
    y = selective_scan(**inputs, delta_softplus=True)
    exact, _ = selective_scan_loop(**{name: value.double() for name, value in inputs.items()}, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        again = selective_scan(**{name: value.float() for name, value in inputs.items()}, delta_softplus=True)
    assert (again - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_token_does_not_reach_back():
    inputs = {name: value.detach() for name, value in draw().items()}
    before = selective_scan(**inputs, delta_softplus=True)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name][..., 20] += 1.0
    after = selective_scan(**inputs, delta_softplus=True)
    assert torch.equal(before[..., :20], after[..., :20])
    assert (before[..., 20:] != after[..., 20:]).any(-1).all()


def test_what_is_kept_for_the_gradient_is_linear_and_lacks_the_states():
    """Per token: u, delta, their copies in the scan's order, B, C; not a state for every channel."""
    kept = {}
    for length in (512, 1024):
        inputs = draw(1, 128, length, 16, 1, torch.float32)
        sizes: dict[int, int] = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            selective_scan(inputs["u"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"])
        kept[length] = sum(sizes.values())
    assert kept[1024] < 2.1 * kept[512]
    assert kept[1024] < 128 * 16 * 1024 / 2


class Calls(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_many_tokens_are_moved_by_one_operation():
    inputs = {name: value.detach() for name, value in draw(1, 64, 1024, 8, 1, torch.float32).items()}
    with Calls() as scan:
        selective_scan(**inputs)
    with Calls() as loop:
        selective_scan_loop(**inputs)
    assert loop.count > 5 * 1024
    assert scan.count < loop.count / 4


def test_a_scan_inside_a_module_learns():
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 20, 4)
    ones = torch.ones(2, 2, 20)
    y = selective_scan(layer(x).transpose(1, 2), torch.ones(2, 4, 20) * 0.1, -torch.ones(4, 2), ones, ones)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().sum() > 0
