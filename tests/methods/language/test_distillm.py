import pytest
import torch
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.objectives.divergences import divergence
from tests.methods.language.rig import batch, both, build, check_gradients, gpt2, llama, logits, targets, update_of

SHORT = {"max_new_tokens": 5, "prompt_tokens": 2, "capacity": 12}


@pytest.mark.parametrize(("direction", "name"), [("forward", "skew-kl"), ("reverse", "skew-reverse-kl")])
def test_the_loss_on_given_text(direction, name):
    method = build("distillm", sampling="off", direction=direction, alpha=0.2, kd_ratio=0.7, **SHORT)
    ours, theirs = both(method)
    soft, hard = divergence(name, alpha=0.2)(ours, theirs).mean(), F.cross_entropy(ours, targets())
    update = update_of(method)
    torch.testing.assert_close(update.loss, 0.7 * soft + 0.3 * hard)
    check_gradients(method, update.loss)


def test_a_pretraining_text_adds_its_cross_entropy():
    extra = batch(3).select(torch.tensor([2, 0, 1]))
    items = batch(3).replace(
        **{f"pretraining_{name}": extra[name] for name in ("input_ids", "attention_mask", "labels")}
    )
    method = build("distillm", sampling="off", lm_weight=0.5, **SHORT)
    plain, more = update_of(method, batch(3)), update_of(method, items)
    torch.testing.assert_close(more.loss - plain.loss, 0.5 * F.cross_entropy(logits(gpt2(), extra), targets(extra)))
    torch.testing.assert_close(
        update_of(build("distillm", sampling="off", lm_weight=0, **SHORT), items).loss, plain.loss
    )


def test_new_texts_are_kept_and_the_mixed_kind_learns_from_kept_ones():
    method = build("distillm", threshold=1.0, held_out=0, replay_ratio="increasing", **SHORT)
    for seed in range(4):
        update = update_of(method, seed=seed)
        assert update.weight > 0
    assert method.sampler.buffer.full
    fresh = build("distillm", sampling="on-policy", mixed_alpha=1.0, **SHORT)
    assert fresh.sampler.buffer is None
    assert update_of(fresh).loss.item() != update_of(fresh, seed=8).loss.item()
    mixed = build("distillm", sampling="mixed", mixed_alpha=1.0, **SHORT)
    first = update_of(mixed)
    assert first.weight == mixed.sampler.buffer.spans.diff(dim=1).sum()
    update_of(mixed, seed=8)
    assert len(mixed.sampler.buffer) == 10


def held(method, items=None):
    return method.hold_out(items or batch(10))


def test_held_out_items_are_measured_and_not_trained_on():
    method = build("distillm", held_out=0.25, **SHORT)
    kept = held(method)
    assert kept["index"].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    aside = batch(10).select(torch.tensor([3, 7]))
    total, tokens = method.held_out_loss.tolist()
    assert tokens == len(targets(aside))
    expected = F.cross_entropy(logits(method.student, aside), targets(aside), reduction="sum")
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert method.student.training
    update = update_of(method, batch(10))
    torch.testing.assert_close(update.loss, divergence("skew-kl")(*both(method, kept)).mean())


def test_the_threshold_rises_once_a_period_when_the_loss_has_risen():
    method = build("distillm", held_out=0.25, validate_every=0.5, **SHORT)
    seen = []
    for step, factor in enumerate((1, 1, 1, 3, 3, 9, 9)):
        with torch.no_grad():  # a student that gets worse and worse
            method.student.transformer.ln_f.weight.fill_(float(factor))
        method.clock = Clock(step, 20, step * 0.25)
        held(method)
        seen.append(round(float(method.adaptive.threshold), 2))
    # Looks at steps 2, 4 and 6: the first is remembered, the others are worse.
    assert seen == [0, 0, 0, 0, 0.1, 0.1, 0.2]
    assert method.validations == 3


def test_a_micro_batch_that_is_held_out_altogether_adds_nothing():
    method = build("distillm", held_out=0.25, threshold=1.0, **SHORT)
    update = update_of(method, batch(4).select(torch.tensor([3])))
    assert update.weight == 0
    assert update.loss.item() == 0
    update.loss.backward()
    assert len(method.sampler.buffer) == 0


def test_nothing_is_held_out_where_nothing_depends_on_it():
    assert build("distillm", sampling="mixed", **SHORT).every == 0
    bare = Batch({name: batch(2)[name] for name in ("input_ids", "attention_mask", "labels")})
    info = build("kl").data
    info = type(info)(info.items, 0, bare)
    build("distillm", sampling="mixed", info=info, **SHORT)
    with pytest.raises(IncompatibleError, match="set held_out: 0"):
        build("distillm", info=info, **SHORT)
    build("distillm", info=info, held_out=0, **SHORT)


def test_an_equal_student_has_nothing_to_learn():
    assert update_of(build("distillm", student=llama(), sampling="off", **SHORT)).loss.item() == pytest.approx(
        0, abs=1e-6
    )
