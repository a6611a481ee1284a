"""Rehearsing a stage: a few steps under measurement, from which its cost is predicted."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core import snapshot
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Method
from limbeck.core.specs import StageSpec
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.data.source import Source
from limbeck.experiment import Experiment, Prepared
from limbeck.metrics.memory import PeakMemory
from limbeck.metrics.tasks import evaluate_for
from limbeck.models.describe import count_flops, count_parameters
from limbeck.planning import StagePlan

_WARM_UP, _MEASURED, _MOST = 3, 10, 100  # steps
_LONG_ENOUGH = 0.5  # seconds of measured steps: short steps are measured more often
_EVALUATED = 1024  # items whose evaluation is timed
_LARGEST_SAVE = 256 << 20  # bytes of a checkpoint that is saved to see how long that takes


def plan_stage(experiment: Experiment, stage: StageSpec) -> StagePlan:
    """Measures a few steps of one stage; its barely trained result becomes the result of the stage."""
    prepared = experiment.prepare(stage)
    try:
        if isinstance(prepared.method, Method):
            return _Rehearsal(experiment, stage, prepared).measure()
        return _without_training(stage, prepared)
    except torch.OutOfMemoryError:
        raise IncompatibleError(
            f"{stage.name}: it does not fit into the memory of {device_name(experiment.world.device)}",
            "lower train.batch_size or raise train.accumulate",
        ) from None
    finally:
        experiment.results[stage.name] = prepared.method.student


class _Rehearsal:
    """One stage, trained for a few steps under measurement."""

    def __init__(self, experiment: Experiment, stage: StageSpec, prepared: Prepared) -> None:
        assert stage.train is not None
        self.stage, self.prepared, self.spec = stage, prepared, stage.train
        self.trainer = experiment.trainer(stage, prepared, lambda row: None)
        self.batches = iter(self.trainer.loader.steps(0, _WARM_UP + _MOST))

    def measure(self) -> StagePlan:
        """Takes the steps."""
        with FlopCounterMode(display=False) as counter:
            self._step()
        memory = self._memory()
        self._step()
        step = self._seconds_step()
        checkpoint = self._checkpoint_bytes()
        seconds = step * self.trainer.steps + self._evaluations() + self._saves(checkpoint)
        student, teachers = self.prepared.method.student, models_of(self.prepared.teacher)
        return StagePlan(
            stage=self.stage.name,
            method=self.stage.method,
            student_parameters=count_parameters(student),
            teacher_parameters=sum(map(count_parameters, teachers)),
            flops_step=counter.get_total_flops(),
            flops_teacher=sum(self._forward_flops(model) for model in teachers) * self.spec.batch_size,
            memory_bytes=memory,
            disk_bytes=checkpoint * min(self.spec.keep_checkpoints, self._number_of_saves()) + bytes_of(student),
            steps=self.trainer.steps,
            seconds_step=step,
            seconds=seconds,
        )

    def _seconds_step(self) -> float:
        seconds: list[float] = []
        while len(seconds) < _MEASURED or (sum(seconds) < _LONG_ENOUGH and len(seconds) < _MOST):
            seconds.append(self._timed(self._step))
        return statistics.fmean(sorted(seconds)[:-1])  # without the slowest, which may be a hiccup

    def _step(self) -> None:
        trainer = self.trainer
        trainer.train_step([batch.to(trainer.world.device) for batch in next(self.batches)])
        trainer.step += 1

    def _timed(self, work: Callable[[], Any]) -> float:
        device = self.trainer.world.device
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    def _memory(self) -> int:
        """What stays all the time, and the most that a step or a measurement adds to it."""
        states = [player.optimizer.state.values() for player in self.trainer.players.values()]
        tensors = [value for state in states for entry in state for value in entry.values() if torch.is_tensor(value)]
        average = self.trainer.average.state_dict().values() if self.trainer.average else ()
        modules = [self.trainer.method, *models_of(self.prepared.teacher)]
        lasting = sum(map(bytes_of, modules)) + sum(tensor.nbytes for tensor in (*tensors, *average))
        sample = self._sample(256)
        with PeakMemory(self.trainer.world.device) as peak:
            self._step()
            self._evaluate(sample)
        return lasting + peak.peak_bytes

    def _evaluations(self) -> float:
        """Seconds of all measurements on the validation data while training."""
        every, sample = self.spec.evaluate_every, self._sample(_EVALUATED)
        if not every:
            return 0.0
        share = len(self.prepared.data.validation) / len(sample)
        return -(-self.trainer.steps // every) * share * self._timed(lambda: self._evaluate(sample))

    def _evaluate(self, source: Source) -> None:
        evaluate_for(self.trainer.method.card.task)(self.trainer.method.result(), source)
        self.trainer.method.train()

    def _sample(self, items: int) -> Source:
        validation = self.prepared.data.validation
        return validation.select(torch.arange(min(items, len(validation))))

    def _saves(self, size: int) -> float:
        """Seconds of all checkpoints; large ones are not written to find out."""
        if size > _LARGEST_SAVE:
            return self._number_of_saves() * size / (200 << 20)  # a plain disk, checksums included
        return self._number_of_saves() * self._timed(lambda: snapshot.save(self.trainer))

    def _number_of_saves(self) -> int:
        every = self.spec.checkpoint_every or max(1, self.trainer.steps // 10)
        return -(-self.trainer.steps // every)

    def _checkpoint_bytes(self) -> int:
        method = self.trainer.method
        tensors = list(snapshot.module_tensors(method).values())
        for player in self.trainer.players.values():
            tensors += snapshot.optimizer_tensors(player.module, player.optimizer).values()
        if self.trainer.average is not None:
            tensors += self.trainer.average.state_dict().values()
        return sum(tensor.nbytes for tensor in tensors)

    def _forward_flops(self, model: nn.Module) -> float:
        return count_flops(model, self.prepared.info.example)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def models_of(teacher: Any) -> list[nn.Module]:
    """The live models behind a teacher; none of a cached, served or foreign one."""
    if isinstance(teacher, Ensemble):
        return [model for one in teacher.teachers for model in models_of(one)]
    return [teacher.model] if isinstance(teacher, LiveTeacher) else []


def _without_training(stage: StageSpec, prepared: Prepared) -> StagePlan:
    """A stage that does not train by gradient: only its size can be told beforehand."""
    student, teachers = prepared.method.student, models_of(prepared.teacher)
    return StagePlan(
        stage=stage.name,
        method=stage.method,
        student_parameters=count_parameters(student),
        teacher_parameters=sum(map(count_parameters, teachers)),
        flops_step=0.0,
        flops_teacher=0.0,
        memory_bytes=sum(map(bytes_of, (student, *teachers))),
        disk_bytes=bytes_of(student),
        steps=0,
        seconds_step=0.0,
        seconds=0.0,
    )


def device_name(device: torch.device) -> str:
    """The device as a plan names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"
