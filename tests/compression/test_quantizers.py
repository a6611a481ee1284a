import math

import pytest
import torch

from limbeck.compression.allocation import allocate
from limbeck.compression.buckets import bucket_count, scale
from limbeck.compression.points import (
    LearnedPoints,
    fake_quantize_to_points,
    nearest_points,
    quantile_points,
    quantize_to_points,
)
from limbeck.compression.quantized import QuantizedStateDict, even_points
from limbeck.compression.quantizers import fake_quantize, quantize, round_levels, straight_through
from limbeck.compression.storage import code_sizes
from tests.oracles.oracle import load

ORACLE = load("quantized-distillation")[0]
W, W2 = ORACLE.tensors["w"], ORACLE.tensors["w2"]
GRADIENT, GRADIENT2 = ORACLE.tensors["grad_out"], ORACLE.tensors["grad_out2"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [4, 16])
@pytest.mark.parametrize("bucket", [16, 256, 0])
def test_uniform_levels_are_those_of_the_original(levels, bucket):
    name = f"uniform.s{levels}.bucket{bucket}"
    ORACLE.check(name, fake_quantize(W, levels, bucket=bucket or None), atol=1e-6)
    ORACLE.check(name, quantize(W, levels, bucket=bucket or None).dequantize(), atol=1e-6)


def test_the_version_for_variables_is_that_of_the_original():
    ORACLE.check("uniform_var.s4.bucket16.out", fake_quantize(W2, 4, bucket=16), atol=1e-6)


@pytest.mark.parametrize("count", [4, 8])
def test_points_at_quantiles_and_their_gradients_are_those_of_the_original(count):
    points = quantile_points(W, count, bucket=16)
    ORACLE.check(f"quantile_points.k{count}", points, atol=1e-6)
    points.requires_grad_()
    out = fake_quantize_to_points(W, points, bucket=16)
    ORACLE.check(f"nonuniform.k{count}.out", out, atol=1e-6)
    out.backward(GRADIENT)
    ORACLE.check(f"nonuniform.k{count}.grad_points", points.grad, rtol=1e-5, atol=1e-6)
    assigned = quantize_to_points(W, points, bucket=16)
    ORACLE.check(f"nonuniform.k{count}.indices", assigned.indices.view(W.shape))
    assert torch.equal(assigned.dequantize(), out)


def test_given_points_and_their_gradients_are_those_of_the_original():
    points = ORACLE.tensors["points2"].clone().requires_grad_()
    out = fake_quantize_to_points(W2, points, bucket=16)
    ORACLE.check("nonuniform2.out", out, atol=1e-6)
    out.backward(GRADIENT2)
    ORACLE.check("nonuniform2.grad_points", points.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "unit", "expected"),
    [(16, "points", [12, 20, 23, 9]), (4, "bits", [4, 4, 5, 3]), (8, "points", [6, 10, 12, 4])],
)
def test_the_budget_is_shared_as_in_the_original(count, unit, expected):
    assert allocate([0.5, 1.5, 2.0, 0.1], count, unit) == expected


def test_a_missing_share_goes_to_the_first_of_the_smallest():
    # Five of ten points are shared: 0.5, 0.5, 0.5 and 3.5 round to the even 0, 0, 0 and 4, and nothing is left over.
    assert allocate([1.0, 1.0, 1.0, 7.0, 0.0], 2) == [2, 1, 1, 5, 1]
    # Three tensors of five share nine: 1.125, 2.25 and 5.625 round to 1, 2 and 6. Of 2.25, 2.25 and 4.5 one is missing.
    assert allocate([1.0, 2.0, 5.0], 5) == [3, 4, 8]
    assert allocate([1.0, 1.0, 2.0], 5) == [5, 4, 6]
    # 0.5, 1.5, 1.5 and 1.5 round to 0, 2, 2 and 2, of which there were five: the largest loses one.
    assert allocate([1.0, 3.0, 3.0, 3.0, 0.0], 2) == [1, 2, 3, 3, 1]
    assert sum(allocate([0.0, 0.0], 5)) == 10


