import pytest
import torch
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, TextInfo
from limbeck.language.answers import aligned_groups, answers, second_text, shared_vocabulary
from limbeck.models.tokenizers import set_tokenizer
from limbeck.objectives.cross_tokenizer import align_spans, hybrid_distance, merge_rows, universal_logit_distillation
from limbeck.objectives.divergences import sorted_wasserstein
from tests.methods.language.rig import (
    ITEMS,
    Headless,
    batch,
    build,
    check_gradients,
    gpt2,
    llama,
    logits,
    source,
    targets,
    trainer,
    update_of,
)

VARIANTS = ["plain", "aligned-observed", "aligned-bayesian", "hybrid"]


def twice(items: int = 5, same: bool = False) -> Batch:
    """Items with a second text; the student's tokens are two bytes long and the teacher's one."""
    ours = batch(items)
    theirs = ours if same else source(seed=8).fetch(torch.arange(items))
    names = ("input_ids", "attention_mask", "labels")
    width, places = 1 if same else 2, torch.arange(12).expand(items, -1)
    # From the first token of each answer on, so that both begin at the same byte.
    first = [(one.labels != -100).int().argmax(1, keepdim=True) for one in (ours, theirs)]
    ends = {"ends": (places - first[0] + 1) * width, "teacher_ends": places - first[1] + 1}
    return ours.replace(**{f"teacher_{name}": theirs[name] for name in names}, **ends)


class Words:
    """A tokenizer of which the vocabulary alone is known."""

    def __init__(self, words):
        self.words = words

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


OURS = Words([f"w{number}" for number in range(40)])
THEIRS = Words([f"w{number}" for number in range(20, 66)])


def uld(items=None, student=None, teacher=None, **options):
    info = DataInfo(ITEMS, 0, (items or twice()).select(slice(0, 2)), TextInfo(40, OURS))
    teacher = teacher or llama(vocab_size=46)
    set_tokenizer(teacher, THEIRS)
    return build("uld", student=student or gpt2(), teacher=teacher, info=info, **options)


def rows(model, items):
    """Next-token distributions and ids of each answer."""
    found = answers(logits(model, items), items)
    for item in range(items.size):
        scores, ids, ends = found.item(item)
        yield scores, ids, ends


def by_hand(method, items, temperature=1.0):
    """The distance of the plain variant, item by item."""
    distances = []
    pairs = zip(rows(method.student, items), rows(method.teacher.model, second_text(items, "teacher_")), strict=True)
    for (ours, _, _), (theirs, _, _) in pairs:
        length = min(len(ours), len(theirs))
        p, q = (one[:length].div(temperature).softmax(-1).sort(-1, descending=True).values for one in (theirs, ours))
        q = F.pad(q, (0, p.shape[-1] - q.shape[-1]))
        distances.append((p - q).abs().sum() / length)
    return torch.stack(distances).mean()


@pytest.mark.parametrize("student", [gpt2, lambda: Headless(gpt2())])
def test_the_plain_loss(student):
    items, method = twice(), uld(student=student(), temperature=1.5, weight=0.7, label_weight=0.4)
    hard = torch.stack([F.cross_entropy(scores, ids) for scores, ids, _ in rows(method.student, items)]).mean()
    expected = by_hand(method, items, 1.5)
    update = update_of(method, items)
    torch.testing.assert_close(update.loss, 0.7 * expected + 0.4 * hard)
    torch.testing.assert_close(update.logs["distance"], expected)
    torch.testing.assert_close(update.logs["cross_entropy"], hard)
    assert update.weight == 5


def test_it_is_the_objective_with_its_shift():
    items, method = twice(), uld()
    theirs = second_text(items, "teacher_")
    with torch.no_grad():
        ours_logits = method.student(input_ids=items.input_ids, attention_mask=items.attention_mask).logits
        their_logits = method.teacher.model(input_ids=theirs.input_ids, attention_mask=theirs.attention_mask).logits
    expected = universal_logit_distillation(ours_logits, their_logits, items.labels, theirs.labels).mean()
    torch.testing.assert_close(update_of(method, items).logs["distance"].detach(), expected)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_aligned_variants_compare_groups_of_tokens(variant):
    items, method = twice(), uld(variant=variant, beta=0.3)
    mode = "observed" if variant == "aligned-observed" else "bayesian"
    shared = shared_vocabulary(OURS, THEIRS)
    distances, sizes = [], []
    pairs = zip(rows(method.student, items), rows(method.teacher.model, with_ends(items)), strict=True)
    for (ours, our_ids, our_ends), (theirs, their_ids, their_ends) in pairs:
        groups = align_spans(our_ends, their_ends)
        sizes += [(len(mine), len(yours)) for mine, yours in groups]
        q = merge_rows(ours.softmax(-1), our_ids, [mine for mine, _ in groups], mode)
        p = merge_rows(theirs.softmax(-1), their_ids, [yours for _, yours in groups], mode)
        values = hybrid_distance(q, p, *shared, beta=0.3) if variant == "hybrid" else sorted_wasserstein(q, p)
        distances.append(values.sum() / max(1, len(groups)))
    assert set(sizes) == {(1, 2)}  # a token of two bytes, and two of one
    update = update_of(method, items)
    torch.testing.assert_close(update.logs["distance"], torch.stack(distances).mean())


