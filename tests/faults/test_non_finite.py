"""NaN and infinity never reach an optimizer, whatever they come from and whatever is done about them."""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import snapshot
from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.distributed import World
from limbeck.core.errors import Interrupted, NonFiniteError
from limbeck.core.finite import FiniteGuard, Place
from limbeck.core.method import Update
from limbeck.core.optim import optimizer_tensors
from limbeck.core.player import Player
from limbeck.core.specs import OptimizerSpec
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.core.trainer import Trainer
from tests.core.toys import FEATURES, ToyLoader, build, problem, student

OPTIMIZERS = {
    "adamw": OptimizerSpec(name="adamw", lr=0.01, weight_decay=0.1),
    "sgd": OptimizerSpec(name="sgd", lr=0.01, momentum=0.9),
    "nesterov": OptimizerSpec(name="sgd", lr=0.01, momentum=0.9, nesterov=True),
}
STEPS, BATCH = 8, 8
SICK_POSITION = 4
"""Which batch of the data holds the sick item, counted from 0."""


def _items(position: int) -> list[int]:
    return next(ToyLoader(BATCH).steps(position, position + 1))[0]["index"].tolist()


SICK_ITEM = next(item for item in _items(SICK_POSITION) if item in _items(10) + _items(11))
"""One that does not come again, in the next pass over the data, before the end."""


class Sick(nn.Module):
    """A network whose output for the sick item is not finite."""

    def __init__(self, value: float = float("nan")) -> None:
        super().__init__()
        self.inner, self.value = student(), value

    def forward(self, image: Tensor) -> Tensor:
        sick = (image == problem()[0][SICK_ITEM]).all(1)
        return torch.where(sick[:, None], self.value, self.inner(image))


class Regression(nn.Module):
    """What is trained here; its batch norm sees every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(FEATURES).double(), student()

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(self.norm(image))


class Fragile(build().method.__class__):
    """Regression on a teacher's output, with a running mean of its loss; breaks where `breaks` says."""

    breaks: Callable[[Tensor, "Fragile", Batch], Tensor] = staticmethod(lambda loss, method, batch: loss)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.student = Regression()
        self.teacher = LiveTeacher(student("linear"))
        self.register_buffer("running", torch.zeros((), dtype=torch.float64))

    def step(self, batch: Batch) -> Iterator[Update]:
        target = self.teacher.signal(batch).logits
        loss = (self.student(batch["image"]) - target).square().mean()
        yield Update("student", self.breaks(loss, self, batch), batch.size)

    def after_update(self, player: str, logs: Any) -> None:
        self.running.lerp_(logs["loss"].double(), 0.1)


def has_sick(batch: Batch) -> bool:
    return bool((batch["index"] == SICK_ITEM).any())


def break_loss(loss: Tensor, method: Fragile, batch: Batch) -> Tensor:
    return loss * float("nan") if has_sick(batch) else loss


def overflow_loss(loss: Tensor, method: Fragile, batch: Batch) -> Tensor:
    return loss + float("inf") if has_sick(batch) else loss


def break_one_gradient(loss: Tensor, method: Fragile, batch: Batch) -> Tensor:
    """The loss is finite, and one element of one gradient is NaN: the root's slope at 0, times 0."""
    weight = method.student.inner[0].weight[2, 1]
    return loss + ((weight - weight.detach()).abs().sqrt() * 0 if has_sick(batch) else 0)


def break_the_forward(loss: Tensor, method: Fragile, batch: Batch) -> Tensor:
    """The student's own pass breaks, and its batch norm with it."""
    return method.student(batch["image"] * (float("nan") if has_sick(batch) else 1)).square().mean()


BREAKS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "NaN in the loss": (break_loss, "the loss"),
    "infinity in the loss": (overflow_loss, "the loss"),
    "NaN in one element of a gradient": (break_one_gradient, "the gradient"),
    "NaN in the forward pass": (break_the_forward, "the loss"),
}


