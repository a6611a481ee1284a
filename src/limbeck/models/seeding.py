"""Random numbers for building a model, drawn from a seed and not from the process's own stream."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from limbeck.core.randomness import derive


@contextmanager
def seeded(seed: int, *key: object) -> Iterator[None]:
    """Within the context torch draws on the CPU from `derive(seed, *key)`; afterwards its stream is as before."""
    # devices=[] and the default generator: models are built on the CPU, and other devices' streams are not touched.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *key))
        yield
