"""The methods that match next-token distributions on given text: kl, reverse-kl, jsd, skew-kl, and what they share."""

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import OptimizerSpec
from limbeck.objectives.divergences import divergence
from limbeck.objectives.fused_head import DenseTeacher, TopKTeacher
from limbeck.objectives.topk import topk_divergence
from tests.methods.language.rig import (
    Headless,
    batch,
    both,
    build,
    check_gradients,
    gpt2,
    llama,
    logits,
    targets,
    trainer,
    update_of,
    weights,
)

CASES = [
    ("kl", {}, "forward-kl", {}),
    ("reverse-kl", {}, "reverse-kl", {}),
    ("jsd", {"beta": 0.1}, "jsd", {"beta": 0.1}),
    ("skew-kl", {}, "skew-kl", {"alpha": 0.1}),
    ("skew-kl", {"direction": "reverse", "alpha": 0.3}, "skew-reverse-kl", {"alpha": 0.3}),
]


@pytest.mark.parametrize(("slug", "options", "name", "parameters"), CASES)
@pytest.mark.parametrize("student", [gpt2, llama, lambda: Headless(gpt2())])
def test_the_loss_is_the_mean_over_the_tokens_that_count(slug, options, name, parameters, student):
    method = build(slug, student=student(), temperature=2.0, weight=0.7, label_weight=0.3, **options)
    assert (method.read_student.head_path is None) == isinstance(method.student, Headless)
    ours, theirs = both(method)
    soft = divergence(name, **parameters)(ours, theirs, 2.0).mean()
    hard = F.cross_entropy(ours, targets())
    update = update_of(method)
    torch.testing.assert_close(update.loss, 0.7 * soft + 0.3 * hard)
    torch.testing.assert_close(update.logs["divergence"], soft.detach())
    torch.testing.assert_close(update.logs["cross_entropy"], hard.detach())
    assert not any(value.requires_grad for value in update.logs.values())
    assert update.weight == len(targets())
    expected = torch.autograd.grad(0.7 * soft + 0.3 * hard, list(method.student.parameters()))
    got = torch.autograd.grad(update.loss, list(method.student.parameters()))
    for actual, gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("slug", ["kl", "reverse-kl", "jsd", "skew-kl"])
def test_only_the_student_gets_gradients_and_an_equal_one_has_nothing_to_learn(slug):
    method = build(slug)
    check_gradients(method, update_of(method).loss)
    assert update_of(build(slug, student=llama())).loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_what_has_no_weight_is_neither_computed_nor_logged(label_weight):
    assert set(update_of(build("kl", label_weight=label_weight)).logs) == (
        {"divergence", "cross_entropy"} if label_weight else {"divergence"}
    )
    update = update_of(build("kl", weight=0.0, label_weight=1.0))
    assert set(update.logs) == {"cross_entropy"}
    torch.testing.assert_close(update.loss, F.cross_entropy(logits(gpt2()), targets()))


class MostProbable:
    """A teacher that tells its k most probable tokens."""

    def __init__(self, model, k):
        self.model, self.k = model, k

    def tokens(self, items):
        with torch.no_grad():
            log_probs, ids = logits(self.model, items).log_softmax(-1).topk(self.k)
        return TopKTeacher(ids, log_probs)


@pytest.mark.parametrize(("slug", "options", "name", "parameters"), CASES)
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_topk_teacher_will_do(slug, options, name, parameters, tail):
    teacher = MostProbable(llama(), 6)
    method = build(slug, teacher=teacher, tail=tail, **options)
    known = teacher.tokens(batch())
    expected = topk_divergence(name, tail, **parameters)(logits(method.student), known.ids, known.log_probs).mean()
    torch.testing.assert_close(update_of(method).loss, expected)


@pytest.mark.parametrize(
    ("slug", "options", "name", "parameters"),
    [
        ("gkd", {"lam": 0.0, "beta": 0.3}, "jsd", {"beta": 0.3}),
        ("distillm", {"sampling": "off", "direction": "reverse"}, "skew-reverse-kl", {"alpha": 0.1}),
        ("distillspec", {"data": "fixed", "loss": "total-variation"}, "total-variation", {}),
    ],
)
def test_on_policy_methods_too_can_learn_from_a_topk_teacher(slug, options, name, parameters):
    teacher = MostProbable(llama(), 6)
    method = build(slug, teacher=teacher, max_new_tokens=4, **options)
    known = teacher.tokens(batch())
    expected = topk_divergence(name, **parameters)(logits(method.student), known.ids, known.log_probs).mean()
    torch.testing.assert_close(update_of(method).loss, expected)


def test_taid_needs_the_whole_distribution():
    with pytest.raises(IncompatibleError, match="'taid' needs the teacher's whole distribution"):
        update_of(build("taid", teacher=MostProbable(llama(), 6)))


@pytest.mark.parametrize(
    ("slug", "options"), [("jsd", {"beta": 1.0, "tail": "zero"}), ("reverse-kl", {"tail": "zero"}),
                          ("skew-kl", {"direction": "reverse", "alpha": 0.0, "tail": "zero"})]
)  # fmt: skip
def test_an_infinite_divergence_is_refused(slug, options):
    with pytest.raises(ValueError, match=r"tail|bucket"):
        build(slug, **options)


def test_a_padded_vocabulary_adds_tokens_of_no_probability():
    method = build("kl", teacher=llama(vocab_size=44))
    ours, theirs = both(method)
    torch.testing.assert_close(update_of(method).loss, divergence("forward-kl")(ours, theirs).mean())


def test_a_batch_without_targets_adds_nothing():
    items = batch()
    empty = items.replace(labels=torch.full_like(items.labels, -100))
    update = update_of(build("jsd", label_weight=1.0), empty)
    assert update.loss.item() == 0
    assert update.weight == 0
    update.loss.backward()


@pytest.mark.parametrize("slug", ["kl", "jsd", "taid"])
def test_uneven_lengths_under_accumulation_are_the_large_batch(slug):
    moved = []
    for accumulate in (1, 2, 8):
        method = build(slug, student=gpt2().double(), teacher=llama().double(), label_weight=0.5).double()
        before = weights(method.student)
        run = trainer(method, accumulate=accumulate, optimizer=OptimizerSpec(name="sgd", lr=0.1, schedule="constant"))
        counts = [len(targets(part)) for part in next(iter(run.loader.steps(0, 1)))]
        assert accumulate == 1 or len(set(counts)) > 1
        run.fit()
        moved.append(weights(method.student) - before)
    for other in moved[1:]:
        assert (other - moved[0]).norm() <= 1e-7 * moved[0].norm()


def test_dense_teachers_are_taken_as_they_are():
    class Dense:
        def tokens(self, items):
            with torch.no_grad():
                return DenseTeacher(logits(llama(), items))

    torch.testing.assert_close(update_of(build("kl", teacher=Dense())).loss, update_of(build("kl")).loss)
