"""Which layers a conversion works on: one pair of options and one answer for all that thin out or round weights."""

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
