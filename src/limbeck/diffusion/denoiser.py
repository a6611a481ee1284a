"""Denoisers: anything that predicts at noisy items. A network becomes one by the process noted on it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.parameterisations import (
    Direct,
    Parameterisation,
    build_parameterisation,
    parameterisation_config,
)
from limbeck.diffusion.ports import call_network, is_own, null_condition, without_adapter
from limbeck.diffusion.predictions import Prediction, from_data_and_noise, transport
from limbeck.diffusion.schedules import Schedule, build_schedule
from limbeck.diffusion.solvers import SOLVERS, Solver

Condition = Mapping[str, Tensor]
"""What items are conditioned on, one row an item: `label` (items,), `prompt` (items, tokens, width) with `prompt_mask`
(items, tokens) and `pooled` (items, width), `channels` (items, channels, ...) that the network sees after those of the
items, such as the mask and the rest of a picture to be filled in, `guidance` (items,) for networks that take the scale
as an input."""

NONE: Condition = {}

CONDITIONS = ("label", "prompt", "prompt_mask", "pooled", "time_ids", "channels")
"""What a batch may hold that items are conditioned on."""


def condition_of(batch: Condition, null_label: int | None = None) -> Condition:
    """What a batch says of its items; items without a class (-100) get the null label where there is one."""
    condition = {name: batch[name] for name in CONDITIONS if name in batch}
    if "label" in condition and null_label is not None:
        condition["label"] = condition["label"].masked_fill(condition["label"] < 0, null_label)
    return condition


class Denoiser(ABC):
    """Predicts at noisy items.

    Attributes:
        schedule: what alpha and sigma are.
        sampling: how samples are meant to be drawn.
        guidance_input: whether the guidance scale is an input, the condition `guidance`.
    """

    schedule: Schedule
    sampling: "Sampling"
    guidance_input: bool = False

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Prediction:
        """The prediction at noisy items x_t (items, ...) and times t (items,)."""

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, for as many items; the guidance scale stays.

        Raises:
            ValueError: the model knows no such condition.
        """


