"""The one training loop of the library. It knows devices, precision, accumulation, ranks, averages, checkpoints and
logs; methods know none of these, and it knows no method."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from limbeck.core import interrupt, snapshot
from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.distributed import World, blank_copy
from limbeck.core.ema import EMA
from limbeck.core.errors import IncompatibleError, Interrupted, NonFiniteError, RecipeError, did_you_mean
from limbeck.core.finite import FiniteGuard, Place, Rewind, trace
from limbeck.core.meter import Meter
from limbeck.core.method import Clock, Method, Update
from limbeck.core.optim import learning_rate
from limbeck.core.player import Player, Tally, build_players
from limbeck.core.randomness import derive, reseed
from limbeck.core.specs import TrainSpec

Row = dict[str, Any]


class Loader(Protocol):
    """Where batches come from: a pure function of the step."""

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start` up to `stop`, for this rank."""
        ...


class Trainer:
    """Carries out a method's updates.

    Args:
        method: what yields the updates.
        loader: the batches of any step.
        spec: optimizers, precision, policies.
        steps: optimizer steps in all.
        items: number of training items, for the epoch count.
        seed: seed of everything random in training.
        checkpoints: where to save and resume; None trains without.
        record: receives each row of metrics, on the main process only.
        evaluate: measures the result so far whenever `spec.evaluate_every` says; its figures join the rows.
        world: the processes that train together.
    """

    def __init__(
        self,
        method: Method,
        loader: Loader,
        spec: TrainSpec,
        *,
        steps: int,
        items: int,
        seed: int,
        checkpoints: Checkpoints | None = None,
        record: Callable[[Row], None] = lambda row: None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        world: World | None = None,
    ) -> None:
        self.method, self.loader, self.spec = method, loader, spec
        self.steps, self.items, self.seed = steps, items, seed
        self.checkpoints, self.record, self.evaluate = checkpoints, record, evaluate
        self.world = world or World()
        self.step = 0
        self.logged = 0  # the last step whose row of metrics was recorded
        self.offset = 0  # how far the data run ahead of the steps: a rewind passes over what led to a non-finite value
        self._alone = spec.accumulate == 1 and self.world.size == 1  # one batch's mean is the mean: no weighting
        self.seconds: dict[str, float] = defaultdict(float)
        self.players = self._place()
        self.meter = Meter()
        # Skipping asks the host at each step: buffers, averages and `after_update` may not see what was skipped.
        deferred = self.world.device.type != "cpu" and spec.non_finite != "skip"
        self.guard = FiniteGuard(spec.non_finite, spec.max_non_finite, deferred)
        self.average = EMA(method.averaged(), spec.ema) if spec.ema is not None else None

    def fit(self) -> nn.Module:
        """Trains to the last step, from the latest checkpoint where there is one, and returns the method's result.

        Raises:
            NonFiniteError: a loss or gradient was not finite and the policy says stop; the weights are untouched by it.
            Interrupted: a signal arrived; a checkpoint is on disk.
        """
        snapshot.restore(self)
        if self.spec.non_finite == "rewind" and self.step == 0:
            snapshot.save(self)  # so that there is always somewhere to go back to
        self.method.train()
        try:
            self._log_if_due()  # an interruption may have come between a step and its row
            while self.step < self.steps:
                self._run()
        except Interrupted:
            snapshot.save(self)
            raise
        snapshot.save(self)
        if self.average is not None:
            self.average.copy_into(self.method.averaged())
        if self._blank is None:
            return self.method.result()
        self._blank.load_state_dict(snapshot.module_tensors(self.method.result()), assign=True)
        return self._blank

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """One step of the method: its updates in order, the micro-batches advancing through them in lockstep."""
        moment = self.step + self.offset
        reseed(self.seed, "step", moment, self.world.rank)
        epoch = self.step * self.spec.batch_size / self.items
        self.method.clock = Clock(self.step, self.steps, epoch, derive(self.seed, "shared", moment), self.seed)
        running = [self.method.step(batch) for batch in micro_batches]
        indices = tuple(batch["index"] for batch in micro_batches if "index" in batch)
        while True:
            buffers = self._buffers()
            if (turn := self._backward(running)) is None:
                break
            player, tally = turn
            with self._timed("optimizer"):
                if not self._commit(player, tally, Place(self.step, player.name, indices)):
                    self._restore(buffers)

    def _run(self) -> None:
        """Steps to the end, or to a non-finite value that asks to go back."""
        try:
            batches = iter(self.loader.steps(self.step + self.offset, self.steps + self.offset))
            while self.step < self.steps:
                with self._timed("data"):
                    micro_batches = [batch.to(self.world.device) for batch in next(batches)]
                self.train_step(micro_batches)
                self.step += 1
                self._log_if_due()
                if self.step % self._checkpoint_interval() == 0:
                    with self._timed("checkpoint"):
                        snapshot.save(self)
                self._pause()
        except Rewind as request:
            snapshot.rewind(self, self._traced(request.error))
        except NonFiniteError as error:
            raise self._traced(error) from error

    def _traced(self, error: NonFiniteError) -> NonFiniteError:
        """The error with its origin, as far as the batch and the teacher tell when they are asked again."""
        position = error.step + self.offset
        reseed(self.seed, "step", position, self.world.rank)
        try:
            micro_batches = [b.to(self.world.device) for b in next(iter(self.loader.steps(position, position + 1)))]
            return trace(error, micro_batches, self.method.teacher)
        except Exception:  # a teacher that cannot be asked again, say: the error itself is what matters
            return error

    def _backward(self, running: Sequence[Iterator[Update]]) -> tuple[Player, Tally] | None:
        """The next update of every micro-batch, forward and backward; None when the step is over."""
        tally, names = Tally(), set()
        for updates in running:
            with self._timed("forward"), self._precision():
                update = next(updates, None)
            names.add(update.player if update else None)
            if update is None:
                continue
            player = self._player(update.player)
            tally.add(update)
            with self._timed("backward"):
                loss = update.loss if self._alone else update.loss * update.weight
                loss.backward(inputs=self._leaves(player))
        if len(names) > 1:
            raise IncompatibleError(
                f"micro-batches disagree on whose turn it is: {names}", "the order of updates may not depend on a batch"
            )
        name = names.pop()
        return None if name is None else (self.players[name], tally)

    def _commit(self, player: Player, tally: Tally, place: Place) -> bool:
        """Takes one optimizer step; returns whether it was taken, or skipped for a non-finite value."""
        weight, means = tally.reduce(self.world)
        if not self._alone:
            player.average_gradients(weight, self.world)
        norm, admitted = player.apply(means["loss"], (self.step, self.steps), self.spec.clip_norm, self.guard, place)
        for other in self.players.values():  # a loss may leave gradients on other players; they are not theirs to use
            other.optimizer.zero_grad(set_to_none=True)
        if admitted:
            self.method.after_update(player.name, means)
            if self.average is not None and player.name == self._averaged_player:
                self.average.update()
            self.meter.add({f"{player.name}/gradient_norm": norm}, 1.0)
            self.meter.add({f"{player.name}/{name}": value for name, value in means.items()}, weight)
        return admitted

    def _buffers(self) -> list[torch.Tensor]:
        """Copies of the method's buffers where an update may be skipped: its forward pass has changed batch norms."""
        return [buffer.clone() for buffer in self.method.buffers()] if self.spec.non_finite == "skip" else []

    def _restore(self, buffers: list[torch.Tensor]) -> None:
        for buffer, kept in zip(self.method.buffers(), buffers, strict=True):
            buffer.copy_(kept)

    def _log_if_due(self) -> None:
        due = self.step % self.spec.log_every == 0 or self.step == self.steps or self._is_validated()
        if self.logged < self.step and due:
            self._log()

    def _log(self) -> None:
        self.guard.settle()
        measured = self._validate()  # first: where it is interrupted, the row stays due with all its means
        row: Row = {"step": self.step, "epoch": self.step * self.spec.batch_size / self.items} | self.meter.read()
        rates = {name: learning_rate(player.spec, self.step - 1, self.steps) for name, player in self.players.items()}
        row |= {f"{name}/lr": rate for name, rate in rates.items()}
        row |= measured
        row["seconds"] = {phase: round(spent, 3) for phase, spent in self.seconds.items()}
        if self.world.main:
            self.record(row)
        self.logged = self.step

    def _is_validated(self) -> bool:
        every = self.spec.evaluate_every
        return every is not None and (self.step % every == 0 or self.step == self.steps)

    def _validate(self) -> Row:
        if self.evaluate is None or not self._is_validated():
            return {}
        with self._timed("evaluate"), self._result() as result:
            return {f"validation/{name}": value for name, value in self.evaluate(result).items()}

    @contextmanager
    def _result(self) -> Iterator[nn.Module]:
        """What would be taken home now: in eval mode, with averaged weights where an average is kept."""
        with self.average.applied() if self.average is not None else nullcontext():
            yield self.method.result().eval()
        self.method.train()

    def _pause(self) -> None:
        """The step boundary: a signal that any rank received ends the run on all of them."""
        on_time = self.world.device.type == "cpu" or self.step % self.spec.log_every == 0  # asking others synchronises
        if on_time and self.world.any(interrupt.requested()):
            raise interrupt.interruption(f"saved at step {self.step}")

    def _place(self) -> dict[str, Player]:
        """Puts the method and its teacher on the device, shards where asked, and builds the players."""
        self.method.to(self.world.device)
        if self.method.teacher is not None:
            self.method.teacher.to(self.world.device)
        modules = self.method.players()
        for name in self.spec.players:
            if name not in modules:
                raise RecipeError(f"train.players.{name}", "the method has no such player", did_you_mean(name, modules))
        result = self.method.result()
        self._blank = blank_copy(result) if self.world.sharded else None  # takes the whole weights home in the end
        for module in modules.values():
            self.world.shard(module)
        averaged = self.method.averaged()
        self._averaged_player = next((name for name, module in modules.items() if averaged in module.modules()), "")
        return build_players(modules, self.spec.optimizer, self.spec.players)

    def _player(self, name: str) -> Player:
        if name not in self.players:
            raise IncompatibleError(f"the method updates '{name}'", f"its players are {', '.join(self.players)}")
        return self.players[name]

    def _leaves(self, player: Player) -> list[nn.Parameter] | None:
        """Where gradients are wanted; None is everywhere (one player, or shards that autograd does not see)."""
        return None if len(self.players) == 1 or self.world.sharded else player.parameters

    def _precision(self) -> AbstractContextManager[Any]:
        if self.spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _checkpoint_interval(self) -> int:
        return self.spec.checkpoint_every or max(1, self.steps // 10)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