def test_code_lengths_are_those_of_the_original():
    for levels, name in ((4, "s4_bucket16"), (16, "s16_bucket16")):
        state = QuantizedStateDict({"w": quantize(W, levels, bucket=16), "w2": quantize(W2, levels, bucket=16)})
        expected = {"s4_bucket16": 1.8682926829268294, "s16_bucket16": 3.921951219512197}[name]
        assert code_sizes(state)["huffman_bits"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scaling", ["linear", "absmax", "absnorm"])
def test_against_a_loop(scaling):
    weights, bucket, levels = draw(3, 7), 4, 5
    flat, expected = weights.flatten().tolist(), []
    for start in range(0, len(flat), bucket):
        part = flat[start : start + bucket]
        if scaling == "linear":
            alpha, beta = max(part) - min(part) or 1.0, min(part)
        else:
            norm = math.sqrt(sum(value**2 for value in part))
            alpha, beta = (max(map(abs, part)) if scaling == "absmax" else norm), 0.0
        for value in part:
            scaled = (value - beta) / alpha if scaling == "linear" else abs(value) / alpha
            level = round(scaled * (levels - 1)) / (levels - 1)
            expected.append(alpha * level + beta if scaling == "linear" else math.copysign(alpha * level, value))
    for made in (
        quantize(weights, levels, bucket=bucket, scaling=scaling).dequantize(),
        fake_quantize(weights, levels, bucket=bucket, scaling=scaling),
    ):
        torch.testing.assert_close(made.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (5,), (64,), (65,), (4, 3, 2, 2)])
@pytest.mark.parametrize("bucket", [1, 16, 64, None])
def test_quantising_twice_changes_nothing_and_errors_are_bounded(shape, bucket):
    weights = draw(*shape)
    for levels in (2, 3, 256):
        once = quantize(weights, levels, bucket=bucket)
        again = quantize(once.dequantize(), levels, bucket=bucket)
        assert torch.equal(once.indices, again.indices)
        torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=0, atol=1e-6)
        size = min(bucket or weights.numel(), weights.numel())
        bound = once.alpha.repeat_interleave(size)[: weights.numel()] / (2 * (levels - 1))
        spread = once.alpha[0] if bucket == 1 else bound  # one weight a bucket is its own extreme
        assert ((once.dequantize() - weights).flatten().abs() <= spread + 1e-6).all()
        assert len(once.alpha) == bucket_count(weights.numel(), bucket)


def test_the_extremes_of_a_bucket_are_kept_and_at_one_bit_there_is_nothing_else():
    weights = draw(1000)
    made = quantize(weights, 2, bucket=100).dequantize().view(10, 100)
    rows = weights.view(10, 100)
    torch.testing.assert_close(made.amax(1), rows.amax(1), rtol=0, atol=5e-7)
    assert torch.equal(made.amin(1), rows.amin(1))
    assert all(row.unique().numel() == 2 for row in made)


def test_a_bucket_of_equal_weights_stays_itself():
    weights = torch.full((10,), 0.37)
    assert torch.equal(quantize(weights, 4, bucket=4).dequantize(), weights)
    assert torch.equal(quantize(torch.zeros(6), 4, scaling="absmax").dequantize(), torch.zeros(6))


def test_halves_go_to_the_even_level():
    assert round_levels(torch.tensor([0.5, 1.5, 2.5, 3.5]) / 4, 5).tolist() == [0.0, 2.0, 2.0, 4.0]


def test_stochastic_rounding_is_right_on_average_and_takes_the_two_levels_around():
    values, draws = torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0]), torch.Generator().manual_seed(1)
    rounded = torch.stack([round_levels(values, 4, draws) for _ in range(20_000)])
    assert torch.equal(rounded[:, 0].unique(), torch.tensor([0.0]))
    assert torch.equal(rounded[:, 4].unique(), torch.tensor([3.0]))
    assert rounded[:, 1].unique().tolist() == [0.0, 1.0]
    assert (rounded.mean(0) / 3 - values).abs().max() < 4 * 0.5 / 3 / math.sqrt(20_000)


