"""The trainer: the mean it promises, the order of play, averages, schedules, and what reaches whom."""

import copy

import pytest
import torch

from limbeck.core.checkpoint import Checkpoints
from limbeck.core.errors import IncompatibleError, RecipeError
from limbeck.core.method import Update
from limbeck.core.specs import OptimizerSpec
from tests.core.toys import Game, MaskedRegression, ToyLoader, build, student, weights

SGD = OptimizerSpec(name="sgd", lr=0.05, momentum=0.9, schedule="constant")


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("method", [MaskedRegression, Game])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_does_not_change_the_training(method, accumulate):
    # The micro-batches hold unequal numbers of valid entries, so a mean of means would fail here.
    whole, parts = build(method, optimizer=SGD), build(method, accumulate=accumulate, optimizer=SGD)
    before = weights(whole.method)
    whole.fit(), parts.fit()
    assert relative(weights(parts.method), weights(whole.method)) < 1e-12
    assert relative(weights(whole.method), before) > 1e-3


def test_a_step_follows_the_gradient_of_the_mean_over_valid_items():
    trainer = build(optimizer=OptimizerSpec(name="sgd", lr=1.0, momentum=0, schedule="constant"), steps=1, accumulate=4)
    by_hand = student()
    (batch,) = next(ToyLoader(8).steps(0, 1))
    ((by_hand(batch.image) - batch.target)[batch.valid] ** 2).mean().backward()
    trainer.fit()
    for ours, theirs in zip(trainer.method.student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)


def test_players_move_in_the_order_of_the_yields_and_see_new_weights():
    trainer = build(Game, optimizer=SGD, steps=1, accumulate=2)
    trainer.fit()
    players = [player for player, _ in trainer.method.seen]
    losses = [loss for _, loss in trainer.method.seen]
    assert players == ["critic", "critic", "student"]
    assert losses[1] < losses[0]  # the critic's second turn starts from its first


def test_an_update_moves_its_player_alone():
    trainer = build(Game, optimizer=SGD, steps=1, players={"critic": OptimizerSpec(name="sgd", lr=1e-9)})
    critic = weights(trainer.method.critic)
    own = weights(trainer.method.student)
    trainer.fit()
    assert relative(weights(trainer.method.critic), critic) < 1e-6
    assert relative(weights(trainer.method.student), own) > 1e-3


