"""MOHAWK's mixer: its limits, and how it begins as the attention whose projections it takes."""

import pytest
import torch
from torch import nn

from limbeck.mixers.convolution import causal_convolution
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.softmax_attention import SoftmaxAttention

WIDTH, HEADS = 16, 4


@pytest.fixture
def hidden():
    return torch.randn(2, 9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mixer(state=6, **options):
    torch.manual_seed(1)
    return DiscreteMamba2(WIDTH, HEADS, state, block=4, **options).double()


def constant_a(net, hidden, value):
    """Makes a the same everywhere: the first entry of every hidden state is 1."""
    hidden[..., 0] = 1.0
    rows = net._rows("a")
    rows.data.zero_()
    rows.data[:, 0] = value


def test_without_decay_it_is_causal_linear_attention(hidden):
    net = mixer()
    constant_a(net, hidden, -800.0)
    _, b, c, *_ = net._project(hidden, None, None)
    expected = torch.einsum("bihn,bjhn->bhij", c, b).tril() + torch.diag_embed(net.D[:, None].expand(-1, 9))
    torch.testing.assert_close(net.materialize(hidden), expected)


def test_full_decay_leaves_the_diagonal(hidden):
    net = mixer()
    constant_a(net, hidden, 800.0)
    _, b, c, *_ = net._project(hidden, None, None)
    diagonal = (b * c).sum(-1).transpose(1, 2) + net.D[:, None]
    torch.testing.assert_close(net.materialize(hidden), torch.diag_embed(diagonal))
    assert net(hidden).isfinite().all()


def test_the_decay_is_a_sigmoid(hidden):
    net = mixer()
    log_decay = net._project(hidden, None, None)[4]
    a = nn.functional.linear(hidden, net._rows("a"))
    torch.testing.assert_close(log_decay.exp(), torch.sigmoid(-a))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [4, 7])
def test_it_begins_as_the_attention(hidden, kv_heads, bias, state):
    """With its projections, no gate, no convolution and no D, what mixes is q.k with decay, and all else is shared."""
    attention = SoftmaxAttention(WIDTH, HEADS, kv_heads, bias=bias, out_bias=bias).double()
    net = mixer(state, out_bias=bias)
    net.identity_convolution()
    net.open_gate()
    net.take_projections(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    nn.init.zeros_(net.D)
    constant_a(net, hidden, -800.0)
    q = attention.q_proj(hidden).view(2, 9, HEADS, 4)
    k, v = (
        layer(hidden).view(2, 9, kv_heads, 4).repeat_interleave(HEADS // kv_heads, 2)
        for layer in (attention.k_proj, attention.v_proj)
    )
    matrix = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    torch.testing.assert_close(net.materialize(hidden), matrix)
    mixed = torch.einsum("bhij,bjhd->bihd", matrix, v).flatten(2)
    torch.testing.assert_close(net(hidden), attention.o_proj(mixed), rtol=1e-5, atol=1e-5)  # the gate is 1 to 6 digits


def test_output_is_the_matrix_on_values_once_the_gate_is_open(hidden):
    """What makes stage 2 of MOHAWK follow from stage 1: if T is the attention's matrix, outputs agree."""
    attention = SoftmaxAttention(WIDTH, HEADS).double()
    net = mixer()
    net.identity_convolution()
    net.open_gate()
    net.take_projections(values=attention.v_proj, out=attention.o_proj)
    target = attention.materialize(hidden)
    mixed = torch.einsum("bhij,bjhd->bihd", target, net.values(hidden)).flatten(2)
    torch.testing.assert_close(net.out_proj(mixed), attention(hidden))


def test_a_larger_state_can_learn_in_all_of_its_rows(hidden):
    attention = SoftmaxAttention(WIDTH, HEADS).double()
    net = mixer(7)
    net.take_projections(attention.q_proj, attention.k_proj)
    net(hidden).square().sum().backward()
    first, count = net._places()["C"]
    gradient = net.in_proj.weight.grad[first : first + count].view(HEADS, 7, WIDTH)
    assert (gradient.abs().sum(-1) > 0).all()


def test_what_does_not_fit_is_refused():
    net = mixer()
    with pytest.raises(ValueError, match="heads of at most 6 for C"):
        net.take_projections(queries=nn.Linear(WIDTH, 32))
    with pytest.raises(ValueError, match="for x"):
        net.take_projections(values=nn.Linear(WIDTH, 12))
    with pytest.raises(ValueError, match="out_bias"):
        net.take_projections(out=nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="output of"):
        net.take_projections(out=nn.Linear(WIDTH, 8, bias=False))


def test_convolution_against_plain_sums():
    x, weight, bias = torch.randn(2, 6, 3), torch.randn(3, 4), torch.randn(3)
    before = torch.randn(2, 3, 3)
    y, window = causal_convolution(x, weight, bias, before)
    joined = torch.cat([before, x], 1)
    for t in range(6):
        expected = bias + sum(weight[:, tap] * joined[:, t + tap] for tap in range(4))
        torch.testing.assert_close(y[:, t], expected)
    assert torch.equal(window, x[:, 3:])


def test_convolution_looks_past_padding():
    x, weight = torch.randn(1, 4, 2), torch.randn(2, 3)
    mask = torch.tensor([[False, True, False, True, True, False, False, True, False]])
    padded = torch.full((1, 9, 2), torch.inf).nan_to_num()
    padded[mask] = x[0]
    y, window = causal_convolution(padded, weight, mask=mask)
    expected, end = causal_convolution(x, weight)
    torch.testing.assert_close(y[mask], expected[0])
    torch.testing.assert_close(window, end)
