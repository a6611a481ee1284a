import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.logits import deit_hard, deit_soft, dist, kd, soft_cross_entropy, standardise_logits

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-4}  # bfloat16 only in the inputs
LOSSES = [kd, soft_cross_entropy, deit_hard, deit_soft, dist]


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def draw(seed=0, batch=6, classes=7, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def gradient(loss, leaf, *rest, **options):
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options), leaf)[0]


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def pearson(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    a, b = [x - mean_a for x in a], [x - mean_b for x in b]
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)) + 1e-8)


def slow_kd(student, teacher, temperature):
    total = 0.0
    for row_s, row_t in zip(student, teacher, strict=True):
        for p_s, p_t in zip(softmax(row_s, temperature), softmax(row_t, temperature), strict=True):
            total += p_t * (math.log(p_t) - math.log(p_s))
    return temperature**2 * total / len(student)


def slow_soft_cross_entropy(student, teacher, temperature):
    total = 0.0
    for row_s, row_t in zip(student, teacher, strict=True):
        for p_s, p_t in zip(softmax(row_s, temperature), softmax(row_t, temperature), strict=True):
            total -= p_t * math.log(p_s)
    return temperature**2 * total / len(student)


def slow_dist(student, teacher, temperature):
    rows_s, rows_t = [softmax(row, temperature) for row in student], [softmax(row, temperature) for row in teacher]
    columns_s, columns_t = list(zip(*rows_s, strict=True)), list(zip(*rows_t, strict=True))
    inter = sum(pearson(a, b) for a, b in zip(rows_s, rows_t, strict=True)) / len(rows_s)
    intra = sum(pearson(a, b) for a, b in zip(columns_s, columns_t, strict=True)) / len(columns_s)
    return temperature**2 * (1 - inter + 1 - intra)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    ("fast", "slow"), [(kd, slow_kd), (soft_cross_entropy, slow_soft_cross_entropy), (dist, slow_dist)]
)
def test_against_loops(fast, slow, temperature, dtype):
    student, teacher = draw(dtype=dtype)
    loss = fast(student, teacher, temperature=temperature)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(slow(student.tolist(), teacher.tolist(), temperature), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_deit_hard_against_loops(dtype):
    student, teacher = draw(dtype=dtype)
    best = [max(range(len(row)), key=row.__getitem__) for row in teacher.tolist()]
    expected = -sum(math.log(softmax(row)[c]) for row, c in zip(student.tolist(), best, strict=True)) / len(student)
    assert deit_hard(student, teacher).item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_standardisation_against_loops(dtype):
    logits, _ = draw(dtype=dtype)
    actual = standardise_logits(logits)
    for row, result in zip(logits.tolist(), actual.tolist(), strict=True):
        mean = sum(row) / len(row)
        std = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
        assert result == pytest.approx([(x - mean) / (1e-7 + std) for x in row], rel=TOLERANCE[dtype], abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (logits.requires_grad_() for logits in draw())
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_shifting_the_rows_changes_nothing(loss):
    student, teacher = draw()
    shift = torch.linspace(-5, 5, len(student), dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(student + shift, teacher - 2 * shift), loss(student, teacher))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_gradient_of_kd(temperature):
    student, teacher = draw()
    expected = temperature * (F.softmax(student / temperature, 1) - F.softmax(teacher / temperature, 1)) / len(student)
    for loss in (kd, soft_cross_entropy):
        torch.testing.assert_close(gradient(loss, student, teacher, temperature=temperature), expected)


def test_kd_at_infinite_temperature_compares_centred_logits():
    student, teacher = draw()
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * student.shape[1])
    errors = [(kd(student, teacher, temperature=t) - limit).abs() / limit for t in (1e2, 1e3, 1e4)]
    assert errors[2] < 1e-3
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_zero_where_both_agree_and_positive_elsewhere(temperature):
    student, teacher = draw()
    assert kd(student, student.clone(), temperature=temperature).item() == 0
    assert gradient(kd, student, student.clone(), temperature=temperature).abs().max() < 1e-12
    assert kd(student, teacher, temperature=temperature) > 0.01


def test_kd_of_extreme_logits_is_finite():
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(2e4)
    assert torch.isfinite(gradient(kd, student, teacher, temperature=1.0)).all()


def test_soft_cross_entropy_is_kd_plus_the_entropy_of_the_teacher():
    student, teacher = draw()
    p = F.softmax(teacher / 2, 1)
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, temperature=2.0), kd(student, teacher, temperature=2.0) + 4 * entropy
    )


