"""Spaces of architectures: what can be drawn, changed, built and priced; and the space of a model's arguments."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.models.describe import count_flops, count_parameters

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an architecture costs: its parameters, and the operations of one forward pass of one item (a multiplication
    with its addition counts as two)."""

    parameters: int
    flops: float


Choice = tuple[int, ...]
"""An architecture of an `ArgumentSpace`: for each gene, in order, the number of its value."""


@dataclass(frozen=True)
class ArgumentSpace:
    """All combinations of values that some arguments of a model's builder may take.

    Args:
        genes: the values by argument; a path such as `layers.0` is an entry of an argument that is a list.
        builder: makes the model from the arguments that are varied and a seed of its weights.
        example: items for counting operations.
    """

    genes: Mapping[str, Sequence[Any]]
    builder: Callable[[Arguments, int | None], nn.Module]
    example: Batch

    def __len__(self) -> int:
        size = 1
        for values in self.genes.values():
            size *= len(values)
        return size

    def __iter__(self) -> Iterator[Choice]:
        return itertools.product(*(range(len(values)) for values in self.genes.values()))

    def sample(self, draws: random.Random) -> Choice:
        """Each gene's value with equal probability."""
        return tuple(draws.randrange(len(values)) for values in self.genes.values())

    def mutate(self, architecture: Choice, draws: random.Random) -> Choice:
        """One gene takes another of its values; the same architecture where no gene has another."""
        sizes = [len(values) for values in self.genes.values()]
        movable = [place for place, size in enumerate(sizes) if size > 1]
        if not movable:
            return architecture
        place = draws.choice(movable)
        others = [value for value in range(sizes[place]) if value != architecture[place]]
        return (*architecture[:place], draws.choice(others), *architecture[place + 1 :])

    def arguments(self, architecture: Choice) -> Arguments:
        """The values of an architecture by argument, as in a recipe."""
        pairs = zip(self.genes.items(), architecture, strict=True)
        return {name: values[number] for (name, values), number in pairs}

    def build(self, architecture: Choice, seed: int | None) -> nn.Module:
        """The model with these arguments."""
        return self.builder(self.arguments(architecture), seed)

    def cost(self, architecture: Choice) -> Cost:
        """Parameters, and operations on the example's image size."""
        model = self.build(architecture, None)
        return Cost(count_parameters(model), count_flops(model, self.example))


def with_arguments(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Arguments:
    """A model's arguments with some of them changed.

    Args:
        base: arguments by name.
        changes: values by name, or by a path such as `layers.0` into an argument that is a list or a mapping.

    Raises:
        IncompatibleError: a path leads to nothing in `base`.
    """
    merged = copy.deepcopy(dict(base))
    for path, value in changes.items():
        *outer, last = path.split(".")
        place: Any = merged
        try:
            for part in outer:
                place = place[_key(place, part)]
            if isinstance(place, list):
                place[_key(place, last)]  # an entry that is there
            place[_key(place, last)] = value
        except (KeyError, IndexError, TypeError, ValueError):
            raise IncompatibleError(
                f"the arguments of the student have no entry '{path}' that could be varied",
                f"give '{path.partition('.')[0]}' in student.arguments",
            ) from None
    return merged


def _key(place: Any, part: str) -> Any:
    return int(part) if isinstance(place, list) else part