def with_ends(items):
    return second_text(items, "teacher_")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_the_student_alone(variant):
    method = uld(variant=variant)
    check_gradients(method, update_of(method, twice()).loss)


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_equal_models_have_nothing_to_learn(variant):
    items = twice(same=True)
    method = uld(items, student=llama(), teacher=llama(), variant=variant)
    assert update_of(method, items).logs["distance"].item() == pytest.approx(0, abs=1e-6)


def permuted(model, order):
    """The same model after a change of the ids of its vocabulary: token v becomes order[v]."""
    with torch.no_grad():
        for matrix in {id(one.weight): one.weight for one in (model.model.embed_tokens, model.lm_head)}.values():
            matrix[order] = matrix.clone()
    return model


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_another_numbering_of_the_teachers_vocabulary_changes_nothing(variant):
    items, order = twice(), torch.randperm(46, generator=torch.Generator().manual_seed(0))
    labels = items.teacher_labels
    moved = items.replace(
        teacher_input_ids=order[items.teacher_input_ids],
        teacher_labels=torch.where(labels == -100, labels, order[labels.clamp_min(0)]),
    )
    first = update_of(uld(variant=variant), items)
    second = update_of(uld(variant=variant, teacher=permuted(llama(vocab_size=46), order)), moved)
    torch.testing.assert_close(second.loss, first.loss)


def test_an_item_without_an_answer_adds_nothing():
    items = twice()
    blank = items.replace(teacher_labels=torch.full_like(items.teacher_labels, -100))
    assert update_of(uld(), blank).logs["distance"].item() == 0
    nothing = items.replace(labels=torch.full_like(items.labels, -100))
    update = update_of(uld(), nothing)
    assert update.loss.item() == 0
    update.loss.backward()


def test_data_without_what_is_needed_are_refused():
    with pytest.raises(IncompatibleError, match="no 'teacher_input_ids' among"):
        build("uld")
    items = twice()
    endless = Batch({name: items[name] for name in items if not name.endswith("ends")})
    with pytest.raises(IncompatibleError, match="do not say where tokens end"):
        update_of(uld(variant="aligned-bayesian"), endless)
    with pytest.raises(IncompatibleError, match="told by their tokenizers"):
        build("uld", info=DataInfo(ITEMS, 0, items.select(slice(0, 2))), variant="hybrid")


def test_shared_vocabulary():
    ours, theirs = shared_vocabulary(Words(["a", "b", "c", "d"]), Words(["d", "x", "b"]))
    assert ours.tolist() == [1, 3]
    assert theirs.tolist() == [2, 0]
    assert aligned_groups([2, 4], [1, 2, 4]) == ([range(1), range(1, 2)], [range(2), range(2, 3)])


def test_answers_are_arranged_by_item():
    items = batch(4)
    found = answers(logits(gpt2(), items), items)
    assert found.ends is None
    assert torch.equal(found.labels[found.labels != -100], targets(items))
    assert torch.equal(found.logits[found.labels != -100], logits(gpt2(), items))
    assert (found.logits[found.labels == -100] == 0).all()


def test_it_trains_on_plain_text_of_two_tokenisations():
    class Twice(type(source())):
        def fetch(self, indices, seed=None):
            ours = super().fetch(indices)
            names = ("input_ids", "attention_mask", "labels")
            return ours.replace(**{f"teacher_{name}": ours[name] for name in names})

    method, rows_ = uld(), []
    run = trainer(method, steps=3, accumulate=2, rows=rows_)
    run.loader.source.__class__ = Twice
    run.fit()
    assert rows_[-1]["student/distance"] > 0
