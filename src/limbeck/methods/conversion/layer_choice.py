"""Which layers a conversion works on: one pair of options and one answer for all that thin out or round weights."""

import re
from collections.abc import Iterable
from itertools import groupby

from pydantic import Field
from torch import nn

from limbeck.compression.matrices import matrix_layers
from limbeck.core.errors import IncompatibleError
from limbeck.core.options import OptionsBase


class LayerOptions(OptionsBase):
    """Which layers."""

    layers: list[str] | None = Field(
        None, description="globs of module paths; every linear layer and convolution but the output head if absent"
    )
    exclude: list[str] = Field([], description="globs of module paths that are left as they are")


def chosen_layers(model: nn.Module, options: LayerOptions) -> dict[str, nn.Module]:
    """The layers that the options choose, by path; embeddings and norms are never among them.

    Raises:
        IncompatibleError: a glob matches nothing, or nothing is left.
    """
    try:
        return matrix_layers(model, options.layers, options.exclude)
    except ValueError as error:
        raise IncompatibleError(str(error), "see the options layers and exclude") from error


def by_block(paths: Iterable[str]) -> list[list[str]]:
    """Paths that follow each other within one of the network's blocks, together."""
    return [list(together) for _, together in groupby(paths, down_to_number)]


def down_to_number(path: str) -> str:
    """The path down to the first number: `model.layers.3` of `model.layers.3.mlp.up_proj`; else the whole path."""
    found = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", path)
    return found[1] if found else path
