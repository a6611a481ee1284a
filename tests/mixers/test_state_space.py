"""The state-space model by blocks against recorded numbers, its own matrix, and the plain recurrence."""

import math

import pytest
import torch
from torch.nn import functional

from limbeck.mixers.state_space import mixing_matrix, segment_sums, ssd, ssd_loop, ssd_step
from tests.oracles import oracle


def draw(length=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, length, 3, 5), (2, length, 3), (2, length, 3, 4), (2, length, 3, 4), (3,), (2, 3, 5, 4))
    X, a, B, C, D, state = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return X, -functional.softplus(a), B, C, D, state


def test_matrix_and_its_gradients_as_recorded():
    case = oracle.load("mohawk")[0]
    a, B, C, D = (case.tensors[name].clone().requires_grad_() for name in ("A_raw", "B", "C", "D"))
    matrix = mixing_matrix(-functional.softplus(a), B, C, D)
    case.check("mixer", matrix, atol=1e-6)
    loss = (matrix - case.tensors["attn"]).square().sum((-1, -2)).sqrt().mean()
    case.check("stage1_loss", loss)
    for name, gradient in zip("ABCD", torch.autograd.grad(loss, (a, B, C, D)), strict=True):
        case.check(f"grad_{name}", gradient, of_largest=True)


@pytest.mark.parametrize("block", [4, 8])
def test_blocks_as_recorded(block):
    case = oracle.load("mohawk")[0]
    X, decay, B, C = (case.tensors[name] for name in ("X", "log_decay", "B", "C"))
    y, last = ssd(X, decay, B, C, block=block)
    case.check(f"ssd_Y_block{block}", y, of_largest=True)
    case.check("ssd_final_state", last, of_largest=True)
    sums = segment_sums(decay.transpose(1, 2))
    case.check("segsum", sums.masked_fill(sums == -torch.inf, -1e30), atol=1e-6)


def test_as_mamba_computes_it():
    case = oracle.load("mamba-mixer")[0]
    X, decay, B, C = (case.tensors[f"ssd.{name}"] for name in "XABC")
    y, last = ssd(X, decay, B, C, block=4)
    for name, value in (("Y", y), ("final_state", last)):
        expected = case.tensors[f"ssd.{name}"]
        assert (value - expected).abs().max() < 1e-5 * expected.abs().max()
    torch.testing.assert_close(segment_sums(case.tensors["segsum.x"]), case.tensors["segsum.out"])


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 7, 10, 11, 64])
@pytest.mark.parametrize("decays", [True, False])
def test_blocks_matrix_and_recurrence_agree(block, decays):
    X, decay, B, C, D, state = draw()
    decay = decay if decays else None
    leaves = [t.requires_grad_() for t in (X, decay, B, C, D, state) if t is not None]
    outputs = ssd(X, decay, B, C, D, block, state)
    expected = ssd_loop(X, torch.zeros(2, 11, 3).double() if decay is None else decay, B, C, D, state)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    ours, theirs = (torch.autograd.grad(y.square().sum() + last.sum(), leaves) for y, last in (outputs, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    by_matrix = torch.einsum("bhij,bjhp->bihp", mixing_matrix(decay, B, C, D), X)
    torch.testing.assert_close(ssd(X, decay, B, C, D, block)[0], by_matrix)


def test_against_plain_python():
    X, decay, B, C, D, _ = (t[:1] if t.dim() > 1 else t for t in draw(4))
    y, _ = ssd(X, decay, B, C, D, 3)
    for i in range(4):
        for head in range(3):
            expected = [float(D[head] * x) for x in X[0, i, head]]
            for j in range(i + 1):
                reach = math.exp(sum(float(decay[0, k, head]) for k in range(j + 1, i + 1)))
                weight = reach * sum(float(c) * float(b) for c, b in zip(C[0, i, head], B[0, j, head], strict=True))
                expected = [e + weight * float(x) for e, x in zip(expected, X[0, j, head], strict=True)]
            torch.testing.assert_close(y[0, i, head], torch.tensor(expected, dtype=torch.float64))


def test_two_halves_make_a_whole():
    X, decay, B, C, D, state = draw()
    first, middle = ssd(X[:, :6], decay[:, :6], B[:, :6], C[:, :6], D, 4, state)
    second, last = ssd(X[:, 6:], decay[:, 6:], B[:, 6:], C[:, 6:], D, 4, middle)
    whole, end = ssd(X, decay, B, C, D, 4, state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end)


def test_strong_decays_keep_weak_ones_exact():
    """After a decay of exp(-2000) a difference of float32 sums knows exp(-0.01) to three digits."""
    X, _, B, C, D, _ = draw(40, torch.float32)
    decay = torch.full((2, 40, 3), -0.01)
    decay[:, 3:30:4] = -300.0
    y, last = ssd(X, decay, B, C, D, 40)
    expected, end = ssd_loop(*(t.double() for t in (X, decay, B, C, D)))
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (last - end).abs().max() < 1e-5 * end.abs().max()
    leaf = decay.requires_grad_()
    assert torch.autograd.grad(ssd(X, leaf, B, C, D, 40)[0].sum(), leaf)[0].isfinite().all()


def test_gradients_against_differences():
    tensors = [t[:1, :5].contiguous().requires_grad_() if t.dim() > 1 else t.requires_grad_() for t in draw(5)[:5]]
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, block=2), tensors)


def test_half_precision_sums_in_float32():
    X, decay, B, C, D, _ = draw(300, torch.bfloat16)
    y, last = ssd(X, decay, B, C, D)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    expected, end = ssd_loop(*(t.double() for t in (X, decay, B, C, D)))
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(last.double(), end, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = ssd(X.float(), decay.float(), B.float(), C.float(), D.float())
    torch.testing.assert_close(again.double(), expected, rtol=1e-5, atol=1e-5)


def test_step_is_float32_whatever_comes():
    X, decay, B, C, D, state = draw(3, torch.bfloat16)
    y, after = ssd_step(X[:, 0], decay[:, 0], B[:, 0], C[:, 0], D, state.float())
    assert y.dtype == after.dtype == torch.float32
