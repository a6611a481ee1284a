import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.contrastive import crd, crd_normaliser, crd_scores, moved_entries, nce, update_bank

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}
INDICES = torch.tensor([[0, 4, 5, 6], [1, 7, 8, 4], [2, 5, 5, 9]])


def draw(dtype=torch.float64):
    """Embeddings of both sides (3, 4) and their banks (10, 4)."""
    generator = torch.Generator().manual_seed(6)
    shapes = ((3, 4), (3, 4), (10, 4), (10, 4))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [F.normalize(value, dim=1).to(dtype) for value in values]


def loss_of(student, teacher, student_bank, teacher_bank, z=(12.0, 7.0), **options):
    return crd(
        student,
        teacher,
        student_bank,
        teacher_bank,
        INDICES,
        student_normaliser=torch.tensor(z[0]),
        teacher_normaliser=torch.tensor(z[1]),
        **options,
    )


def slow_side(embedding, bank, z, temperature):
    total, k, n = 0.0, INDICES.shape[1] - 1, len(bank)
    for v, row in zip(embedding.tolist(), INDICES.tolist(), strict=True):
        for column, index in enumerate(row):
            memory = bank[index].tolist()
            p = math.exp(sum(a * b for a, b in zip(v, memory, strict=True)) / temperature) / z
            total -= math.log((p if column == 0 else k / n) / (p + k / n + 1e-7))
    return total / len(embedding)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_crd_against_loops(temperature, dtype):
    student, teacher, student_bank, teacher_bank = draw(dtype)
    loss = loss_of(student, teacher, student_bank, teacher_bank, temperature=temperature)
    expected = slow_side(student, teacher_bank, 12, temperature) + slow_side(teacher, student_bank, 7, temperature)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bank_update_against_loops(dtype):
    student, _, bank, _ = draw(dtype)
    after = update_bank(bank, student, torch.tensor([7, 0, 3]), momentum=0.3).tolist()
    expected = bank.tolist()
    for v, row in zip(student.tolist(), (7, 0, 3), strict=True):
        mixed = [0.3 * m + 0.7 * x for m, x in zip(expected[row], v, strict=True)]
        length = math.sqrt(sum(x * x for x in mixed))
        expected[row] = [x / length for x in mixed]
    for actual, row in zip(after, expected, strict=True):
        assert actual == pytest.approx(row, rel=1e-5)


def test_both_embeddings_but_no_bank_and_no_constant_get_gradients():
    given = [value.requires_grad_() for value in draw()]
    z = [torch.tensor(float(value)) for value in (12, 7)]
    crd(*given, INDICES, student_normaliser=z[0], teacher_normaliser=z[1]).backward()
    assert given[0].grad.abs().sum() > 0
    assert given[1].grad.abs().sum() > 0
    assert given[2].grad is None
    assert given[3].grad is None


def test_each_side_sees_only_its_own_embedding():
    student, teacher, student_bank, teacher_bank = (value.requires_grad_() for value in draw())
    scores = crd_scores(student, teacher_bank, INDICES) / 12.0
    (alone,) = torch.autograd.grad(nce(scores, samples=10), student)
    (total,) = torch.autograd.grad(loss_of(student, teacher, student_bank, teacher_bank), student)
    torch.testing.assert_close(total, alone)


def test_descent_pulls_the_positive_and_pushes_the_negatives():
    embedding = torch.zeros(1, 3, requires_grad=True)
    bank = torch.eye(3)
    scores = crd_scores(embedding, bank, torch.tensor([[0, 1, 2]]), temperature=1.0) / 3
    nce(scores, samples=3).backward()
    assert embedding.grad[0, 0] < 0
    assert (embedding.grad[0, 1:] > 0).all()


def test_normaliser_makes_scores_probabilities_of_the_samples():
    student, _, _, bank = draw()
    scores = crd_scores(student.requires_grad_(), bank, INDICES)
    z = crd_normaliser(scores, samples=10)
    assert not z.requires_grad
    torch.testing.assert_close((scores / z).mean() * 10, torch.tensor(1.0, dtype=torch.float64))


def test_nce_of_indistinguishable_samples():
    """Where every sample has probability 1 / n the loss is the entropy of a coin with odds 1 : K, and K more."""
    n, k = 50, 5
    loss = nce(torch.full((4, k + 1), 1 / n, dtype=torch.float64), samples=n)
    assert loss.item() == pytest.approx(math.log(k + 1) + k * math.log((k + 1) / k), rel=1e-5)


def test_nce_is_least_for_a_sure_positive_and_impossible_negatives():
    scores = torch.tensor([[1e9, 1e-9, 1e-9]], dtype=torch.float64)
    assert nce(scores, samples=4).item() == pytest.approx(0, abs=1e-5)
    assert nce(scores.flip(1), samples=4) > 10


def test_moved_entries_have_unit_length_and_no_gradient():
    student, _, bank, _ = draw()
    moved = moved_entries(bank[:3], student.requires_grad_(), momentum=0.5)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert not moved.requires_grad
    torch.testing.assert_close(moved_entries(bank[:3], student, momentum=1.0), bank[:3])
    torch.testing.assert_close(moved_entries(bank[:3], student, momentum=0.0), student)


def test_update_leaves_the_given_bank_and_all_other_rows():
    student, _, bank, _ = draw()
    before = bank.clone()
    after = update_bank(bank, student, torch.tensor([1, 2, 3], dtype=torch.int32))
    assert torch.equal(bank, before)
    assert torch.equal(after[4:], before[4:])
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:4], moved_entries(bank[1:4], student))


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unhooked")
def test_impossible_arguments_are_refused():
    student, teacher, student_bank, teacher_bank = draw()
    with pytest.raises(ValueError, match="temperature"):
        crd_scores(student, teacher_bank, INDICES, temperature=0.0)
    with pytest.raises(ValueError, match="do not fit"):
        crd_scores(student[:, :3], teacher_bank, INDICES)
    with pytest.raises(ValueError, match="do not fit"):
        crd_scores(student[:2], teacher_bank, INDICES)
    with pytest.raises(ValueError, match="banks"):
        loss_of(student, teacher, student_bank[:9], teacher_bank)
    with pytest.raises(ValueError, match="negative"):
        nce(torch.ones(3, 1), samples=5)
    with pytest.raises(ValueError, match="momentum"):
        moved_entries(student, teacher, momentum=1.5)