def fragile(breaks: Callable[..., Tensor] = Fragile.breaks, **spec: Any) -> Trainer:
    torch.manual_seed(0)
    spec = {"steps": STEPS, "optimizer": OPTIMIZERS["adamw"], "ema": 0.9, **spec}
    trainer = build(Fragile, **spec)
    trainer.method.breaks = breaks
    return trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, buffers, optimizers and averages, copied."""
    state = snapshot.module_tensors(trainer.method)
    for name, player in trainer.players.items():
        state |= {f"{name}: {k}": value for k, value in optimizer_tensors(player.module, player.optimizer).items()}
    if trainer.average is not None:
        state |= {f"average: {name}": value for name, value in trainer.average.state_dict().items()}
    return {name: value.clone() for name, value in state.items()}


def failure_after(trainer: Trainer, warning: str) -> NonFiniteError:
    """The error that training ends in, once it has warned."""
    with pytest.warns(UserWarning, match=warning), pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    return caught.value


def without_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer changes; the forward pass itself has moved the batch norm's statistics."""
    return {name: value for name, value in state.items() if "norm.running" not in name and "num_batches" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def states_before_each_step(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Fills while the trainer trains."""
    states: list[dict[str, Tensor]] = []
    train = trainer.train_step
    trainer.train_step = lambda batches: (states.append(state_of(trainer)), train(batches))
    return states


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", BREAKS)
def test_raise_names_the_place_and_leaves_the_weights_as_they_were(kind, accumulate, tally):
    breaks, where = BREAKS[kind]
    trainer = fragile(breaks, accumulate=accumulate)
    states = states_before_each_step(trainer)
    with tally("non-finite values stopped"):
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit()
        error = caught.value
        assert (error.step, error.player, error.where) == (SICK_POSITION, "student", where)
        assert error.items == _items(SICK_POSITION)
        assert f"step {SICK_POSITION}, player 'student', batch items [" in error.message
        assert same(without_buffers(states[-1]), without_buffers(state_of(trainer)))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", BREAKS)
def test_skip_leaves_no_trace_of_the_update(kind, optimizer, accumulate, tally):
    trainer = fragile(BREAKS[kind][0], accumulate=accumulate, non_finite="skip", optimizer=OPTIMIZERS[optimizer])
    states = states_before_each_step(trainer)
    with tally("non-finite values stopped"), pytest.warns(UserWarning, match=f"step {SICK_POSITION}.*skipped"):
        trainer.fit()
    assert len(states) == STEPS
    changed = [not same(one, other) for one, other in pairwise(states)]
    assert changed == [step != SICK_POSITION for step in range(STEPS - 1)]
    assert all(value.isfinite().all() for value in state_of(trainer).values())


def test_skips_in_a_row_are_bounded(tally):
    trainer = fragile(lambda loss, method, batch: loss * float("nan"), non_finite="skip", max_non_finite=3)
    before = state_of(trainer)
    with tally("non-finite values stopped"):
        assert failure_after(trainer, "skipped").step == 3
        assert same(without_buffers(before), without_buffers(state_of(trainer)))


def test_skips_are_counted_by_player(tally):
    """One player that steps well does not excuse another that never does."""

    class Duel(Fragile):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.critic = nn.Linear(3, 1).double()

        def players(self) -> dict[str, nn.Module]:
            return {"student": self.student, "critic": self.critic}

        def step(self, batch: Batch) -> Iterator[Update]:
            yield from super().step(batch)
            yield Update("critic", self.critic(self.student(batch["image"])).mean() * float("nan"), batch.size)

    trainer = build(Duel, steps=STEPS, non_finite="skip", max_non_finite=3)
    with tally("non-finite values stopped"):
        failure = failure_after(trainer, "'critic'.*skipped")
        assert (failure.step, failure.player) == (3, "critic")


class Told(World):
    """Told to stop after some steps, by the trainer itself."""

    left = 0

    def any(self, flag: bool) -> bool:
        self.left -= 1
        return self.left == 0


def positions_of(trainer: Trainer) -> list[int]:
    """Which batches of the data are trained on; fills while the trainer trains."""
    positions: list[int] = []
    train = trainer.train_step
    trainer.train_step = lambda batches: (positions.append(trainer.step + trainer.offset), train(batches))
    return positions


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", BREAKS)
def test_rewind_goes_back_and_passes_over_the_data(kind, deferred, folder, tally):
    rows: list[Any] = []
    trainer = fragile(
        BREAKS[kind][0],
        non_finite="rewind",
        checkpoints=Checkpoints(folder / "rewound"),
        checkpoint_every=3,
        log_every=3,
        rows=rows,
    )
    if deferred:
        defer(trainer)
    positions = positions_of(trainer)
    with tally("non-finite values stopped"), pytest.warns(UserWarning, match="went back to step 3"):
        trainer.fit()
    tried = [0, 1, 2, 3, 4, *([5] if deferred else [])]  # on a device the verdict is in at the next row
    assert positions == [*tried, *range(SICK_POSITION + 1, SICK_POSITION + 1 + STEPS - 3)]
    assert [row["step"] for row in rows] == [3, 6, 8]
    _assert_same_as_never_sick(BREAKS[kind][0], trainer, rows, folder)


def _assert_same_as_never_sick(breaks: Callable[..., Tensor], trainer: Trainer, rows: list[Any], folder: Path) -> None:
    """The same as a run that was told to go on from position 5 at step 3: nothing of the void steps is left."""
    expected_rows: list[Any] = []
    told = Told()
    told.left = 3
    options: dict[str, Any] = {"checkpoint_every": 3, "log_every": 3, "rows": expected_rows}
    first = fragile(breaks, world=told, checkpoints=Checkpoints(folder / "expected"), **options)
    with pytest.raises(Interrupted):
        first.fit()
    second = fragile(breaks, checkpoints=Checkpoints(folder / "expected"), **options)
    snapshot.restore(second)
    second.offset, second.checkpoints = SICK_POSITION + 1 - 3, None
    second.fit()
    assert same(state_of(trainer), state_of(second))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected_rows]


def test_a_rewound_run_that_is_interrupted_resumes_with_the_same_bits(folder):
    options: dict[str, Any] = {"non_finite": "rewind", "checkpoint_every": 3}
    whole = fragile(break_loss, checkpoints=Checkpoints(folder / "whole"), **options)
    with pytest.warns(UserWarning, match="went back"):
        whole.fit()
    for steps in range(1, STEPS):
        checkpoints = Checkpoints(folder / f"{steps}")
        told = Told()
        told.left = steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Interrupted):
                fragile(break_loss, world=told, checkpoints=checkpoints, **options).fit()
            resumed = fragile(break_loss, checkpoints=checkpoints, **options)
            resumed.fit()
        assert resumed.guard.rewinds == 1
        # An interruption right before the bad step leaves a checkpoint that is nearer to go back to.
        assert resumed.offset == (whole.offset if steps != SICK_POSITION else whole.offset - 1)
        assert same(state_of(resumed), state_of(whole)) == (steps != SICK_POSITION)


def test_rewinds_are_bounded_and_end_in_the_error(folder, tally):
    trainer = fragile(
        lambda loss, method, batch: loss * float("nan"),
        non_finite="rewind",
        max_non_finite=3,
        checkpoints=Checkpoints(folder),
    )
    before = state_of(trainer)
    with tally("non-finite values stopped"):
        failure_after(trainer, "went back")
        assert trainer.guard.rewinds == 3
        assert same(without_buffers(before), without_buffers(state_of(trainer)))


def test_rewind_without_checkpoints_is_the_error():
    with pytest.raises(NonFiniteError):
        fragile(break_loss, non_finite="rewind").fit()


# What the values come from.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_sick_teacher_is_named(value, accumulate, ensemble, tally):
    trainer = fragile(accumulate=accumulate)
    sick = LiveTeacher(Sick(value))
    trainer.method.teacher = Ensemble([LiveTeacher(student()), sick]) if ensemble else sick
    with tally("non-finite values stopped"):
        with pytest.raises(NonFiniteError, match="the teacher's output is not finite at step 4") as caught:
            trainer.fit()
        assert caught.value.step == SICK_POSITION


def test_sick_data_are_named_before_the_teacher(tally):
    trainer = fragile()
    trainer.loader.tensors[0][SICK_ITEM, 0] = float("inf")
    with tally("non-finite values stopped"), pytest.raises(NonFiniteError, match="the data of the batch"):
        trainer.fit()


def test_a_teacher_that_cannot_be_asked_again_does_not_hide_the_error():
    trainer = fragile(break_loss)
    signal, answers = trainer.method.teacher.signal, iter(range(SICK_POSITION + 1))
    trainer.method.teacher.signal = lambda batch: (next(answers), signal(batch))[1]
    with pytest.raises(NonFiniteError, match="the loss"):
        trainer.fit()


def test_the_warning_of_a_rewind_names_the_teacher_too(folder):
    trainer = fragile(non_finite="rewind", checkpoints=Checkpoints(folder))
    trainer.method.teacher = LiveTeacher(Sick())
    with pytest.warns(UserWarning, match="the teacher's output.*went back"):
        trainer.fit()


# Where the host does not look at each step, as on an accelerator.


def defer(trainer: Trainer) -> None:
    trainer.guard = FiniteGuard(trainer.spec.non_finite, trainer.spec.max_non_finite, deferred=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_optimizer_passes_over_a_bad_update(name, first, bad, tally):
    player, expected = (Player("student", student("linear"), OPTIMIZERS[name]) for _ in range(2))
    guard = FiniteGuard("raise", 10, deferred=True)

    def step(of: Player, number: int, value: float | None = None) -> None:
        draws = torch.Generator().manual_seed(number)
        for parameter in of.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
        if value is not None:
            of.parameters[0].grad[1, 2] = value
        of.apply(torch.ones(()), (number, 10), None, guard, Place(number, "student", ()))

    with tally("non-finite values stopped"):
        if not first:
            step(player, 0), step(expected, 0)
        step(player, 1, bad)
        if not first:
            assert same(_state(player), _state(expected))
        step(player, 2), step(expected, 2)
        assert same(_state(player), _state(expected))  # as if the bad step had not been
        with pytest.raises(NonFiniteError) as caught:
            guard.settle()
        assert (caught.value.step, caught.value.where) == (1, "the gradient")
        guard.settle()  # told once


def _state(player: Player) -> dict[str, Tensor]:
    return {**player.module.state_dict(), **optimizer_tensors(player.module, player.optimizer)}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_deferred_verdict_names_the_right_step_and_nothing_bad_is_saved(kind, folder, tally):
    checkpoints = Checkpoints(folder)
    trainer = fragile(BREAKS[kind][0], log_every=100, checkpoint_every=3, checkpoints=checkpoints)
    defer(trainer)
    with tally("non-finite values stopped"):
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit()
        assert (caught.value.step, caught.value.where) == (SICK_POSITION, BREAKS[kind][1])
        assert checkpoints.steps() == [3]
        saved = checkpoints.load()
        assert all(value.isfinite().all() for group in saved.tensors.values() for value in group.values())


def test_skipping_is_never_deferred(monkeypatch):
    """Averages, buffers and `after_update` could not be kept from what the device alone knows to be skipped."""

    class Accelerated:
        rank, size, sharded, main = 0, 1, False, True
        device = torch.device("meta")

    def guard_of(policy: str) -> FiniteGuard:
        monkeypatch.setattr(Trainer, "_place", lambda trainer: {})
        return build(world=Accelerated(), non_finite=policy).guard

    assert [guard_of(policy).deferred for policy in ("raise", "rewind", "skip")] == [True, True, False]