def test_logs_are_means_over_items_whatever_the_micro_batches():
    rows, parted = [], []
    build(rows=rows, log_every=3).fit()
    build(rows=parted, log_every=3, accumulate=4).fit()
    for one, other in zip(rows, parted, strict=True):
        for name in ("student/loss", "student/absolute", "student/gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert [row["step"] for row in rows] == [3, 6]


def test_the_average_of_weights_is_what_is_taken_home():
    trainer = build(optimizer=SGD, ema=0.5, steps=3)
    history = [weights(trainer.method.student)]
    update = trainer.average.update
    trainer.average.update = lambda: (history.append(weights(trainer.method.student)), update())
    result = trainer.fit()
    expected = history[0]
    for current in history[1:]:
        expected = 0.5 * expected + 0.5 * current
    torch.testing.assert_close(weights(result), expected, rtol=1e-6, atol=1e-7)


class Masked(MaskedRegression):
    """Keeps the first weights at zero, and gives home a copy that is twice the student."""

    def after_update(self, player, logs):
        with torch.no_grad():
            next(self.student.parameters()).zero_()

    def averaged(self):
        return self.student

    def result(self):
        made = copy.deepcopy(self.student)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.mul_(2)
        return made


def test_an_average_sees_what_a_method_does_after_an_update_and_a_result_is_made_of_it():
    rows, measured = [], []
    trainer = build(Masked, optimizer=SGD, ema=0.5, steps=3, rows=rows, evaluate_every=1)
    with torch.no_grad():
        trainer.method.after_update("student", {})
    trainer.average = type(trainer.average)(trainer.method.averaged(), 0.5)
    trainer.evaluate = lambda model: measured.append(weights(model)) or {"accuracy": 0.0}
    result = trainer.fit()
    assert not next(result.parameters()).any()  # though every step moved them before they were masked
    assert weights(result).any()
    torch.testing.assert_close(weights(result), 2 * weights(trainer.method.student))  # which the average was put into
    torch.testing.assert_close(weights(result), measured[-1])


def test_clipping_bounds_the_step_and_logs_the_norm_before_it():
    rows = []
    plain = OptimizerSpec(name="sgd", lr=1.0, momentum=0, schedule="constant")
    trainer = build(rows=rows, optimizer=plain, steps=1, clip_norm=1e-3)
    before = weights(trainer.method.student)
    trainer.fit()
    assert float((weights(trainer.method.student) - before).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert rows[0]["student/gradient_norm"] > 0.01


@pytest.mark.parametrize(
    ("spec", "step", "expected"),
    [
        (OptimizerSpec(lr=1.0, schedule="constant", warmup=4), 0, 0.25),
        (OptimizerSpec(lr=1.0, schedule="constant", warmup=4), 4, 1.0),
        (OptimizerSpec(lr=1.0, schedule="cosine"), 5, 0.5),
        (OptimizerSpec(lr=2.0, schedule="cosine", final=0.5), 10, 1.0),
        (OptimizerSpec(lr=1.0, schedule="linear", warmup=2), 6, 0.5),
        (OptimizerSpec(lr=1.0, schedule="step", milestones=[0.5, 0.8], gamma=0.1), 4, 1.0),
        (OptimizerSpec(lr=1.0, schedule="step", milestones=[0.5, 0.8], gamma=0.1), 8, 0.01),
    ],
)
def test_schedules_are_functions_of_the_step(spec, step, expected):
    from limbeck.core.optim import learning_rate

    assert learning_rate(spec, step, 10) == pytest.approx(expected)


def test_weight_decay_can_leave_norms_and_biases_alone():
    from limbeck.core.optim import build_optimizer

    optimizer = build_optimizer("student", student(), OptimizerSpec(weight_decay=0.1, decay_norms=False))
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {2: 0.1, 1: 0.0}


def test_bfloat16_autocast_trains_float32_weights():
    trainer = build(precision="bfloat16", steps=2)
    trainer.method.float()
    trainer.loader.tensors = tuple(t.float() if t.is_floating_point() else t for t in trainer.loader.tensors)
    seen = []
    trainer.method.student[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.method.parameters()} == {torch.float32}


class Stranger(MaskedRegression):
    def step(self, batch):
        yield Update("nobody", self.student(batch["image"]).mean())


class Undecided(Game):
    def step(self, batch):
        name = "student" if int(batch["index"][0]) % 2 else "critic"
        yield Update(name, self.critic(self.student(batch["image"])).mean())


def test_an_unknown_player_is_named_with_the_known_ones():
    with pytest.raises(IncompatibleError, match=r"'nobody'[\s\S]*student"):
        build(Stranger).fit()
    with pytest.raises(RecipeError, match=r"train.players.critc[\s\S]*critic"):
        build(Game, players={"critc": OptimizerSpec()})


def test_micro_batches_must_agree_on_whose_turn_it_is():
    with pytest.raises(IncompatibleError, match="disagree"):
        build(Undecided, accumulate=8, steps=6).fit()


def test_a_player_without_parameters_is_refused():
    trainer_of = lambda: build(MaskedRegression)  # noqa: E731
    frozen = trainer_of().method
    frozen.student.requires_grad_(False)
    from limbeck.core.player import Player

    with pytest.raises(IncompatibleError, match="no trainable parameter"):
        Player("student", frozen.student, OptimizerSpec())


def test_evaluation_joins_the_rows_and_leaves_training_alone():
    plain, measured, rows = build(steps=4), build(steps=4, evaluate_every=2, rows=(rows := [])), rows
    modes = []
    measured.evaluate = lambda model: modes.append(model.training) or {"accuracy": float(torch.rand(()))}
    measured.spec = measured.spec.model_copy(update={"log_every": 1})
    plain.fit(), measured.fit()
    torch.testing.assert_close(weights(plain.method), weights(measured.method), rtol=0, atol=0)
    assert [("validation/accuracy" in row) for row in rows] == [False, True, False, True]
    assert modes == [False, False]


def test_resuming_continues_exactly(tmp_path):
    def trainer(steps_done: int | None, rows: list):
        return build(Game, steps=8, ema=0.9, log_every=3, checkpoint_every=4, rows=rows,
                     checkpoints=Checkpoints(tmp_path / str(steps_done)))  # fmt: skip

    straight_rows, first_rows, second_rows = [], [], []
    straight = trainer(None, straight_rows)
    straight.fit()
    first = trainer(4, first_rows)
    first.steps = 8
    original = first._pause
    first._pause = lambda: (_ for _ in ()).throw(KeyboardInterrupt) if first.step == 5 else original()
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(4, second_rows)
    second.fit()
    assert torch.equal(weights(second.method), weights(straight.method))
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert timeless(second_rows) == timeless([row for row in straight_rows if row["step"] > 4])


def test_gradients_are_gone_after_a_step():
    trainer = build(Game, steps=1)
    trainer.fit()
    assert all(parameter.grad is None for parameter in trainer.method.parameters())
