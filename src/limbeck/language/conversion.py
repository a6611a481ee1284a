"""A causal language model with other mixers in place of its attentions: how methods make one and find their way in it.

What the model is lies in `limbeck.models.adapters.converted`, which needs transformers and is loaded when it is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.language.attention_layers import attention_layers, mlp_parameters
from limbeck.mixers.mixer import Mixer


def is_converted(model: nn.Module) -> bool:
    """Whether a model's attentions have been replaced already."""
    return getattr(getattr(model, "config", None), "model_type", None) == "limbeck-converted"


def convert(
    model: nn.Module, kind: str, arguments: Mapping[str, Any], keep: Sequence[int] = (), carry_values: bool = True
) -> nn.Module:
    """Replaces a model's attentions, in place; all other weights carry over.

    Args:
        model: a causal language model of transformers.
        kind: of mixer, as `limbeck.models.adapters.converted.MIXERS` names it.
        arguments: of the mixers, but for those that the attention settles.
        keep: numbers of the layers, from 0, that keep their attention.
        carry_values: begin with the attention's values and output, behind an open gate and a convolution that passes
            its input on, so that the mixer returns what its matrix makes of the attention's values.

    Raises:
        IncompatibleError: a layer to keep does not exist, none is left to convert, or attentions of an unknown kind.
    """
    from limbeck.models.adapters.converted import convert as replace

    layers = len(attention_layers(model))
    wrong = [layer for layer in keep if layer >= layers]
    if wrong:
        raise IncompatibleError(f"there is no layer {wrong[0]} to keep", f"layers are 0 to {layers - 1}")
    chosen = [layer for layer in range(layers) if layer not in keep]
    if not chosen:
        raise IncompatibleError("all layers keep their attention", "leave some out of keep_attention")
    return replace(model, {layer: {"kind": kind, **arguments} for layer in chosen}, carry_values)


def mixers_of(model: nn.Module) -> dict[str, Mixer]:
    """The mixers of a converted model by the module path of the attention that each stands for, in the model that it
    was: the same path in a teacher of its architecture."""
    converted: Any = model
    return {_before(converted.mixer_paths[layer]): mixer for layer, mixer in converted.mixers().items()}


def mlps_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the MLPs of all blocks of a converted model."""
    converted: Any = model
    for path in converted.attention_paths:
        yield from mlp_parameters(model, path)


def _before(path: str) -> str:
    return path.removeprefix("base.")
