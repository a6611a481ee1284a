"""What a recipe will cost, from a few measured steps of every stage on this machine."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core import interrupt
from limbeck.running import RecipeLike, resolve


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs.

    Attributes:
        stage: its name.
        method: slug of its method.
        student_parameters: parameters of the student.
        teacher_parameters: parameters of all teachers together.
        flops_step: floating-point operations of one step: forward and backward passes, and the teacher's.
        flops_teacher: the teacher's share of these.
        memory_bytes: peak on this device: weights, gradients, optimizer state, activations.
        disk_bytes: checkpoints that are kept, and the result.
        steps: optimizer steps; 0 for methods that do not train by gradient, whose time is not predicted.
        seconds_step: one step, with its data.
        seconds: the stage: steps, measurements on the validation data along the way, and checkpoints.
    """

    stage: str
    method: str
    student_parameters: int
    teacher_parameters: int
    flops_step: float
    flops_teacher: float
    memory_bytes: int
    disk_bytes: int
    steps: int
    seconds_step: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a recipe costs: its stages, and the device that they were measured on."""

    stages: list[StagePlan]
    device: str

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """Peak memory: that of the hungriest stage."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Checkpoints and results of all stages; the last result is kept twice."""
        return sum(stage.disk_bytes for stage in self.stages)


def plan(recipe: RecipeLike, *, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Measures a few steps of every stage, with untrained results of earlier stages, and writes into no run's folder.

    Args:
        recipe: what is to be done.
        overrides: values by dotted path.

    Raises:
        UsageError: the recipe cannot be used, or a stage does not fit into the device's memory.
    """
    resolved = resolve(recipe, overrides)

    from limbeck.core.run import Run  # these import torch: only once the recipe is known to be sound
    from limbeck.experiment import Experiment
    from limbeck.rehearsal import device_name, plan_stage

    with tempfile.TemporaryDirectory(prefix="limbeck-plan-") as scratch:
        experiment = Experiment(resolved, Run(Path(scratch)))
        stages = []
        for stage in resolved.stages:
            interrupt.pause("no plan was made")
            stages.append(plan_stage(experiment, stage))
    return Plan(stages, device_name(experiment.world.device))
