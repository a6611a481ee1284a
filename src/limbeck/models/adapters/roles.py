"""Several models over one frozen backbone, by adapters of peft."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import AdapterSpec
from limbeck.models.adapters.peft import add_adapter, is_adapted, load_adapter
from limbeck.models.modes import evaluating
from limbeck.models.structure import structural_copy


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context an adapted model is its base model: adapters off, eval mode, no graph.

    What the reference of preference and policy methods asks for, at no memory. Afterwards everything is as before.
    """
    if not is_adapted(model):
        raise IncompatibleError(f"a {type(model).__name__} has no adapter to turn off")
    adapted: Any = model
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with evaluating(model), adapted.disable_adapter():
            yield model
    finally:
        for parameter, wanted in trainable.items():  # peft makes every adapter trainable as it turns it on
            parameter.requires_grad_(wanted)


def roles(
    backbone: nn.Module, adapters: Mapping[str, AdapterSpec | Path | str | None], seed: int = 0
) -> dict[str, nn.Module]:
    """Several models over one frozen backbone that is held in memory once, such as a student and its teacher.

    Each is an ordinary model with modules of its own around the shared weights, so that nothing has to be switched on
    or off: modes, gradient checkpointing and the order of passes are each model's own affair.

    Args:
        backbone: any model; its parameters are frozen. It is not changed otherwise.
        adapters: by role a fresh adapter, the folder of a saved one, or None for the backbone as it is.
        seed: seed of fresh adapters; each role has its own.

    Returns:
        The models by role; fresh and loaded adapters are trainable.
    """
    if is_adapted(backbone):
        raise IncompatibleError("a backbone with an adapter cannot be shared", "give the base model, or merge first")
    backbone.requires_grad_(False)
    return {
        role: _in_role(structural_copy(backbone), adapter, seed, position)
        for position, (role, adapter) in enumerate(adapters.items())
    }


def _in_role(model: nn.Module, adapter: AdapterSpec | Path | str | None, seed: int, position: int) -> nn.Module:
    if adapter is None:
        return model
    if isinstance(adapter, AdapterSpec):
        return add_adapter(model, adapter, seed + position)
    return load_adapter(Path(adapter).expanduser(), model)
