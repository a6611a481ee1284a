import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.features import (
    attention_transfer,
    hierarchical_context_loss,
    hint,
    ofd_margin,
    partial_l2,
    vid,
    vid_log_scale,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-4}
MARGIN = torch.tensor([-0.5, -0.1, -1.0])
SCALE = torch.tensor([-1.0, 0.5, 3.0])


def partial(student, teacher):
    return partial_l2(student, teacher, MARGIN.to(student.dtype))


def gaussian(student, teacher):
    return vid(student, teacher, SCALE.to(student.dtype))


LOSSES = [hint, attention_transfer, partial, hierarchical_context_loss, gaussian]


def draw(student=(2, 3, 8, 8), teacher=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    shapes = (student, teacher or student)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradient(loss, leaf, *rest, **options):
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options), leaf)[0]


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def entries(features):
    return [
        (b, c, i, j, value)
        for b, sample in enumerate(features.tolist())
        for c, channel in enumerate(sample)
        for i, row in enumerate(channel)
        for j, value in enumerate(row)
    ]


def slow_mse(student, teacher):
    pairs = list(zip(entries(student), entries(teacher), strict=True))
    return sum((a[-1] - b[-1]) ** 2 for a, b in pairs) / len(pairs)


def slow_attention(student, teacher, power=2):
    def attention(sample):
        flat = [
            sum(channel[i][j] ** power for channel in sample) / len(sample)
            for i in range(len(sample[0]))
            for j in range(len(sample[0][0]))
        ]
        length = math.sqrt(sum(q * q for q in flat))
        return [q / length for q in flat]

    total, count = 0.0, 0
    for a, b in zip(student.tolist(), teacher.tolist(), strict=True):
        for q_s, q_t in zip(attention(a), attention(b), strict=True):
            total, count = total + (q_s - q_t) ** 2, count + 1
    return total / count


def slow_partial(student, teacher):
    total = 0.0
    for (_, c, _, _, s), (*_, t) in zip(entries(student), entries(teacher), strict=True):
        target = max(t, MARGIN.to(student.dtype)[c].item())
        if target > 0 or s > target:
            total += (s - target) ** 2
    return total / len(student)


def slow_hierarchical(student, teacher):
    total, weights, weight = slow_mse(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        step = student.shape[2] // side
        error = []
        for b in range(student.shape[0]):
            for c in range(student.shape[1]):
                difference = (student[b, c].double() - teacher[b, c].double()).tolist()
                for i in range(side):
                    for j in range(side):
                        block = [difference[step * i + k][step * j + m] for k in range(step) for m in range(step)]
                        error.append((sum(block) / len(block)) ** 2)
        weight /= 2
        total, weights = total + weight * sum(error) / len(error), weights + weight
    return total / weights


def slow_gaussian(student, teacher):
    total, pairs = 0.0, list(zip(entries(student), entries(teacher), strict=True))
    for (_, c, _, _, mean), (*_, target) in pairs:
        variance = math.log(1 + math.exp(SCALE.to(student.dtype)[c].item())) + 1e-5
        total += 0.5 * ((mean - target) ** 2 / variance + math.log(variance))
    return total / len(pairs)


SLOW = [
    (hint, slow_mse),
    (attention_transfer, slow_attention),
    (partial, slow_partial),
    (hierarchical_context_loss, slow_hierarchical),
    (gaussian, slow_gaussian),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("fast", "slow"), SLOW)
def test_against_loops(fast, slow, dtype):
    student, teacher = draw(dtype=dtype)
    loss = fast(student, teacher)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(slow(student, teacher), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("power", [1, 3, 4])
def test_other_powers_of_attention_against_loops(power):
    student, teacher = draw()
    loss = attention_transfer(student, teacher, power=power)
    assert loss.item() == pytest.approx(slow_attention(student, teacher, power), rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (features.requires_grad_() for features in draw())
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [hint, attention_transfer, hierarchical_context_loss])
def test_zero_where_both_agree(loss):
    student, teacher = draw()
    assert loss(student, student.clone()).item() == 0
    assert loss(student, teacher) > 0.001


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 3, 4, 4)])
def test_hint_of_any_shape(shape):
    student, teacher = draw(shape)
    torch.testing.assert_close(hint(student, teacher), (student - teacher).square().mean())
    torch.testing.assert_close(gradient(hint, student, teacher), 2 * (student - teacher) / student.numel())


@pytest.mark.parametrize(("student", "teacher"), [((2, 3, 8, 8), (2, 5, 4, 4)), ((2, 3, 4, 4), (2, 5, 8, 8))])
def test_attention_pools_the_larger_map(student, teacher):
    a, b = draw(student, teacher)
    small_a, small_b = (F.avg_pool2d(x, x.shape[2] // 4) if x.shape[2] > 4 else x for x in (a, b))
    assert attention_transfer(a, b).item() == pytest.approx(slow_attention(small_a, small_b), rel=1e-10)


def test_attention_ignores_scale_and_channel_order():
    student, teacher = draw()
    expected = attention_transfer(student, teacher)
    torch.testing.assert_close(attention_transfer(3 * student, -0.2 * teacher), expected)
    torch.testing.assert_close(attention_transfer(student.flip(1), teacher), expected)
    assert not torch.isclose(attention_transfer(student.flip(2), teacher), expected)


def test_attention_of_a_dead_map_is_finite():
    student, teacher = torch.zeros(2, 3, 4, 4), draw(dtype=torch.float32)[1]
    assert torch.isfinite(gradient(attention_transfer, student, teacher)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.3), (-2.0, 0.5), (3.0, 1.0)])
