"""Processes as schedulers of diffusers: which stock scheduler samples a network, and with which settings."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from limbeck.diffusion.denoiser import Process, Sampling
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.schedules import EDM, FlowMatching, TrigFlow, VPDiscrete
from limbeck.diffusion.solvers import Solver
from limbeck.models.adapters.diffusers_schedulers import (
    KINDS,
    Config,
    build_scheduler,
    gives_sigmas,
    process_from_scheduler,
    times_or_none,
)

_NAMES = {kind: name for name, kind in KINDS.items()}


def scheduler_for(
    process: Process, network: nn.Module, origin: Config | None = None, pipeline: type | None = None
) -> Any:
    """A stock scheduler that samples as a process says; None where diffusers has none.

    Of the settings that a scheduler has, those are taken at which it goes to the process's own times; a warning says
    so where none does.

    Args:
        process: how the network denoises and is sampled.
        network: of diffusers.
        origin: configuration of the scheduler that came with the network; it stays where it says the same.
        pipeline: class of the pipeline that will use it.
    """
    steps = process.sampling.steps
    wanted = process.sampling.times_for(process.schedule)
    first = None
    for config in _candidates(process, network, origin):
        scheduler = build_scheduler(config)
        first = first or scheduler
        # Where its last step would be from time 0 to time 0, a scheduler counts one more than there are.
        for count in (steps, steps + 1) if config is origin else (steps,):
            found = times_or_none(scheduler, process.schedule, count, gives_sigmas(pipeline))
            if found is not None and len(found) == len(wanted) and torch.allclose(found, wanted, 2e-3, 1e-3):
                return scheduler
    if first is not None:
        shown = ", ".join(f"{time:.5g}" for time in wanted[:5].tolist()) + (", …" if len(wanted) > 5 else "")
        warnings.warn(
            f"{type(first).__name__} has no setting for the times {shown}: give them to the pipeline, or sample with "
            f"limbeck",
            stacklevel=3,
        )
    return first


def _candidates(process: Process, network: nn.Module, origin: Config | None) -> Iterator[Config]:
    """Configurations of schedulers for a process, the likeliest first."""
    schedule, made, solver = process.schedule, process.parameterisation, process.sampling.solver
    if origin is not None and _fits(origin, process, network):
        yield origin
    if isinstance(schedule, VPDiscrete) and isinstance(made, Direct) and made.kind in _NAMES:
        yield from _for_discrete(schedule, _NAMES[made.kind], solver, process.sampling.steps)
    elif isinstance(schedule, EDM) and isinstance(made, Preconditioned):
        yield from _for_edm(schedule, made, process.sampling)
    elif isinstance(schedule, FlowMatching) and isinstance(made, Direct) and made.kind == "velocity":
        yield from _for_flow(process, network, origin)
    elif isinstance(schedule, TrigFlow) and made == Direct("v") and solver == "consistency":
        yield {"_class_name": "SCMScheduler"}


def _fits(origin: Config, process: Process, network: nn.Module) -> bool:
    """Whether the scheduler that came with a network says of it what the process does, but perhaps for the times."""
    derived = process_from_scheduler(origin, network)
    same = derived.schedule.config() == process.schedule.config()
    made = derived.parameterisation == process.parameterisation
    return same and made and derived.sampling.solver == process.sampling.solver


def _for_discrete(schedule: VPDiscrete, prediction: str, solver: Solver, steps: int) -> Iterator[Config]:
    table = schedule.alphas_cumprod
    base: Config = {"num_train_timesteps": len(table), "prediction_type": prediction, **_betas(schedule)}
    if solver in ("consistency", "tcd"):
        name = "LCMScheduler" if solver == "consistency" else "TCDScheduler"
        for origin in dict.fromkeys((50, steps, *range(steps, len(table) + 1))):
            if origin <= len(table):
                yield {"_class_name": name, "original_inference_steps": origin, "steps_offset": 1, **base}
        return
    named: dict[str, Config] = {
        "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False},
        "euler": {"_class_name": "EulerDiscreteScheduler"},
        "heun": {"_class_name": "HeunDiscreteScheduler"},
        "dpmpp_2m": {"_class_name": "DPMSolverMultistepScheduler"},
        "ancestral": {"_class_name": "DDPMScheduler", "clip_sample": False},
        "sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    }
    ends = ({}, {"set_alpha_to_one": False}) if solver == "ddim" else ({},)
    # Only "leading" times are offset, but some pipelines warn of schedulers in which the offset is not 1.
    for spacing, offset in (("trailing", 1), ("leading", 0), ("leading", 1), ("linspace", 1)):
        for end in ends:
            yield {**named[solver], **base, "timestep_spacing": spacing, "steps_offset": offset, **end}


def _betas(schedule: VPDiscrete) -> Config:
    """The schedule's table as a scheduler is told it: by name where it has one, else each beta."""
    named = schedule.config().get("table")
    if named == "linear":
        return {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    if named == "scaled-linear":
        return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if named == "squared-cosine":
        return {"beta_schedule": "squaredcos_cap_v2"}
    table = schedule.alphas_cumprod
    ratios = [float(table[0]), *(float(later / earlier) for earlier, later in pairwise(table))]
    return {"trained_betas": [1 - ratio for ratio in ratios]}


def _for_edm(schedule: EDM, made: Preconditioned, sampling: Sampling) -> Iterator[Config]:
    base = {"sigma_min": schedule.t_min, "sigma_max": schedule.t_max, "sigma_data": made.sigma_data}
    if made.boundary and made.noise == "250-log" and sampling.solver == "consistency":
        for points in dict.fromkeys((40, 18, *range(max(2, sampling.steps), 202))):
            name = "CMStochasticIterativeScheduler"
            yield {"_class_name": name, "num_train_timesteps": points, "clip_denoised": False, **base}
    elif not made.boundary and made.noise == "quarter-log" and sampling.solver in ("euler", "ddim"):
        yield {"_class_name": "EDMEulerScheduler", **base}
    elif not made.boundary and made.noise == "quarter-log" and sampling.solver == "dpmpp_2m":
        yield {"_class_name": "EDMDPMSolverMultistepScheduler", **base}


def _for_flow(process: Process, network: nn.Module, origin: Config | None) -> Iterator[Config]:
    made, sampling = process.parameterisation, process.sampling
    assert isinstance(made, Direct)
    if type(network).__name__.startswith("Sana") and sampling.solver == "consistency" and made.time_scale == 1:
        yield {"_class_name": "SCMScheduler"}
        return
    known = origin or {}
    usual = known.get("shift") or known.get("flow_shift") or 1.0
    name = "FlowMatchHeunDiscreteScheduler" if sampling.solver == "heun" else "FlowMatchEulerDiscreteScheduler"
    noisy = {"stochastic_sampling": True} if sampling.solver == "consistency" else {}
    for shift in dict.fromkeys((1.0, usual, 3.0)):
        base: Config = {"_class_name": name, "num_train_timesteps": int(made.time_scale), "shift": shift}
        yield base | noisy
        if sampling.steps > 1 and name.startswith("FlowMatchEuler"):
            yield base | noisy | {"shift_terminal": shift / (shift + sampling.steps - 1)}
    if type(network).__name__.startswith("Flux") and name.startswith("FlowMatchEuler"):
        yield {"_class_name": name, "shift": usual, "use_dynamic_shifting": True} | noisy
