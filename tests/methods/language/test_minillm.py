import itertools

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.randomness import reseed
from limbeck.core.specs import OptimizerSpec
from limbeck.language.generation import prompts_of
from limbeck.language.mixed import generate_mixed
from limbeck.language.rollout import by_item, filled_places
from limbeck.objectives.divergences import divergence
from limbeck.objectives.sequence import (
    advantages,
    importance_weights,
    mixed_log_probs,
    ppo_surrogate,
    reverse_kl_k3,
    token_log_probs,
    token_rewards,
    whiten,
)
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

SHORT = {"max_new_tokens": 5, "prompt_tokens": 2, "ppo_epochs": 1}


def rollout_of(method, alpha, items=None, seed=7):
    reseed(seed)
    prompts = prompts_of(items or batch(), 2)
    return generate_mixed(method.student, method.teacher.model, prompts, share=alpha, max_new_tokens=5)


@pytest.mark.parametrize("teacher", [llama, lambda: llama(vocab_size=44)])
@pytest.mark.parametrize("single", [True, False])
def test_the_first_update_is_the_papers(single, teacher):
    method = build("minillm", single_step=single, alpha=0.3, gamma=0.9, teacher=teacher(), **SHORT)
    text = rollout_of(method, 0.3)
    filled, tokens = filled_places(text), targets(text)
    ours, theirs = both(method, text)
    log_q, log_p = token_log_probs(ours, tokens), token_log_probs(theirs, tokens)
    spoken = mixed_log_probs(ours, theirs[:, :40], 0.3).gather(1, tokens[:, None]).squeeze(1)
    rewards = by_item(token_rewards(log_p, log_q), filled)
    values = whiten(advantages(rewards, filled, gamma=0.9, include_current=not single), filled)[filled]
    surrogate = ppo_surrogate(log_q, log_q.detach(), values, importance_weights(log_q, spoken))
    extra = divergence("reverse-kl")(ours, theirs) if single else 0
    expected = (surrogate + extra).mean()
    update = update_of(method)
    torch.testing.assert_close(update.loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update.logs["reverse_kl"], reverse_kl_k3(log_p - log_q).mean().detach())
    assert update.weight == len(tokens)
    parameters = list(method.student.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for gradient, other in zip(torch.autograd.grad(update.loss, parameters), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    check_gradients(method, update_of(method).loss)


def test_quirks_of_the_official_code_and_of_trl():
    log_p, log_q = torch.randn(7), torch.randn(7)
    filled = torch.tensor([[True] * 4, [True] * 3 + [False]])
    rewards = by_item(token_rewards(log_p, log_q, scale=0.5, limit=100.0), filled)
    official = build("minillm", compat="official", **SHORT).returns(log_p, log_q, filled)
    torch.testing.assert_close(official, whiten(advantages(rewards, filled), None)[filled])
    rewards = by_item(token_rewards(log_p, log_q, limit=0.5), filled)
    trl = build("minillm", compat="trl", whiten=False, reward_limit=0.5, **SHORT).returns(log_p, log_q, filled)
    torch.testing.assert_close(trl, advantages(rewards, filled, include_current=False, compat="trl")[filled])
    plain = build("minillm", whiten=False, normalise_length=False, single_step=False, gamma=1.0, **SHORT)
    whole = by_item(token_rewards(log_p, log_q), filled).sum(1)
    torch.testing.assert_close(plain.returns(log_p, log_q, filled)[[0, 4]], whole)


def test_a_rollout_is_learnt_from_several_times_in_parts():
    method = build("minillm", max_new_tokens=5, prompt_tokens=2, ppo_epochs=3, minibatches=2)
    before = weights(method.student)
    reseed(3)
    updates = []
    for update in method.step(batch(6)):
        updates.append(update)
        (gradient,) = torch.autograd.grad(update.loss, [method.student.transformer.ln_f.weight])
        with torch.no_grad():
            method.student.transformer.ln_f.weight -= 0.1 * gradient
    assert len(updates) == 6
    assert len({float(update.logs["reverse_kl"]) for update in updates}) == 1  # one rollout
    per_epoch = [sum(update.weight for update in updates[first : first + 2]) for first in (0, 2, 4)]
    assert len(set(per_epoch)) == 1
    assert not torch.equal(weights(method.student), before)


def test_more_parts_than_items_still_take_their_turns():
    method = build("minillm", **{**SHORT, "minibatches": 4})
    trainer(method, steps=2, batch_size=8, accumulate=4).fit()  # two items a micro-batch
    assert weights(method.student).isfinite().all()


def test_a_pretraining_text_adds_its_two_terms():
    extra = batch(5).select(torch.tensor([2, 0, 1, 4, 3]))
    names = ("input_ids", "attention_mask", "labels")
    items = batch(5).replace(**{f"pretraining_{name}": extra[name] for name in names})
    method = build("minillm", lm_weight=0.5, kd_ratio=0.3, **SHORT)
    plain, more = update_of(method), update_of(method, items)
    ours, theirs = both(method, extra)
    added = 0.7 * F.cross_entropy(ours, targets(extra)) + 0.3 * divergence("forward-kl")(ours, theirs).mean()
    torch.testing.assert_close(more.loss - plain.loss, 0.5 * added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(more.logs["pretraining"], added.detach())


def test_a_student_without_a_head_cannot_write():
    with pytest.raises(IncompatibleError, match="keeps no key-value cache"):
        update_of(build("minillm", student=Headless(gpt2()), **SHORT))


def toy():
    """Two tokens, texts of two tokens after a prompt of one."""
    shape = {"vocab_size": 2, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    student, teacher = gpt2(**shape), llama(**{**shape, "hidden_size": 8, "num_hidden_layers": 1})
    with torch.no_grad():
        student.lm_head.weight.mul_(0.3)
    items = Batch({"input_ids": torch.zeros(2, 3).long(), "labels": torch.tensor([[-100, 0, 0]] * 2)})
    return student, teacher, items, DataInfo(2, 0, items)


def sequence_kl(student, teacher):
    """KL(q‖p) over all four texts."""
    texts = torch.tensor([[0, *text] for text in itertools.product((0, 1), repeat=2)])

    def log_probs(model):
        scores = model(input_ids=texts).logits[:, :-1]
        return token_log_probs(scores, texts[:, 1:]).sum(1)

    log_q, log_p = log_probs(student), log_probs(teacher).detach()
    return (log_q.exp() * (log_q - log_p)).sum()


@pytest.mark.parametrize("single", [True, False])
def test_the_mean_gradient_of_many_rollouts_is_the_enumerated_one(single):
    student, teacher, items, info = toy()
    parameters = list(student.parameters())
    exact = torch.autograd.grad(sequence_kl(student, teacher), parameters)
    options = {"gamma": 1.0, "normalise_length": False, "whiten": False, "alpha": 0.0, "single_step": single}
    method = build("minillm", student=student, teacher=teacher, info=info, max_new_tokens=2, prompt_tokens=1,
                   ppo_epochs=1, **options)  # fmt: skip
    many = items.select(torch.zeros(20_000).long())
    update = update_of(method, many)
    assert update.weight == 40_000
    sampled = torch.autograd.grad(2 * update.loss, parameters)  # the mean over tokens, and a text has two
    flat, wanted = (torch.cat([gradient.flatten() for gradient in side]) for side in (sampled, exact))
    assert wanted.norm() > 0.01
    assert (flat - wanted).norm() < 0.05 * wanted.norm()


def test_training_brings_the_student_closer():
    method = build("minillm", max_new_tokens=6, prompt_tokens=2, student=gpt2(n_embd=32), ppo_epochs=2)
    rows = []
    trainer(method, steps=25, rows=rows, optimizer=OptimizerSpec(lr=0.01)).fit()
    first, last = (sum(row["student/surrogate"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.7 * first
    assert logits(method.student).isfinite().all()