def test_margin_is_the_mean_of_the_negative_part(mean, std, dtype):
    x = torch.linspace(mean - 12 * std, 0, 200_001, dtype=torch.float64)
    density = torch.exp(-((x - mean) ** 2) / (2 * std**2))
    expected = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
    for sign in (1, -1):
        margin = ofd_margin(torch.tensor([sign * std], dtype=dtype), torch.tensor([mean], dtype=dtype))
        torch.testing.assert_close(margin.double(), expected[None], rtol=1e-4, atol=0)


def test_margin_far_from_zero():
    bias = torch.tensor([60.0, -60.0, 1.0, -1.0, 1e30, 100.0])
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0, 1e-3, 0.0])
    margin = ofd_margin(weight, bias)
    # mu >> sigma: -sigma^2 / mu; mu << -sigma: mu
    torch.testing.assert_close(margin, torch.tensor([-1 / 60, -60.0, 0.0, -1.0, 0.0, 0.0]), rtol=1e-3, atol=1e-6)
    assert (margin <= 0).all()


def test_margin_has_no_gradient():
    assert not ofd_margin(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "slope"),
    [
        (3.0, 2.0, 1.0, 2.0),  # active teacher: matched from above
        (1.0, 2.0, 1.0, -2.0),  # and from below
        (-0.2, -5.0, 0.64, 1.6),  # inactive teacher, student above the margin of -1: pushed down to it
        (1.0, -0.5, 2.25, 3.0),  # inactive teacher above the margin: its own value is the target
        (-1.5, -5.0, 0.0, 0.0),  # both below the margin: nothing to learn
        (-0.6, -0.5, 0.0, 0.0),  # both inactive, student lower
    ],
)
def test_branches_of_partial_l2(student, teacher, loss, slope):
    leaf = torch.full((1, 1, 1, 1), student, requires_grad=True)
    result = partial_l2(leaf, torch.full((1, 1, 1, 1), teacher), torch.tensor([-1.0]))
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-5)
    assert leaf.grad.item() == pytest.approx(slope, rel=1e-5)


def test_partial_l2_is_a_mean_over_the_batch_only():
    student, teacher = draw()
    single = partial(student[:1], teacher[:1])
    torch.testing.assert_close(partial(student[:1].repeat(4, 1, 1, 1), teacher[:1].repeat(4, 1, 1, 1)), single)
    torch.testing.assert_close(partial(student[:1].repeat(1, 1, 2, 1), teacher[:1].repeat(1, 1, 2, 1)), 2 * single)


def test_hierarchical_levels_follow_the_size():
    for side, levels in ((8, 3), (4, 2), (3, 2), (2, 1), (1, 0)):
        constant = torch.ones(1, 1, side, side)
        # A constant difference survives every pool: the weighted mean is 1 whatever the levels.
        torch.testing.assert_close(hierarchical_context_loss(constant, 0 * constant), torch.tensor(1.0))
        if side > 1:
            # One with mean 0 over the whole map loses at least the last level.
            wave = torch.zeros(1, 1, side, side)
            wave[..., 0, 0], wave[..., -1, -1] = 1.0, -1.0
            weights = [1.0, 0.5, 0.25, 0.125][: levels + 1]
            pools = [side, *[level for level in (4, 2, 1) if level < side]]
            errors = [F.adaptive_avg_pool2d(wave, pool).square().mean() for pool in pools]
            expected = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
            torch.testing.assert_close(hierarchical_context_loss(wave, 0 * wave), expected)


def test_gradients_of_vid():
    student, teacher = draw((2, 3, 4, 4))
    scale = SCALE.double().requires_grad_()
    leaf = student.clone().requires_grad_()
    d_mean, d_scale = torch.autograd.grad(vid(leaf, teacher, scale), (leaf, scale))
    variance = F.softplus(SCALE.double()) + 1e-5
    column = variance[:, None, None]
    torch.testing.assert_close(d_mean, (student - teacher) / column / student.numel())
    slope = 0.5 * (1 / column - (student - teacher).square() / column**2)
    torch.testing.assert_close(d_scale, slope.sum((0, 2, 3)) / student.numel() * torch.sigmoid(SCALE.double()))


def test_vid_is_least_where_the_variance_is_the_mean_squared_error():
    student, teacher = draw((64, 3, 4, 4))
    error = (student - teacher).square().mean((0, 2, 3))
    best = torch.tensor([vid_log_scale(value.item()) for value in error], dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(vid(student, teacher, best), best)
    assert slope.abs().max() < 1e-9


def test_vid_without_positions():
    student, teacher = draw((5, 3))
    expected = vid(student[..., None, None], teacher[..., None, None], SCALE.double())
    torch.testing.assert_close(vid(student, teacher, SCALE.double()), expected)


@pytest.mark.parametrize("variance", [1e-3, 1.0, 5.0, 1e4])
def test_vid_log_scale_gives_the_variance(variance):
    start = torch.tensor(vid_log_scale(variance), dtype=torch.float64)
    assert (torch.logaddexp(start, torch.zeros_like(start)) + 1e-5).item() == pytest.approx(variance)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("loss", [hint, partial, hierarchical_context_loss, gaussian])
def test_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match="connector"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))


@pytest.mark.usefixtures("unhooked")
def test_other_impossible_arguments_are_refused():
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="power"):
        attention_transfer(maps, maps, power=0)
    with pytest.raises(ValueError, match="one batch"):
        attention_transfer(maps, maps[:1])
    with pytest.raises(ValueError, match="margin"):
        partial_l2(maps, maps, torch.zeros(4))
    with pytest.raises(ValueError, match="log_scale"):
        vid(maps, maps, torch.zeros(1))
    with pytest.raises(ValueError, match="variance"):
        vid_log_scale(0.0)
