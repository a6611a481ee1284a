"""Items of the training data as a network meets them in use, for what is judged by looking at its layers."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call
from limbeck.core.errors import IncompatibleError
from limbeck.core.randomness import derive, generator
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import NetworkDenoiser, Process, condition_of, process_of
from limbeck.diffusion.generation import guided_model


def calibration_batches(model: nn.Module, source: Any, seed: int, items: int, batch_size: int) -> Iterator[Batch]:
    """Items drawn by the seed and not augmented, for `run_calibration`.

    Those of a denoiser come noised, with their `time`: the times at which samples are drawn from it, each as often as
    the others. Noise is a function of the seed and the item.

    Args:
        model: whose layers are looked at.
        source: the training data.
        seed: of the run.
        items: how many, as far as there are so many.
        batch_size: at a time.

    Raises:
        IncompatibleError: the network denoises, and nothing is known of how.
    """
    process = process_of(model)
    if process is None and _asks_for_more(model) and "image" in source.info().example:
        raise IncompatibleError(
            f"nothing is known of how the {type(model).__name__} denoises",
            "take a trained one, or train one with 'denoising'",
        )
    order = torch.randperm(len(source), generator=generator(seed, "calibration"))[:items]
    times = None if process is None else _spread(process, len(order)).split(batch_size)
    for number, rows in enumerate(order.split(batch_size)):
        batch = source.fetch(rows)
        if process is None or times is None:
            yield batch
            continue
        noise = ItemNoise(derive(seed, "calibration"), rows).normal("noise", batch["image"])
        noised = process.schedule.add_noise(batch["image"], noise, times[number])
        named = Batch({name: value for name, value in batch.items() if name != "label" or source.classes})
        yield named.replace(image=noised, time=times[number])


@torch.no_grad()
def run_calibration(model: nn.Module, batch: Batch) -> None:
    """Runs a network on a batch of `calibration_batches`; a denoiser as its sampler does, guidance included."""
    process = process_of(model)
    if process is None:
        call(model, batch)
    else:
        ask = guided_model(NetworkDenoiser(model), condition_of(batch, process.null_label))
        ask(batch["image"], batch["time"])


def _spread(process: Process, count: int) -> Tensor:
    """So many of the sampler's times (count,), falling, evenly from all of them."""
    times = process.sampling.times_for(process.schedule)[:-1]
    places = (torch.arange(count) + 0.5) * (len(times) / count)
    return times[places.long()]


def _asks_for_more(model: nn.Module) -> bool:
    """Whether a network cannot be called on images alone."""
    given = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.default is inspect.Parameter.empty and one.kind in kinds for one in given) > 1
