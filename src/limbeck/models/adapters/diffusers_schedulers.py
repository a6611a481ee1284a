"""Schedulers of diffusers as processes: what a stored scheduler says of a network.

diffusers keeps both the noise schedule that a network was trained with and the sampler in one scheduler. Its times are
taken from the scheduler itself, so that a loaded network is sampled at the times of its stock pipeline.
"""

import inspect
import math
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.diffusion.denoiser import Process, Sampling
from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.parameterisations import Direct, Parameterisation, Preconditioned
from limbeck.diffusion.schedules import EDM, FlowMatching, Schedule, TrigFlow, VPDiscrete
from limbeck.diffusion.solvers import Solver
from limbeck.models.adapters.diffusers_classes import named_class

Config = dict[str, Any]
"""The content of scheduler_config.json."""

KINDS: dict[str, Any] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""What a network predicts, by its name in diffusers."""

# Euler's method in diffusers goes along sigma / alpha, where it is DDIM. Nobody waits for DDPM's thousand random steps.
_SOLVERS: dict[str, Solver] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddim",
    "EulerDiscreteScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "HeunDiscreteScheduler": "heun",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "LCMScheduler": "consistency",
    "TCDScheduler": "tcd",
    "EDMEulerScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "FlowMatchLCMScheduler": "consistency",
    "CMStochasticIterativeScheduler": "consistency",
    "SCMScheduler": "consistency",
}
_OF_PROMPTS = ("cross_attention_dim", "joint_attention_dim", "caption_channels")
_USUAL_STEPS = 50


def build_scheduler(config: Config) -> Any:
    """A scheduler of diffusers from its configuration.

    Raises:
        IncompatibleError: diffusers has none of that name, or the configuration is none of its own.
    """
    from diffusers import SchedulerMixin

    kind = named_class(config.get("_class_name"), SchedulerMixin)
    if kind is None:
        raise IncompatibleError(f"diffusers has no scheduler '{config.get('_class_name')}'")
    try:
        return kind.from_config({name: value for name, value in config.items() if name != "_class_name"})
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, RuntimeError) as error:
        raise IncompatibleError(f"the scheduler's configuration is not that of a {kind.__name__}: {error}") from error


def process_from_scheduler(config: Config, network: nn.Module, pipeline: type | None = None) -> Process:
    """How a network denoises and is sampled, from the configuration of its scheduler.

    Args:
        config: the content of scheduler_config.json.
        network: of diffusers; what it takes as inputs settles guidance and the null label.
        pipeline: class of its pipeline, whose usual number of steps and guidance scale are taken.

    Raises:
        IncompatibleError: a scheduler whose process this library does not know.
    """
    known: Any = network
    scheduler = build_scheduler(config)
    schedule, made = _process(scheduler, type(network).__name__)
    name = type(scheduler).__name__
    solver = _SOLVERS.get(name, "dpmpp_2m")
    if scheduler.config.get("stochastic_sampling"):
        solver = "consistency"
    null_label = null_label_of(network)
    takes_scale = takes_guidance(network)
    # Flux is guided by its input alone; without that input its pipeline's scale does nothing.
    by_prompt = not type(network).__name__.startswith("Flux") and any(name in known.config for name in _OF_PROMPTS)
    guided = takes_scale or null_label is not None or by_prompt
    guidance = float(_usual(pipeline, "guidance_scale", 1.0)) if guided else 1.0
    times = _usual_stock_times(scheduler, schedule, solver, pipeline)
    sampling = Sampling(solver, len(times) - 1, guidance, _if_unusual(times, schedule))
    return Process(schedule, made, sampling, null_label, takes_scale)


def null_label_of(network: Any, classes: int = 0) -> int | None:
    """The label that says nothing: the last embedding; None where there is none, or where all belong to `classes`."""
    config = network.config
    if "num_embeds_ada_norm" in config:
        return config.num_embeds_ada_norm
    count = config.get("num_class_embeds")
    return count - 1 if count and count > max(classes, 1) else None


def takes_guidance(network: Any) -> bool:
    """Whether the guidance scale is an input of a network of diffusers."""
    config = network.config
    return bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))


def stock_times(scheduler: Any, schedule: Schedule, steps: int, explicit: bool = False) -> Tensor:
    """Falling times (steps + 1,) float64 that a scheduler of diffusers goes to, in a schedule of this library.

    Args:
        scheduler: of diffusers.
        schedule: of this library.
        steps: how many.
        explicit: give it evenly spaced noise levels from 1 to 1 / steps, as the pipelines of some flows do.
    """
    given: dict[str, Any] = {}
    if isinstance(schedule, FlowMatching) and scheduler.config.get("use_dynamic_shifting"):
        given["mu"] = scheduler.config.max_shift or 1.15  # of the largest images: smaller ones are shifted less
    if explicit and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        given["sigmas"] = numpy.linspace(1.0, 1 / steps, steps)
    if type(scheduler).__name__ == "SCMScheduler" and steps != 2:
        given["intermediate_timesteps"] = None
    scheduler.set_timesteps(steps, **given)
    if isinstance(schedule, VPDiscrete):
        ends_noisy = not scheduler.config.get("set_alpha_to_one", True)
        times = [*scheduler.timesteps.tolist(), 0.0 if ends_noisy else schedule.clean]
    elif type(scheduler).__name__ == "SCMScheduler":
        times = scheduler.timesteps.tolist()
        if isinstance(schedule, FlowMatching):  # SANA-Sprint's flow network is asked at sin / (sin + cos)
            times = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
    else:
        times = scheduler.sigmas.tolist()
        times[-1] = schedule.clean
    highest = schedule.t_max
    found = [float(min(times[0], highest))]
    for time in times[1:]:
        if time < found[-1]:  # schedulers of second order name each time twice
            found.append(float(time))
    return torch.tensor(found, dtype=torch.float64)


def _process(scheduler: Any, network: str) -> tuple[Schedule, Parameterisation]:
    name, config = type(scheduler).__name__, scheduler.config
    steps = float(config.get("num_train_timesteps", 1000))
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or prediction == "flow_prediction":
        return FlowMatching(), Direct("velocity", steps)
    if name.startswith("EDM"):
        if prediction != "epsilon":
            raise IncompatibleError(f"{name} with prediction_type '{prediction}' is not known here", "use epsilon")
        return EDM(float(config.sigma_min), float(config.sigma_max)), Preconditioned(float(config.sigma_data))
    if name == "CMStochasticIterativeScheduler":
        made = Preconditioned(float(config.sigma_data), boundary=True, noise="250-log")
        return EDM(float(config.sigma_min), float(config.sigma_max)), made
    if name == "SCMScheduler":
        # SANA-Sprint's pipeline turns a flow network into TrigFlow's; the network itself stays a flow's.
        is_flow = network.startswith("Sana")
        return (FlowMatching(), Direct("velocity")) if is_flow else (TrigFlow(), Direct("v"))
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in KINDS:
        raise IncompatibleError(f"the process of {name} with prediction_type '{prediction}' is not known here")
    if config.get("timestep_type", "discrete") != "discrete":
        raise IncompatibleError(f"{name} with timestep_type '{config.timestep_type}' is not known here")
    return VPDiscrete(_table(scheduler)), Direct(KINDS[prediction])


def _table(scheduler: Any) -> Tensor:
    """Squared alphas in float64, as exact as their description."""
    config, steps = scheduler.config, scheduler.config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        ends = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(*ends, steps, dtype=torch.float64).square()
    elif config.beta_schedule == "squaredcos_cap_v2":
        table = VPDiscrete.named("squared-cosine", steps).alphas_cumprod
        return _rescaled(table) if config.get("rescale_betas_zero_snr") else table
    else:
        return scheduler.alphas_cumprod.double()
    table = (1 - betas).cumprod(0)
    return _rescaled(table) if config.get("rescale_betas_zero_snr") else table


def _rescaled(table: Tensor) -> Tensor:
    """Without any signal at the last time (Lin et al., *Common Diffusion Noise Schedules Are Flawed*, 2023)."""
    alpha = table.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).square()


def _usual_stock_times(scheduler: Any, schedule: Schedule, solver: Solver, pipeline: type | None) -> Tensor:
    """The times of as many steps as a scheduler's pipeline makes where it is not told otherwise."""
    few = solver in ("consistency", "tcd")
    steps = int(_usual(pipeline, "num_inference_steps", 4 if few else _USUAL_STEPS))
    most = min(4 if few and steps > 8 else _USUAL_STEPS, int(scheduler.config.get("num_train_timesteps", 1000)))
    for count in (min(steps, most), 1):
        times = times_or_none(scheduler, schedule, count, gives_sigmas(pipeline))
        if times is not None:
            return times
    raise IncompatibleError(f"the scheduler's configuration gives no times to sample at: {type(scheduler).__name__}")


def _usual(pipeline: type | None, argument: str, otherwise: float) -> float:
    """The default of an argument of a pipeline's call."""
    if pipeline is None:
        return otherwise
    parameter = inspect.signature(pipeline.__call__).parameters.get(argument)
    usable = parameter is not None and isinstance(parameter.default, int | float)
    return parameter.default if usable else otherwise  # type: ignore[union-attr]  # usable says that it is there


def gives_sigmas(pipeline: type | None) -> bool:
    """Whether a pipeline tells its scheduler the noise levels; see `stock_times`."""
    return pipeline is not None and pipeline.__name__.startswith("Flux")


def _if_unusual(times: Tensor, schedule: Schedule) -> tuple[float, ...] | None:
    usual = usual_times(schedule, len(times) - 1)
    return None if torch.allclose(usual, times, rtol=1e-5, atol=1e-5) else tuple(times.tolist())


def times_or_none(scheduler: Any, schedule: Schedule, steps: int, explicit: bool) -> Tensor | None:
    """The times of `stock_times`; None where so many steps do not go with the scheduler's settings."""
    try:
        return stock_times(scheduler, schedule, steps, explicit)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
