"""Searching a space: aging evolution and random search, each an endless supply of scored architectures."""

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from limbeck.core.errors import IncompatibleError

A = TypeVar("A", bound=Hashable)
_ATTEMPTS = 1000


class Drawable(Protocol[A]):
    """What a search needs of a space: architectures drawn at random, and neighbours of one."""

    def sample(self, draws: random.Random) -> A:
        """Any architecture of the space."""
        ...

    def mutate(self, architecture: A, draws: random.Random) -> A:
        """The architecture with one of its genes changed."""
        ...


Score = Callable[[A], float | None]
"""Higher is better; None refuses the architecture (too large, or not to be compared)."""


@dataclass(frozen=True, slots=True)
class Scored(Generic[A]):
    """An architecture and its score."""

    architecture: A
    score: float


def aging_evolution(
    space: Drawable[A],
    score: Score[A],
    draws: random.Random,
    *,
    population: int = 36,
    sample: int = 8,
    parents: int = 5,
    mutation_rate: float = 1.0,
) -> Iterator[Scored[A]]:
    """Evolution in which the oldest die: every step the child of a good parent takes the place of the oldest one.

    Yields each candidate as it is scored, first the random population and then children without end; the caller's
    budget ends it. A pure function of its arguments: with the same draws and scores it takes the same course.

    Args:
        space: where architectures come from.
        score: called once a candidate, for an architecture that comes again too.
        draws: all its randomness.
        population: how many are alive, at least 1.
        sample: how many of these are drawn a step, with replacement.
        parents: how many of the best drawn the parent is chosen from.
        mutation_rate: probability that a child differs from its parent, in [0, 1].

    Raises:
        IncompatibleError: of a thousand random architectures none was admitted.

    Source: Real et al., *Regularized Evolution for Image Classifier Architecture Search*, AAAI 2019, arXiv 1802.01548;
    with the choice among the best of a sample of Dong et al., *DisWOT*, CVPR 2023, arXiv 2303.15678.
    """
    alive: deque[Scored[A]] = deque(maxlen=population)
    for _ in range(population):
        alive.append(_random(space, score, draws))
        yield alive[-1]
    while True:
        drawn = sorted((draws.choice(alive) for _ in range(sample)), key=attrgetter("score"), reverse=True)
        parent = draws.choice(drawn[:parents])
        alive.append(_child(space, score, draws, parent) if draws.random() < mutation_rate else parent)
        yield alive[-1]


def random_search(space: Drawable[A], score: Score[A], draws: random.Random) -> Iterator[Scored[A]]:
    """Independent random architectures without end; arguments and errors as of :func:`aging_evolution`."""
    while True:
        yield _random(space, score, draws)


def ranked(history: Sequence[Scored[A]]) -> list[Scored[A]]:
    """Each architecture of a history once, from the best to the worst; of equals the one that was seen first."""
    first = {found.architecture: found for found in reversed(history)}
    order = dict.fromkeys(found.architecture for found in history)
    return sorted((first[architecture] for architecture in order), key=attrgetter("score"), reverse=True)


def _random(space: Drawable[A], score: Score[A], draws: random.Random) -> Scored[A]:
    for _ in range(_ATTEMPTS):
        architecture = space.sample(draws)
        value = score(architecture)
        if value is not None:
            return Scored(architecture, value)
    raise IncompatibleError(
        f"of {_ATTEMPTS} random architectures none was admitted", "raise the limits of their cost, or widen the space"
    )


def _child(space: Drawable[A], score: Score[A], draws: random.Random, parent: Scored[A]) -> Scored[A]:
    """A mutation that is admitted; the parent again where all of its neighbours seem to be refused."""
    for _ in range(_ATTEMPTS):
        architecture = space.mutate(parent.architecture, draws)
        value = score(architecture)
        if value is not None:
            return Scored(architecture, value)
    return parent
