"""Randomness as a function of (seed, purpose, step, rank): nothing random is state, so resuming is exact."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed from `seed` and any key, e.g. `derive(0, "step", 12, rank)`; equal on every machine."""
    text = ":".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def reseed(seed: int, *key: object) -> None:
    """Seeds Python, numpy and torch (the CPU, and the accelerators in use) from `derive(seed, *key)`."""
    value = derive(seed, *key)
    random.seed(value)
    numpy.random.seed(value % 2**32)
    # torch.manual_seed would record a stack trace for each kind of accelerator that is not in use: 0.5 ms a step.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


def generator(seed: int, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of its own, seeded from `derive(seed, *key)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *key))


@contextmanager
def repeating(state: torch.Tensor, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the context torch's stream on `device` goes on from `state`, a `stream_state`; afterwards as if nothing
    had been drawn. So a second network drops the very units that a first one dropped.
    """
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def stream_state(device: torch.device | str = "cpu") -> torch.Tensor:
    """Where torch's stream on `device` stands."""
    return torch.cuda.get_rng_state(device) if torch.device(device).type == "cuda" else torch.get_rng_state()


class ItemOrder:
    """Which items step k sees: an endless chain of shuffles, a pure function of (seed, step).

    Args:
        items: number of items in the data set, at least 1.
        batch_size: items a step over all ranks and micro-batches, at least 1.
        seed: seed of the shuffles; each epoch has its own.
    """

    def __init__(self, items: int, batch_size: int, seed: int) -> None:
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self._epoch = -1
        self._order: torch.Tensor = torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> torch.Tensor:
        """Indices (batch_size,) of the items of step `step`, counted from 0; a batch may straddle two epochs."""
        position, wanted, parts = step * self.batch_size, self.batch_size, []
        while wanted:
            epoch, offset = divmod(position, self.items)
            part = self._shuffle(epoch)[offset : offset + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:  # the current epoch's shuffle is a cache, not state
            self._order = torch.randperm(self.items, generator=generator(self.seed, "order", epoch))
            self._epoch = epoch
        return self._order