@dataclass(frozen=True)
class Sampling:
    """How samples are meant to be drawn from a network.

    Attributes:
        solver: name in `solvers.SOLVERS`.
        steps: how many.
        guidance: the scale g; 1 for networks that are not guided, or have learned it.
        times: falling times with the clean end, where they are not the schedule's usual ones.
        middle: the time between two steps, where these are two and go by no other times.

    Raises:
        ValueError: no solver of that name, fewer than one step, or times that do not fall.
    """

    solver: Solver = "ddim"
    steps: int = 50
    guidance: float = 1.0
    times: tuple[float, ...] | None = None
    middle: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"there is no solver '{self.solver}'")
        if self.steps != int(self.steps) or self.steps < 1:
            raise ValueError(f"a sampler makes one step or more, not {self.steps}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"a guidance scale is 0 or more, not {self.guidance}")
        if self.times is not None and (len(self.times) < 2 or any(t <= s for t, s in pairwise(self.times))):
            raise ValueError(f"a sampler's times fall from the noise to the clean end, unlike {self.times}")

    def times_for(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The times (steps + 1,) of as many steps as asked for; its own number if absent.

        Raises:
            ValueError: fewer steps than one, or more than a discrete schedule has times.
        """
        if self.times is not None and (steps is None or steps == len(self.times) - 1):
            return torch.tensor(self.times, dtype=torch.float64)
        steps = self.steps if steps is None else steps
        if self.middle is not None and steps == 2:
            return torch.tensor([schedule.t_max, self.middle, schedule.clean], dtype=torch.float64)
        return usual_times(schedule, steps)


@dataclass(frozen=True)
class Process:
    """All that turns a network into a denoiser and a sampler.

    Attributes:
        schedule: noise over time.
        parameterisation: what the network is fed and says.
        sampling: how samples are drawn from it.
        null_label: the label that says nothing; None where the network was not trained without a condition.
        guidance_input: whether the network takes the guidance scale as an input.
    """

    schedule: Schedule
    parameterisation: Parameterisation = field(default_factory=Direct)
    sampling: Sampling = field(default_factory=Sampling)
    null_label: int | None = None
    guidance_input: bool = False

    def __post_init__(self) -> None:
        if self.null_label is not None and not isinstance(self.null_label, int):
            raise ValueError(f"a null label is a whole number, not {self.null_label!r}")
        if not isinstance(self.guidance_input, bool):
            raise ValueError(f"whether the scale is an input is true or false, not {self.guidance_input!r}")

    def config(self) -> dict[str, Any]:
        """The process as plain data."""
        sampling = {**self.sampling.__dict__, "times": list(self.sampling.times) if self.sampling.times else None}
        return {
            "schedule": self.schedule.config(),
            "parameterisation": parameterisation_config(self.parameterisation),
            "sampling": sampling,
            "null_label": self.null_label,
            "guidance_input": self.guidance_input,
        }

    @classmethod
    def from_config(cls, config: Any) -> "Process":
        """A process from its plain data, as they come from a file.

        Raises:
            ValueError: the data describe none.
        """
        try:
            sampling = dict(config["sampling"])
            sampling["times"] = tuple(sampling["times"]) if sampling.get("times") else None
            return cls(
                build_schedule(config["schedule"]),
                build_parameterisation(config["parameterisation"]),
                Sampling(**sampling),
                config.get("null_label"),
                config.get("guidance_input", False),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no diffusion process is described by {config}") from error

    def sampled(self, **changes: Any) -> "Process":
        """The same process, sampled in another way."""
        return replace(self, sampling=replace(self.sampling, **changes))


_ATTRIBUTE = "limbeck_process"


def note_process(network: nn.Module, process: Process) -> nn.Module:
    """Notes on a network how it denoises; saved with it. Returns the network."""
    setattr(network, _ATTRIBUTE, process)
    return network


def process_of(network: nn.Module) -> Process | None:
    """The process noted on a network, also under an adapter; None where there is none."""
    return getattr(network, _ATTRIBUTE, None) or getattr(without_adapter(network), _ATTRIBUTE, None)


def usual_time_scale(network: nn.Module, schedule: Schedule) -> float:
    """What times are multiplied by for a network: those of diffusers count to about a thousand, ours to about one."""
    span = schedule.t_max - schedule.clean if schedule.clean < 0 else 1.0
    return (1.0 if is_own(network) else 1000.0) / span


class NetworkDenoiser(Denoiser):
    """A network together with its process.

    Args:
        network: a network of this library or of diffusers; see `ports`.
        process: how it denoises; what is noted on the network if absent.

    Raises:
        ValueError: neither is there.
    """

    def __init__(self, network: nn.Module, process: Process | None = None) -> None:
        process = process or process_of(network)
        if process is None:
            raise ValueError(f"nothing is known of how {type(network).__name__} denoises: note its process")
        self.network, self.process, self.schedule = network, process, process.schedule
        self.sampling, self.guidance_input = process.sampling, process.guidance_input

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Prediction:
        made = self.process.parameterisation
        seen, time = made.inputs(x_t, t, self.schedule)
        output = call_network(self.network, seen, time, condition)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        value, kind = made.prediction(output, x_t, t, self.schedule)
        return Prediction(value, kind, x_t, t, self.schedule)

    def null(self, condition: Condition) -> Condition:
        return null_condition(self.network, condition, self.process.null_label)


class Transported(Denoiser):
    """A denoiser that is asked in another schedule: exact, and without training.

    A flow asked in TrigFlow's times is SANA-Sprint's wrapper (2025): its `v` is dx_t/dt there.

    Args:
        denoiser: what predicts, in its own schedule.
        schedule: the one it is asked in.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        self.denoiser, self.schedule = denoiser, schedule
        self.sampling = replace(denoiser.sampling, times=None)
        self.guidance_input = denoiser.guidance_input

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Prediction:
        inner = self.denoiser(*transport(x_t, t, self.schedule, self.denoiser.schedule), condition)
        # As v, which holds x0 and eps at either end; both are the same in all schedules.
        value = from_data_and_noise(inner.x0, inner.eps, "v", t, self.schedule)
        return Prediction(value, "v", x_t, t, self.schedule)

    def null(self, condition: Condition) -> Condition:
        return self.denoiser.null(condition)


def denoiser_of(model: nn.Module) -> Denoiser:
    """The denoiser behind a module: itself, where it is one, or a network with its process.

    Raises:
        ValueError: nothing is known of how it denoises.
    """
    return model if isinstance(model, Denoiser) else NetworkDenoiser(model)
