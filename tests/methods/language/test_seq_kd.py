import pytest
import torch
from torch.nn import functional as F

from limbeck.core.checkpoint import Checkpoints
from limbeck.language.generation import generate, prompts_of
from tests.methods.language.rig import (
    Headless,
    batch,
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

SHORT = {"max_new_tokens": 5, "prompt_tokens": 2}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("student", [gpt2, lambda: Headless(gpt2())])
def test_the_targets_are_what_the_teacher_decodes(beams, student):
    method = build("seq-kd", student=student(), beams=beams, **SHORT)
    decoded = generate(llama(), prompts_of(batch(), 2), max_new_tokens=5, temperature=0, num_beams=beams)
    update = update_of(method)
    torch.testing.assert_close(update.loss, F.cross_entropy(logits(method.student, decoded), targets(decoded)))
    assert update.weight == decoded.response_length.sum()


def test_gradients_reach_the_student_alone():
    method = build("seq-kd", beams=1, **SHORT)
    check_gradients(method, update_of(method).loss)


def test_a_drawn_response_stays_the_items_own():
    method = build("seq-kd", beams=1, sampling_temperature=1.0, **SHORT)
    losses = [update_of(method, seed=seed).loss.item() for seed in (1, 2)]
    assert losses[0] == losses[1]
    other = build("seq-kd", beams=1, sampling_temperature=1.0, **SHORT)
    assert update_of(other, seed=2).loss.item() != losses[0]


def test_drawn_responses_survive_a_resumption(tmp_path):
    def run(folder, steps):
        method = build("seq-kd", beams=1, sampling_temperature=1.0, **SHORT)
        made = trainer(method, steps=6, checkpoints=Checkpoints(tmp_path / folder))
        made.steps = steps
        made.fit()
        return method

    straight = run("straight", 6)
    run("torn", 4)
    resumed = run("torn", 6)
    assert torch.equal(weights(straight.student), weights(resumed.student))
    assert torch.equal(straight.teacher_texts.responses.tokens, resumed.teacher_texts.responses.tokens)
    assert (straight.teacher_texts.responses.lengths > 0).all()


def test_a_beam_search_does_not_sample():
    with pytest.raises(ValueError, match="a beam search does not sample"):
        build("seq-kd", beams=5, sampling_temperature=1.0)
