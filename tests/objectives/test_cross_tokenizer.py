import pytest
import torch
from tests.oracles.oracle import load

from limbeck.objectives.cross_tokenizer import (
    align_spans,
    hybrid_distance,
    merge_rows,
    universal_logit_distillation,
    utf8_ends,
)
from limbeck.objectives.divergences import divergence

CASE = load("uld-trl")[0]
STUDENT_SPANS = [(0, 3), (3, 5), (5, 6), (6, 10)]
TEACHER_SPANS = [(0, 1), (1, 3), (3, 6), (6, 8), (8, 10)]


def uld(student, **options):
    rest = [CASE.tensors[name] for name in ("teacher_logits", "student_labels", "teacher_labels")]
    return universal_logit_distillation(student, *rest, **options).mean()


@pytest.mark.parametrize(
    ("key", "options"),
    [("uld_T1", {"shift": False}), ("uld_T2", {"shift": False, "temperature": 2.0}), ("uld_T1_bayes", {})],
)
def test_trl_uld(key, options):
    student = CASE.tensors["student_logits"].clone().requires_grad_()
    loss = uld(student, **options)
    loss.backward()
    CASE.check(f"loss.{key}", loss)
    CASE.check(f"grad_student.{key}", student.grad, of_largest=True)


@pytest.mark.parametrize("mode", ["observed", "bayesian"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_trl_merging(side, mode):
    spans = {"student": STUDENT_SPANS, "teacher": TEACHER_SPANS}
    groups = align_spans(*([end for _, end in spans[name]] for name in ("student", "teacher")))
    chosen = [group[side == "teacher"] for group in groups]
    ids = CASE.tensors[f"merge_{side[0]}ids"]
    CASE.check(
        f"out.merged_{side}.{mode}", merge_rows(CASE.tensors[f"merge_{side}_probs"], ids, chosen, mode), atol=1e-8
    )


def test_trl_hybrid():
    student = CASE.tensors["hyb_student_probs"].clone().requires_grad_()
    matched = torch.arange(6)
    loss = hybrid_distance(student, CASE.tensors["hyb_teacher_probs"], matched, 13 - matched).mean()
    loss.backward()
    CASE.check("loss.hybrid", loss)
    CASE.check("grad_student_probs.hybrid", student.grad, of_largest=True)


def test_every_recorded_output_is_tested():
    outputs = {
        name for name in CASE.tensors if name.split(".")[0] in ("loss", "out", "grad_student", "grad_student_probs")
    }
    tested = {f"{kind}.{key}" for key in ("uld_T1", "uld_T2", "uld_T1_bayes") for kind in ("loss", "grad_student")}
    tested |= {f"out.merged_{side}.{mode}" for side in ("student", "teacher") for mode in ("observed", "bayesian")}
    assert outputs == tested | {"loss.hybrid", "grad_student_probs.hybrid"}


def example(vocab=(9, 12), length=6):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, length, size, generator=generator) for size in vocab)
    labels = torch.tensor([[-100, -100, 1, 2, 3, -100], [-100, 4, 1, 1, 2, 5]])
    return student, teacher, labels


def test_uld_ignores_the_order_of_either_vocabulary():
    student, teacher, labels = example()
    plain = universal_logit_distillation(student, teacher, labels, labels)
    shuffled = universal_logit_distillation(
        student[..., torch.randperm(9)], teacher[..., torch.randperm(12)], labels, labels
    )
    torch.testing.assert_close(shuffled, plain)


def test_uld_is_zero_at_equality_and_below_twice_the_total_variation():
    student, teacher, labels = example((9, 9))
    assert (universal_logit_distillation(student, student.clone(), labels, labels) == 0).all()
    value = universal_logit_distillation(student, teacher, labels, labels)
    tv = divergence("total-variation")(student, teacher)
    predicts = torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    bound = torch.stack([2 * tv[row][predicts[row]].mean() for row in range(2)])
    assert (value <= bound + 1e-6).all()


def test_uld_uses_only_the_logits_that_predict_the_answer():
    student, teacher, labels = example()
    student.requires_grad_()
    universal_logit_distillation(student, teacher, labels, labels).sum().backward()
    used = student.grad.abs().sum(-1) > 0
    assert used.tolist() == [[False, True, True, True, False, False], [True, True, True, True, True, False]]


def test_uld_edges():
    student, teacher, labels = example()
    nothing = torch.full_like(labels, -100)
    assert (universal_logit_distillation(student, teacher, labels, nothing) == 0).all()
    with pytest.raises(ValueError, match="position 0"):
        universal_logit_distillation(student, teacher, labels.clamp_min(0), labels)


def test_alignment():
    groups = align_spans([3, 5, 6, 10], [1, 3, 6, 8, 10])
    assert groups == [(range(1), range(2)), (range(1, 3), range(2, 3)), (range(3, 4), range(3, 5))]
    assert align_spans([2, 4], [3, 5]) == []
    assert align_spans([2, 4], [2, 3]) == [(range(1), range(1))], "what is left over has no group"
    assert align_spans([0, 2], [2]) == [(range(2), range(1))], "a token of no bytes joins the next group"
    assert align_spans([], [2]) == []


def test_alignment_of_equal_tokenizations_is_the_identity():
    ends = [1, 4, 6, 7]
    assert align_spans(ends, ends) == [(range(i, i + 1), range(i, i + 1)) for i in range(4)]


def test_utf8_ends():
    text = "né€😀x"
    assert utf8_ends(text, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]) == [1, 3, 6, 10, 11]
    assert utf8_ends(text, [(0, 3), (0, 0)]) == [6, 0]


def test_merged_rows():
    probs = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    ids = torch.tensor([0, 1, 0])
    single = merge_rows(probs, ids, [range(i, i + 1) for i in range(3)])
    assert torch.equal(single, probs)
    torch.testing.assert_close(merge_rows(probs, ids, [range(2)]), torch.tensor([[0.1, 0.4]]))
    torch.testing.assert_close(merge_rows(probs, ids, [range(2)], "observed"), torch.tensor([[0.4, 0.4]]))
    assert merge_rows(probs, ids, []).shape == (0, 2)


def test_hybrid_of_one_vocabulary_is_jsd():
    student, teacher = torch.randn(4, 7).softmax(-1), torch.randn(4, 7).softmax(-1)
    ids = torch.arange(7)
    expected = divergence("jsd", beta=0.3)(student.log(), teacher.log())
    torch.testing.assert_close(hybrid_distance(student, teacher, ids, ids, beta=0.3), expected)
    assert hybrid_distance(student, student.clone(), ids, ids).abs().max() < 1e-6


def test_hybrid_with_nothing_shared_is_sorted():
    student, teacher = torch.randn(4, 7).softmax(-1).requires_grad_(), torch.randn(4, 5).softmax(-1)
    none = torch.arange(0)
    value = hybrid_distance(student, teacher, none, none)
    value.sum().backward()
    assert (value > 0).all()
    assert student.grad.isfinite().all()
    with pytest.raises(ValueError, match="shared_weight"):
        hybrid_distance(student, teacher, none, none, shared_weight=1.5)