def test_soft_cross_entropy_of_several_teachers():
    student, teacher = draw()
    mean = (F.softmax(teacher, 1) + F.softmax(student.flip(0), 1)) / 2
    expected = F.cross_entropy(student, mean)
    torch.testing.assert_close(soft_cross_entropy(student, mean.log()), expected)


@pytest.mark.parametrize("loss", [kd, soft_cross_entropy])
def test_numel_is_smaller_by_the_number_of_classes(loss):
    student, teacher = draw()
    torch.testing.assert_close(7 * loss(student, teacher, reduction="numel"), loss(student, teacher))


def test_deit_soft_is_kd_per_entry():
    student, teacher = draw()
    torch.testing.assert_close(
        deit_soft(student, teacher, temperature=2.0), kd(student, teacher, temperature=2.0, reduction="numel")
    )


def test_deit_hard_sees_only_the_best_class():
    student, teacher = draw()
    torch.testing.assert_close(deit_hard(student, teacher), F.cross_entropy(student, teacher.argmax(1)))
    assert torch.equal(deit_hard(student, teacher), deit_hard(student, 100 * teacher))


def test_dist_is_zero_where_both_agree():
    student, _ = draw()
    assert dist(student, student.clone()).item() == pytest.approx(0, abs=1e-5)  # up to eps


def test_dist_between_classes_ignores_a_positive_affine_map_of_the_probabilities():
    student, teacher = draw()
    p = F.softmax(teacher, 1)
    mixed = (0.3 * p + 0.7 / p.shape[1]).log()  # a p + b per row, still a distribution
    inter = {"intra_weight": 0.0, "eps": 0.0}
    torch.testing.assert_close(dist(student, mixed, **inter), dist(student, teacher, **inter))
    assert dist(teacher, mixed, **inter).item() == pytest.approx(0, abs=1e-12)
    assert not torch.isclose(kd(student, mixed), kd(student, teacher), rtol=1e-2)


def test_dist_weights_its_two_terms():
    student, teacher = draw()
    inter, intra = dist(student, teacher, intra_weight=0.0), dist(student, teacher, inter_weight=0.0)
    assert not torch.isclose(inter, intra)
    torch.testing.assert_close(dist(student, teacher, inter_weight=2.0, intra_weight=3.0), 2 * inter + 3 * intra)


def test_dist_of_one_sample_has_a_finite_gradient():
    student, teacher = draw(batch=1)
    assert torch.isfinite(gradient(dist, student, teacher)).all()


def test_standardised_logits_have_mean_0_and_deviation_1():
    logits, _ = draw()
    result = standardise_logits(logits)
    torch.testing.assert_close(result.mean(1), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(result.std(1), torch.ones(6, dtype=torch.float64))


def test_standardisation_ignores_shift_and_positive_scale():
    logits, _ = draw()
    torch.testing.assert_close(standardise_logits(5 * logits - 3), standardise_logits(logits))
    torch.testing.assert_close(standardise_logits(-logits), -standardise_logits(logits))
    assert torch.equal(standardise_logits(torch.ones(2, 3)), torch.zeros(2, 3))


def test_standardisation_detaches_nothing():
    logits, _ = draw()
    assert gradient(lambda z: standardise_logits(z)[:, 0].sum(), logits).abs().sum() > 0


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("loss", LOSSES)
def test_other_classes_are_refused(loss):
    with pytest.raises(ValueError, match="same classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("loss", [kd, soft_cross_entropy, deit_soft, dist])
def test_a_temperature_of_0_is_refused(loss):
    with pytest.raises(ValueError, match="temperature"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)


@pytest.mark.usefixtures("unhooked")
def test_other_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="'mean'"):
        kd(torch.zeros(2, 3), torch.zeros(2, 3), reduction="mean")
    with pytest.raises(ValueError, match="2 classes"):
        standardise_logits(torch.zeros(2, 1))
