"""Each layer on the teacher's own hidden states: what a teacher's layers receive, mix and return, and a student whose
layers are given that in place of each other's outputs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps
from limbeck.core.teacher import LiveTeacher


@dataclass(frozen=True)
class LayerSignals:
    """What some modules of a teacher did in one pass, in the order in which they were asked for.

    Attributes:
        inputs: hidden states (items, length, width) that each received.
        outputs: what each returned, of the same shape.
        matrices: attention behind the softmax (items, heads, length, length); empty where it was not asked for.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    matrices: list[Tensor]


def live_model(teacher: Any, purpose: str) -> nn.Module:
    """The network of a live teacher.

    Raises:
        IncompatibleError: the teacher is stored, served or made of several.
    """
    if not isinstance(teacher, LiveTeacher):
        raise IncompatibleError(
            f"{purpose} needs the inner signals of a live teacher, which a {type(teacher).__name__} does not have",
            "give the teacher itself: leave out the stage's cache, the served model or the ensemble",
        )
    return teacher.model


@torch.no_grad()
def observe(model: nn.Module, paths: Sequence[str], batch: Batch, matrices: bool = False) -> LayerSignals:
    """Runs a frozen model as far as the last of some modules and returns what these received and returned.

    Args:
        model: the teacher.
        paths: of attentions or whole blocks.
        batch: of text.
        matrices: of attentions, also the weights behind the softmax. They take items x heads x length² numbers a layer,
            and exist in the eager implementation alone, which is used for this pass.

    Raises:
        IncompatibleError: a module returns no matrices.
    """
    with ExitStack() as stack:
        if matrices:
            stack.enter_context(eager_attention(model))
        before = stack.enter_context(Taps(model, paths, kind="input"))
        weights = stack.enter_context(Taps(model, paths, kind="attention")) if matrices else None
        after = stack.enter_context(Taps(model, paths, stop=True))  # the last hook, since it ends the pass
        after.run(batch)
        return LayerSignals(before.values(), after.values(), [] if weights is None else weights.values())


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Within the context the attentions of a transformers model compute their matrices; afterwards as before."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def forced_inputs(model: nn.Module, paths: Sequence[str], values: Sequence[Tensor]) -> Iterator[None]:
    """Within the context some modules receive the given hidden states, whatever the model passes to them.

    No gradient flows from one of these modules into an earlier one.
    """
    handles = []
    for path, value in zip(paths, values, strict=True):

        def force(module: nn.Module, args: Any, options: Any, value: Tensor = value) -> tuple[Any, Any]:
            if args:
                return (value, *args[1:]), options
            return args, {**options, "hidden_states": value}

        handles.append(model.get_submodule(path).register_forward_pre_hook(force, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
