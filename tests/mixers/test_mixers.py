"""What all mixers promise: one result at once, in pieces, token by token and by their matrix; padding is nothing."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from limbeck.mixers import mixer as module
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.generalised_linear_attention import GeneralisedLinearAttention
from limbeck.mixers.linear_attention import FEATURES, LinearAttention
from limbeck.mixers.mixer import select_rows, state_bytes
from limbeck.mixers.softmax_attention import SoftmaxAttention

WIDTH, HEADS, LENGTH = 16, 4, 11
CAUSAL = {
    "mamba2": lambda: DiscreteMamba2(WIDTH, HEADS, 6, block=4),
    "mamba2 expanded": lambda: DiscreteMamba2(WIDTH, HEADS, 6, expand=2.0, taps=1, out_bias=True),
    "softmax": lambda: SoftmaxAttention(WIDTH, HEADS),
    "softmax grouped rotary": lambda: SoftmaxAttention(WIDTH, HEADS, 2, rotary=100.0, bias=True, out_bias=True),
    "linear": lambda: LinearAttention(WIDTH, HEADS, block=4),
    "linear grouped": lambda: LinearAttention(WIDTH, HEADS, 1, feature="softmax"),
    "linear plain": lambda: LinearAttention(WIDTH, HEADS, feature="identity", normalise=False, out_bias=True),
}
BOTH_WAYS = {
    "softmax both ways": lambda: SoftmaxAttention(WIDTH, HEADS, 2, causal=False),
    "linear both ways": lambda: LinearAttention(WIDTH, HEADS, 2, causal=False, feature="softplus"),
    "generalised": lambda: GeneralisedLinearAttention(WIDTH, HEADS),
    "generalised narrow": lambda: GeneralisedLinearAttention(WIDTH, HEADS, middle=4, bias=True, out_bias=False),
}
causal = pytest.mark.parametrize("name", CAUSAL)
every = pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])


def build(name):
    torch.manual_seed(5)
    return {**CAUSAL, **BOTH_WAYS}[name]().double()


def tokens(length=LENGTH, batch=2):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def tensors(state):
    return {f.name: getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), torch.Tensor)}


@causal
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [6, 5], [4, 1, 1, 3, 2], [1, 10]])
def test_steps_and_pieces_equal_the_whole(name, pieces):
    mixer, hidden = build(name), tokens()
    whole, end = mixer.prefill(hidden)
    assert torch.equal(whole, mixer(hidden))
    state, outputs = mixer.initial_state(2), []
    for piece in hidden.split(pieces, 1):
        kept = {key: value.clone() for key, value in tensors(state).items()}
        y, after = mixer.step(piece, state)
        assert all(torch.equal(value, kept[key]) for key, value in tensors(state).items())  # left as it was
        outputs.append(y)
        state = after
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-12)
    for key, value in tensors(end).items():
        torch.testing.assert_close(tensors(state)[key], value, rtol=1e-10, atol=1e-12)


@causal
@pytest.mark.parametrize("masked", [True, False])
def test_without_gradients_it_goes_by_pieces(name, masked, monkeypatch):
    mixer, hidden = build(name), tokens()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    whole, end = mixer.prefill(hidden, mask)
    monkeypatch.setitem(module.PIECES, "cpu", 3)
    lengths = []
    project = mixer._project
    monkeypatch.setattr(mixer, "_project", lambda x, *rest: lengths.append(x.shape[1]) or project(x, *rest))
    with torch.no_grad():
        y, state = mixer.prefill(hidden, mask)
    assert lengths == ([LENGTH] if name.startswith("softmax") else [3, 3, 3, 2])
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-12)
    for key, value in tensors(end).items():
        torch.testing.assert_close(tensors(state)[key], value, rtol=1e-10, atol=1e-12)


@every
def test_the_matrix_is_what_mixes(name):
    mixer, hidden = build(name), tokens()
    matrix = mixer.materialize(hidden)
    assert matrix.shape == (2, HEADS, LENGTH, LENGTH)
    if isinstance(mixer, DiscreteMamba2):
        z = mixer.in_proj(hidden)[..., mixer.channels : mixer.channels + mixer.inner]
        mixed = torch.einsum("bhij,bjhp->bihp", matrix, mixer.values(hidden)).flatten(2)
        expected = mixer.out_proj(mixed * nn.functional.silu(z + mixer.z_bias))
    else:
        values = mixer.v_proj(hidden).unflatten(-1, (-1, 4)).repeat_interleave(HEADS // mixer.kv_heads, 2)
        expected = mixer.o_proj(torch.einsum("bhij,bjhp->bihp", matrix, values).flatten(2))
    torch.testing.assert_close(mixer(hidden), expected, rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("side", ["left", "right", "between", "both"])
def test_padding_is_nothing(name, side):
    mixer, hidden = build(name), tokens(8)
    places = {"left": range(5, 13), "right": range(8), "between": [0, 1, 4, 5, 6, 9, 11, 12], "both": range(2, 10)}
    mask = torch.zeros(3, 13, dtype=torch.bool)
    mask[:2, list(places[side])] = True
    padded = torch.full((3, 13, WIDTH), 7.0, dtype=torch.float64)  # the third row is padding alone
    padded[mask] = hidden.flatten(0, 1)
    padded.requires_grad_()
    y, state = mixer.prefill(padded, mask)
    expected, end = mixer.prefill(hidden)
    torch.testing.assert_close(y[mask].view(2, 8, WIDTH), expected, rtol=1e-10, atol=1e-12)
    assert (y[~mask] == 0).all()
    (gradient,) = torch.autograd.grad(y.square().sum(), padded)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    matrix = mixer.materialize(padded.detach(), mask)
    assert (matrix.transpose(1, 3)[~mask] == 0).all()
    assert (matrix.transpose(1, 2)[~mask] == 0).all()
    if name in CAUSAL:  # and what comes next does not know of it
        new = tokens(3)
        again, _ = mixer.step(new, select_rows(state, torch.tensor([0, 1])))
        torch.testing.assert_close(again, mixer.step(new, end)[0], rtol=1e-10, atol=1e-12)


@every
def test_causality(name):
    mixer, hidden = build(name), tokens()
    changed = hidden.clone()
    changed[:, 6] += 1.0
    same = (mixer(hidden) == mixer(changed)).all(-1)
    assert same[:, :6].all() == (name in CAUSAL)
    assert not same[:, 6:].any()
    assert (mixer.materialize(hidden).triu(1) == 0).all() == (name in CAUSAL)


@causal
def test_a_state_has_a_constant_size_unless_it_is_softmax(name):
    mixer = build(name)
    sizes = [state_bytes(mixer.prefill(tokens(length))[1]) for length in (4, 64)]
    assert (sizes[0] == sizes[1]) == (not name.startswith("softmax"))
    if not name.startswith("softmax"):
        assert state_bytes(mixer.initial_state(2)) == sizes[0]


@causal
def test_rows_of_a_state(name):
    mixer, hidden = build(name), tokens(5, 3)
    _, state = mixer.prefill(hidden)
    rows = torch.tensor([2, 0, 0])
    new = tokens(1, 3)
    y, _ = mixer.step(new, select_rows(state, rows))
    expected, _ = mixer.step(new, mixer.prefill(hidden[rows])[1])
    torch.testing.assert_close(y, expected)


@every
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(name, autocast):
    mixer, hidden = build(name).float(), tokens(70).float()
    exact = mixer(hidden)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = mixer.prefill(hidden)
    else:
        y, state = mixer.bfloat16().prefill(hidden.bfloat16())
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())
    assert (y.float() - exact).norm() < 0.03 * exact.norm()
    sums = [getattr(state, key) for key in ("ssm", "sums") if hasattr(state, key)]
    assert all(tensor.dtype == torch.float32 for tensor in sums)
    if name in CAUSAL and not autocast:
        after = mixer.step(hidden[:, :1].bfloat16(), mixer.initial_state(2))[0]
        assert after.dtype == torch.bfloat16
        assert after.isfinite().all()


@every
def test_gradients_against_differences(name):
    mixer, hidden = build(name), tokens(5, 1).requires_grad_()
    assert torch.autograd.gradcheck(mixer, hidden)


def test_softmax_matrix_against_plain_formula():
    mixer, hidden = build("softmax"), tokens(3, 1)
    q, k = (layer(hidden).view(3, HEADS, 4) for layer in (mixer.q_proj, mixer.k_proj))
    matrix = mixer.materialize(hidden)[0]
    for head in range(HEADS):
        for i in range(3):
            scores = torch.stack([(q[i, head] @ k[j, head]) / 2 for j in range(i + 1)]).exp()
            torch.testing.assert_close(matrix[head, i, : i + 1], scores / scores.sum())


def test_rotary_positions_see_differences_alone():
    """Scores depend on how far tokens are apart: a sequence of one repeated token attends by distance."""
    mixer = build("softmax grouped rotary")
    same = tokens(1).expand(-1, 9, -1)
    q, state = mixer._project(same, None, None)
    scores = torch.einsum("bihd,bjhd->bhij", q, mixer._per_head(state.keys))
    for distance in range(1, 8):
        diagonal = scores.diagonal(-distance, 2, 3)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert (scores[..., 8, 0] - scores[..., 8, 8]).abs().min() > 1e-3


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "identity"])
@pytest.mark.parametrize("both", [True, False])
def test_normalised_rows_are_averages(feature, both):
    torch.manual_seed(0)
    mixer = LinearAttention(WIDTH, HEADS, causal=both, feature=feature, epsilon=1e-12).double()
    matrix = mixer.materialize(tokens())
    assert (matrix >= 0).all()
    some = (matrix > 0).any(-1)  # relu may leave a query or all keys without a feature
    assert some.all() or feature == "relu"
    assert some.double().mean() > 0.5
    torch.testing.assert_close(matrix.sum(-1), some.double())


def test_generalised_rows_are_averages():
    mixer = build("generalised")
    mixer.epsilon = 0.0
    matrix = mixer.materialize(tokens())
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    nn.init.zeros_(mixer.v_proj.weight)  # constant values, so constant outputs
    mixer.v_proj.bias = nn.Parameter(torch.randn(WIDTH).double())
    y = mixer(tokens())
    torch.testing.assert_close(y, mixer.o_proj(mixer.v_proj.bias).expand_as(y))


def test_generalised_attention_does_not_mind_order_or_number():
    mixer, hidden = build("generalised"), tokens()
    y = mixer(hidden)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(hidden[:, order]), y[:, order])
    torch.testing.assert_close(mixer(hidden.repeat(1, 2, 1)), y.repeat(1, 2, 1))


def test_generalised_attention_without_a_middle_doubles_queries_and_keys():
    mixer, hidden = GeneralisedLinearAttention(WIDTH, HEADS, middle=-1).double(), tokens()
    plain = LinearAttention(WIDTH, HEADS, causal=False, epsilon=1e-4 * LENGTH, out_bias=True).double()
    plain.take_projections(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
    with torch.no_grad():
        plain.q_proj.weight *= 2
        plain.k_proj.weight *= 2
    torch.testing.assert_close(mixer(hidden), plain(hidden))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_without_an_order_there_is_no_step(name):
    mixer = build(name)
    for attempt in (lambda: mixer.initial_state(2), lambda: mixer.step(tokens(1), object())):
        with pytest.raises(ValueError, match="both directions"):
            attempt()


def test_impossible_shapes_are_refused():
    for wrong in (
        lambda: SoftmaxAttention(16, 3),
        lambda: SoftmaxAttention(16, 4, 3),
        lambda: DiscreteMamba2(16, 3),
        lambda: LinearAttention(16, 4, feature="identity"),
        lambda: LinearAttention(16, 4, feature="cosine"),
    ):
        with pytest.raises(ValueError, match=r"divide|normalise|choose"):
            wrong()