def test_the_gradient_passes_straight_through():
    weights = draw(50).requires_grad_()
    fake_quantize(weights, 4, bucket=16).backward(gradient := draw(50, seed=1))
    assert torch.equal(weights.grad, gradient)
    value = torch.zeros(3, requires_grad=True)
    assert torch.equal(straight_through(value, torch.ones(3)), torch.ones(3))


def test_beyond_one_the_truncated_gradient_is_zero():
    weights = (2 * draw(50)).requires_grad_()
    made = fake_quantize(weights, 4, bucket=16, gradient="truncated")
    assert torch.equal(made, fake_quantize(weights.detach().clamp(-1, 1), 4, bucket=16))
    made.backward(gradient := draw(50, seed=1))
    inside = weights.detach().abs() <= 1
    assert 0 < inside.sum() < 50
    assert torch.equal(weights.grad, torch.where(inside, gradient, torch.zeros(50)))


def test_the_complicated_gradient_goes_through_the_scales_too():
    weights, gradient, levels = draw(37).requires_grad_(), draw(37, seed=1), 4
    made = fake_quantize(weights, levels, bucket=16, gradient="complicated")
    assert torch.equal(made, fake_quantize(weights, levels, bucket=16))
    made.backward(gradient)
    expected = gradient.clone()
    for start in range(0, 37, 16):
        part, own = weights.detach()[start : start + 16], gradient[start : start + 16]
        scaled = (part - part.min()) / (part.max() - part.min())
        moved = (own * ((scaled * (levels - 1)).round() / (levels - 1) - scaled)).sum()
        expected[start + part.argmax()] += moved
        expected[start + part.argmin()] -= moved
    torch.testing.assert_close(weights.grad, expected, rtol=1e-4, atol=1e-5)


def test_evenly_spaced_points_are_the_uniform_quantiser():
    weights = draw(333)
    for levels in (2, 4, 16):
        even = even_points(levels)
        torch.testing.assert_close(
            fake_quantize_to_points(weights, even, bucket=64),
            fake_quantize(weights, levels, bucket=64),
            rtol=0,
            atol=1e-6,
        )


@pytest.mark.parametrize("scaling", ["linear", "absmax"])
def test_the_gradient_of_points_is_that_of_a_gather(scaling):
    weights, gradient = draw(100), draw(100, seed=1)
    points = torch.tensor([0.1, 0.3, 0.8], requires_grad=True)
    fake_quantize_to_points(weights, points, bucket=32, scaling=scaling).backward(gradient)
    ours, points.grad = points.grad, None
    scaled = scale(weights, 32, scaling)
    table = (scaled.values.unsqueeze(-1) - points.detach()).abs().argmin(-1)
    scaled.unscale(points[table]).backward(gradient)
    torch.testing.assert_close(ours, points.grad, rtol=1e-5, atol=1e-6)


def test_the_nearest_point_is_the_lower_of_two_equally_near():
    points = torch.tensor([0.0, 0.5, 1.0])
    assert nearest_points(torch.tensor([-3.0, 0.25, 0.26, 0.75, 9.0]), points).tolist() == [0, 0, 1, 1, 2]
    assert nearest_points(torch.rand(5), torch.tensor([0.4])).tolist() == [0] * 5


def test_points_can_be_counted_anew_and_sorted():
    learned = LearnedPoints(2, 2, most=5)
    learned.begin([torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.0, 1.0])])
    learned.order()
    assert [points.tolist() for points in learned()] == [pytest.approx([0.1, 0.5, 0.9]), [0.0, 1.0]]
    again = LearnedPoints(2, 2, most=5)
    again.load_state_dict(learned.state_dict())
    assert again.sizes() == [3, 2]


def test_half_precision_is_quantised_in_float32():
    weights = draw(100).bfloat16()
    made = quantize(weights, 16, bucket=50)
    assert made.alpha.dtype == torch.float32
    assert torch.equal(made.dequantize(), quantize(weights.float(), 16, bucket=50).dequantize().bfloat16())
    double = quantize(draw(100).double(), 16)
    assert double.dequantize().dtype == torch.float64
