import math

import jaxtyping
import pytest
import torch

from limbeck.objectives.relations import pkt, rkd, rkd_angle, rkd_distance, similarity_preserving

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}
LOSSES = [similarity_preserving, rkd_distance, rkd_angle, rkd, pkt]


def draw(batch=5, student=4, teacher=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shapes = ((batch, student), (batch, teacher))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def gradient(loss, leaf, *rest, **options):
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options), leaf)[0]


def rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(vector):
    length = math.sqrt(dot(vector, vector))
    return [x / length for x in vector] if length else vector


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def smooth_l1(difference):
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def slow_similarity(student, teacher):
    def rows(x):
        return [unit([dot(a, b) for b in x]) for a in x]

    pairs = zip(rows(student), rows(teacher), strict=True)
    return sum(dot(minus(a, b), minus(a, b)) for a, b in pairs) / len(student) ** 2


def slow_distance(student, teacher, squared=False):
    def distances(x):
        powers = [[dot(minus(a, b), minus(a, b)) ** (1 if squared else 0.5) for b in x] for a in x]
        positive = [d for row in powers for d in row if d > 0]
        return [[d * len(positive) / sum(positive) for d in row] for row in powers]

    s, t = distances(student), distances(teacher)
    n = len(student)
    return sum(smooth_l1(s[i][j] - t[i][j]) for i in range(n) for j in range(n)) / n**2


def slow_angle(student, teacher):
    def cosines(x, i, j, k):
        return dot(unit(minus(x[j], x[i])), unit(minus(x[k], x[i])))

    n, total = len(student), 0.0
    for i in range(n):
        for j in range(n):
            for k in range(n):
                total += smooth_l1(cosines(student, i, j, k) - cosines(teacher, i, j, k))
    return total / n**3


def slow_pkt(student, teacher):
    def likeness(x):
        x = [[value / (math.sqrt(dot(row, row)) + 1e-7) for value in row] for row in x]
        rows = [[(dot(a, b) + 1) / 2 for b in x] for a in x]
        return [[value / sum(row) for value in row] for row in rows]

    s, t = likeness(student), likeness(teacher)
    n = len(student)
    return sum(t[i][j] * math.log((t[i][j] + 1e-7) / (s[i][j] + 1e-7)) for i in range(n) for j in range(n)) / n**2


SLOW = [
    (similarity_preserving, slow_similarity),
    (rkd_distance, slow_distance),
    (rkd_angle, slow_angle),
    (rkd, lambda student, teacher: 25 * slow_distance(student, teacher) + 50 * slow_angle(student, teacher)),
    (pkt, slow_pkt),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("fast", "slow"), SLOW)
def test_against_loops(fast, slow, dtype):
    student, teacher = draw(dtype=dtype)
    loss = fast(student, teacher)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(slow(student.tolist(), teacher.tolist()), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_squared_distances_against_loops(dtype):
    student, teacher = draw(dtype=dtype)
    expected = slow_distance(student.tolist(), teacher.tolist(), squared=True)
    assert rkd_distance(student, teacher, squared=True).item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (features.requires_grad_() for features in draw())
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_rotation_and_scale_change_nothing(loss):
    student, teacher = draw()
    expected = loss(student, teacher)
    torch.testing.assert_close(
        loss(0.3 * student @ rotation(4), 7 * teacher @ rotation(6)), expected, rtol=1e-5, atol=0
    )
    wider = torch.cat([student, torch.zeros(5, 3, dtype=torch.float64)], dim=1)
    assert loss(student, wider).item() == pytest.approx(0, abs=1e-10)
    assert expected > 1e-4


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_ignores_shifts(loss):
    student, teacher = draw()
    torch.testing.assert_close(loss(student + 10, teacher - 10), loss(student, teacher))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_samples_changes_nothing(loss):
    student, teacher = draw()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    assert not torch.isclose(loss(student[order], teacher), loss(student, teacher))


def test_the_distance_term_differentiates_its_mean():
    """The loss does not change with the student's scale, so its gradient is orthogonal to the student."""
    student, teacher = draw()
    slope = gradient(rkd_distance, student, teacher)
    assert (slope * student).sum().abs() < 1e-12 * slope.norm() * 1e3
    assert slope.norm() > 1e-3


def test_rkd_weights_its_two_terms():
    student, teacher = draw()
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    torch.testing.assert_close(rkd(student, teacher), 25 * distance + 50 * angle)
    torch.testing.assert_close(rkd(student, teacher, distance_weight=2.0, angle_weight=0.0), 2 * distance)
    torch.testing.assert_close(rkd(student, teacher, distance_weight=0.0, angle_weight=3.0), 3 * angle)
    nothing = gradient(rkd, student, teacher, distance_weight=0.0, angle_weight=0.0)
    assert torch.equal(nothing, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_samples_that_coincide_have_finite_gradients(squared, dtype):
    student, teacher = draw(dtype=dtype)
    student[1] = student[0]
    for loss in (rkd_angle, lambda s, t: rkd_distance(s, t, squared=squared)):
        assert torch.isfinite(gradient(loss, student, teacher)).all()
    collapsed = torch.zeros_like(student)
    for loss in (*LOSSES, lambda s, t: rkd_distance(s, t, squared=squared)):
        assert torch.isfinite(gradient(loss, collapsed, teacher)).all()
        assert torch.isfinite(loss(collapsed, teacher))


def test_close_samples_keep_their_distances_far_from_the_origin():
    student = torch.tensor([[1000.0, 0.0], [1000.125, 0.0], [1000.0, 0.25]])
    shifted = student - torch.tensor([1000.0, 0.0])
    torch.testing.assert_close(rkd_distance(student, shifted), torch.tensor(0.0), rtol=0, atol=1e-10)


def test_similarity_of_maps_of_different_shapes():
    student, teacher = torch.randn(4, 6, 8, 8), torch.randn(4, 10)
    flat = similarity_preserving(student.flatten(1), teacher)
    assert torch.equal(similarity_preserving(student, teacher), flat)


def test_similarity_compares_rows_of_unit_length():
    """Each row of a side's Gram matrix is normalised alone, so a row's error is at most 2."""
    student, teacher = draw()
    assert similarity_preserving(student * torch.tensor([[1.0], [9], [1], [1], [1]]), teacher) <= 4 / 5


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unhooked")
def test_impossible_arguments_are_refused():
    for loss in LOSSES:
        with pytest.raises(ValueError, match="one batch"):
            loss(torch.zeros(2, 3), torch.zeros(3, 3))
    for loss in (rkd_distance, rkd):
        with pytest.raises(ValueError, match="larger batch"):
            loss(torch.zeros(1, 3), torch.zeros(1, 3))
