import jaxtyping
import pytest
import torch

from limbeck.objectives.similarity import MinibatchCKA, cka, linear_cka, rbf_cka

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}


def draw(samples=12, student=4, teacher=6, dtype=torch.float64, seed=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, student), (samples, teacher))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def related(samples, noise=1.0, student=5, teacher=8, seed=7):
    """Two noisy linear views of three common factors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mix_student, mix_teacher, factors = normal(3, student), normal(3, teacher), normal(samples, 3)
    return factors @ mix_student + noise * normal(samples, student), factors @ mix_teacher + noise * normal(
        samples, teacher
    )


def rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(8)))[0]


def gram(features):
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in features] for x in features]


def slow_biased(k, matrix):
    """<HKH, HLH> up to a constant factor, with H written out."""
    n = len(k)
    h = [[(1.0 if i == j else 0.0) - 1 / n for j in range(n)] for i in range(n)]

    def product(a, b):
        return [[sum(a[i][m] * b[m][j] for m in range(n)) for j in range(n)] for i in range(n)]

    a, b = product(product(h, k), h), product(product(h, matrix), h)
    return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n))


def slow_unbiased(k, matrix):
    n = len(k)
    k, matrix = ([[0.0 if i == j else m[i][j] for j in range(n)] for i in range(n)] for m in (k, matrix))
    trace = sum(k[i][j] * matrix[i][j] for i in range(n) for j in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, matrix))
    mixed = sum(k[i][m] * matrix[m][j] for i in range(n) for m in range(n) for j in range(n))
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3))


def slow_cka(student, teacher, hsic):
    k, matrix = gram(student.tolist()), gram(teacher.tolist())
    return hsic(k, matrix) / (hsic(k, k) * hsic(matrix, matrix)) ** 0.5


MEASURES = [
    linear_cka,
    lambda x, y: linear_cka(x, y, debiased=True),
    rbf_cka,
    lambda x, y: rbf_cka(x, y, threshold=0.7),
    lambda x, y: rbf_cka(x, y, debiased=True),
]
MEASURE_NAMES = ["linear", "linear-debiased", "rbf", "rbf-threshold", "rbf-debiased"]
every_measure = pytest.mark.parametrize("measure", MEASURES, ids=MEASURE_NAMES)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("samples", [5, 12])  # fewer and more samples than dimensions
def test_linear_against_loops(samples, debiased, dtype):
    student, teacher = draw(samples, dtype=dtype)
    value = linear_cka(student, teacher, debiased=debiased)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = slow_cka(student, teacher, slow_unbiased if debiased else slow_biased)
    assert value.item() == pytest.approx(expected, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_rbf_against_loops(threshold):
    student, teacher = draw(7)

    def kernel(features):
        rows = features.tolist()
        squared = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
        values = sorted(d for row in squared for d in row if threshold is not None or d > 0)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        variance = middle * (threshold or 1.0) ** 2
        return (-torch.tensor(squared, dtype=torch.float64) / (2 * variance)).exp().tolist()

    k, matrix = kernel(student), kernel(teacher)
    expected = slow_biased(k, matrix) / (slow_biased(k, k) * slow_biased(matrix, matrix)) ** 0.5
    assert rbf_cka(student, teacher, threshold=threshold).item() == pytest.approx(expected, rel=1e-9)


@every_measure
def test_alignment_with_itself_is_1(measure):
    student, _ = draw()
    assert measure(student, student).item() == pytest.approx(1)


@every_measure
def test_rotation_scale_and_shift_change_nothing(measure):
    student, teacher = draw()
    expected = measure(student, teacher)
    torch.testing.assert_close(measure(1e-3 * student @ rotation(4) + 5, 50 * teacher @ rotation(6)), expected)
    assert measure(student, 3 * student @ rotation(4)).item() == pytest.approx(1)
    assert expected < 0.95


@every_measure
def test_it_is_symmetric_and_sees_the_pairing(measure):
    student, teacher = related(20)
    torch.testing.assert_close(measure(student, teacher), measure(teacher, student))
    assert measure(student, teacher.flip(0)) < measure(student, teacher) - 0.1


def test_linear_alignment_changes_under_other_linear_maps():
    student, _ = draw()
    assert linear_cka(student, student * torch.tensor([10.0, 1, 1, 1])) < 0.95


@every_measure
def test_the_teacher_gets_no_gradient(measure):
    student, teacher = (features.requires_grad_() for features in draw())
    measure(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("debiased", [False, True])
def test_gradient_of_the_linear_alignment(debiased):
    student, teacher = draw()
    assert torch.autograd.gradcheck(lambda x: linear_cka(x, teacher, debiased=debiased), student.requires_grad_())


def test_both_ways_to_the_linear_alignment_agree():
    student, teacher = draw(10, 9, 8)
    torch.testing.assert_close(linear_cka(student, teacher), cka(student @ student.T, teacher @ teacher.T))
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    linear_cka(leaf, teacher).backward()
    cka(other @ other.T, teacher @ teacher.T).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_independent_features_of_few_samples():
    """Chance alone makes the biased alignment of wide features large; the debiased one is 0 on average."""
    biased, debiased = [], []
    for seed in range(30):
        student, teacher = draw(10, 200, 200, seed=seed)
        biased.append(linear_cka(student, teacher))
        debiased.append(linear_cka(student, teacher, debiased=True))
    assert torch.stack(biased).mean() > 0.8
    assert torch.stack(debiased).mean().abs() < 0.05


@every_measure
def test_a_constant_side_has_alignment_0_and_finite_gradients(measure):
    student, teacher = torch.ones(8, 3, requires_grad=True), draw(8)[1].float()
    value = measure(student, teacher)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(student.grad).all()


def test_tiny_features_in_float32():
    student, teacher = draw(dtype=torch.float32)
    for debiased in (False, True):
        torch.testing.assert_close(
            linear_cka(1e-12 * student, 1e8 * teacher, debiased=debiased),
            linear_cka(student, teacher, debiased=debiased),
        )


def in_batches(student, teacher, size):
    total = MinibatchCKA()
    for start in range(0, len(student), size):
        total.update(student[start : start + size], teacher[start : start + size])
    return total.compute()


def test_one_batch_is_the_debiased_alignment():
    student, teacher = draw()
    torch.testing.assert_close(in_batches(student, teacher, 12), linear_cka(student, teacher, debiased=True))


def test_batches_add_terms_not_ratios():
    student, teacher = draw(24)
    parts = [(student[:8], teacher[:8]), (student[8:], teacher[8:])]
    terms = [[slow_unbiased(gram(a.tolist()), gram(b.tolist())) for a, b in ((x, y), (x, x), (y, y))] for x, y in parts]
    cross, first, second = (sum(column) for column in zip(*terms, strict=True))
    total = MinibatchCKA()
    for part in parts:
        total.update(*part)
    assert total.compute().item() == pytest.approx(cross / (first * second) ** 0.5)


def test_many_small_batches_approach_the_whole():
    student, teacher = related(4000)
    whole = linear_cka(student, teacher, debiased=True)
    for size in (8, 50, 400):
        assert abs(in_batches(student, teacher, size) - whole) < 0.02
    # Averaging biased alignments of small batches would not.
    naive = torch.stack([linear_cka(student[i : i + 8], teacher[i : i + 8]) for i in range(0, 4000, 8)]).mean()
    assert naive - whole > 0.05


def test_minibatch_alignment_with_itself_is_1_and_records_no_graph():
    student, _ = draw(24)
    value = in_batches(student.requires_grad_(), student, 6)
    assert value.item() == pytest.approx(1)
    assert not value.requires_grad


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unhooked")
def test_impossible_arguments_are_refused():
    student, teacher = draw()
    for measure in (linear_cka, rbf_cka):
        with pytest.raises(ValueError, match="one batch"):
            measure(student, teacher[:4])
        with pytest.raises(ValueError, match="at least 4"):
            measure(student[:3], teacher[:3], debiased=True)
    with pytest.raises(ValueError, match="threshold"):
        rbf_cka(student, teacher, threshold=0.0)
    with pytest.raises(ValueError, match="at least 4"):
        MinibatchCKA().update(student[:3], teacher[:3])
    with pytest.raises(ValueError, match="no batch yet"):
        MinibatchCKA().compute()
