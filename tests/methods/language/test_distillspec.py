import pytest
import torch

from limbeck.core.specs import OptimizerSpec
from limbeck.language.generation import generate, prompts_of
from limbeck.objectives.divergences import divergence
from tests.methods.language.rig import ITEMS, batch, both, build, check_gradients, llama, source, trainer, update_of

SHORT = {"max_new_tokens": 5, "prompt_tokens": 2}


@pytest.mark.parametrize("loss", ["forward-kl", "jsd", "reverse-kl", "total-variation"])
def test_the_loss_on_the_datas_responses(loss):
    method = build("distillspec", data="fixed", loss=loss, temperature=1.3, **SHORT)
    update = update_of(method)
    torch.testing.assert_close(update.loss, divergence(loss)(*both(method), 1.3).mean())
    assert set(update.logs) == {"divergence"}  # no cross-entropy
    check_gradients(method, update.loss)
    same = build("distillspec", student=llama(), data="fixed", loss=loss, **SHORT)
    assert update_of(same).loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("data", ["draft", "target"])
def test_whose_responses(data):
    method = build("distillspec", data=data, sampling_temperature=0, **SHORT)
    writer = method.student if data == "draft" else method.teacher.model
    written = generate(writer, prompts_of(batch(), 2), max_new_tokens=5, temperature=0)
    torch.testing.assert_close(update_of(method).loss, divergence("forward-kl")(*both(method, written)).mean())


def test_the_targets_responses_are_written_once():
    method = build("distillspec", data="target", **SHORT)
    losses = [update_of(method, seed=seed).loss.item() for seed in (1, 2)]
    assert losses[0] == losses[1]
    assert (method.target_texts.responses.lengths > 0).sum() == 5
    assert build("distillspec", data="draft", **SHORT).target_texts is None


def test_a_mixture_has_both():
    method = build("distillspec", data="mixed", draft_share=0.5, **SHORT)
    on_data = divergence("forward-kl")(*both(method)).mean().item()
    losses = [update_of(method, seed=seed).loss.item() for seed in range(12)]
    of_data = sum(loss == pytest.approx(on_data) for loss in losses)
    assert 2 <= of_data <= 10


def rejection(method):
    """Total variation at the target's own responses."""
    prompts = prompts_of(source().fetch(torch.arange(ITEMS)), 2)
    torch.manual_seed(0)
    written = generate(method.teacher.model, prompts, max_new_tokens=5)
    with torch.no_grad():
        return divergence("total-variation")(*both(method, written)).mean().item()


@pytest.mark.parametrize("loss", ["forward-kl", "total-variation"])
def test_a_few_steps_make_the_target_accept_more(loss):
    method = build("distillspec", loss=loss, **SHORT)
    before = rejection(method)
    trainer(method, steps=40, optimizer=OptimizerSpec(lr=0.01)).fit()
    assert rejection(method) < before - 0.1
