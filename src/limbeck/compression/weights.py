"""Which parameters of a model are compressed, and running the model with other ones in their place."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

Outcome = TypeVar("Outcome")


def chosen_weights(
    model: nn.Module, *, matrices_only: bool = False, first_and_last: bool = True
) -> dict[str, nn.Parameter]:
    """Floating-point parameters of a model by name, tied ones once.

    Args:
        model: any network.
        matrices_only: leave out biases and the parameters of norms: whatever has fewer than two dimensions.
        first_and_last: include the first and the last layer: the modules that own the first and the last matrix.
    """
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point() and value.numel()}
    matrices = [name for name, value in named.items() if value.ndim > 1]
    if not first_and_last and matrices:
        ends = {_owner(matrices[0]), _owner(matrices[-1])}
        named = {name: value for name, value in named.items() if _owner(name) not in ends}
    return {name: value for name, value in named.items() if value.ndim > 1 or not matrices_only}


def run_with(model: nn.Module, weights: Mapping[str, Tensor], function: Callable[[nn.Module], Outcome]) -> Outcome:
    """`function(model)` with other tensors in the place of some parameters, tied ones included.

    The model's own parameters are untouched and back in place on return. The tensors may have a history: gradients flow
    through them to whatever they were made of, such as the full-precision weights behind quantised ones. Buffers, such
    as batch-norm statistics, are the model's own and move as ever.

    Args:
        model: any network, called by `function` in whatever way.
        weights: by parameter name; what is not named stays.
        function: what to do with the model; it must not keep it.
    """
    named = {f"network.{name}": value for name, value in weights.items()}
    return functional_call(_Caller(model), named, (function,))


class _Caller(nn.Module):
    """Lets a function be run within `functional_call`, which itself only calls a module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.network)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
