import pytest
import torch

from limbeck.core.checkpoint import Checkpoints
from limbeck.core.errors import IncompatibleError
from limbeck.core.randomness import reseed
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.language.generation import generate, prompts_of
from limbeck.objectives.divergences import divergence
from tests.methods.language.rig import (
    Headless,
    batch,
    both,
    build,
    check_gradients,
    gpt2,
    llama,
    trainer,
    update_of,
    weights,
)

SHORT = {"max_new_tokens": 5, "prompt_tokens": 2}


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward-kl"), (1.0, "reverse-kl"), (0.5, "jsd")])
def test_with_lambda_0_it_is_the_divergence_on_the_data(beta, name):
    method = build("gkd", lam=0.0, beta=beta, temperature=2.0, **SHORT)
    expected = divergence(name)(*both(method), 2.0).mean()
    update = update_of(method)
    torch.testing.assert_close(update.loss, expected)
    assert update.loss.item() == update.logs["divergence"].item()


@pytest.mark.parametrize(("lam", "seq_kd"), [(1.0, False), (0.0, True)])
def test_the_student_or_the_teacher_writes(lam, seq_kd):
    method = build("gkd", lam=lam, seq_kd=seq_kd, sampling_temperature=0, **SHORT)
    writer = method.student if lam else method.teacher.model
    written = generate(writer, prompts_of(batch(), 2), max_new_tokens=5, temperature=0)
    update = update_of(method)
    torch.testing.assert_close(update.loss, divergence("jsd")(*both(method, written)).mean())
    assert update.weight == written.response_length.sum()
    check_gradients(method, update.loss)


def test_sampled_text_is_a_function_of_the_streams():
    method = build("gkd", lam=1.0, **SHORT)
    losses = [update_of(method, seed=seed).loss.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    reseed(1)
    again = method.sampler(method.student, method.teacher, batch())
    torch.testing.assert_close(update_of(method, seed=1).loss, divergence("jsd")(*both(method, again)).mean())


def test_only_a_model_that_writes_can_be_on_policy():
    with pytest.raises(IncompatibleError, match="generates no text"):
        update_of(build("gkd", student=Headless(gpt2()), lam=1.0, **SHORT))
    both_teachers = Ensemble([LiveTeacher(llama()), LiveTeacher(llama(seed=4))])
    update_of(build("gkd", teacher=both_teachers, lam=1.0, **SHORT))  # an ensemble may judge
    with pytest.raises(IncompatibleError, match="Ensemble writes no text"):
        update_of(build("gkd", teacher=both_teachers, lam=0.0, seq_kd=True, **SHORT))


@pytest.mark.parametrize("slug", ["gkd", "distillm", "distillspec"])
def test_every_micro_batch_writes_for_itself_and_resuming_is_exact(slug, tmp_path):
    def run(folder, steps):
        own = {"sampling": "mixed", "capacity": 6} if slug == "distillm" else {}
        method = build(slug, **SHORT, **own)
        made = trainer(method, steps=6, accumulate=2, checkpoints=Checkpoints(tmp_path / folder))
        made.steps = steps
        made.fit()
        return method

    straight = run("straight", 6)
    run("torn", 3)
    torch.manual_seed(1)
    resumed = run("torn", 6)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert weights(straight).norm() > 0
