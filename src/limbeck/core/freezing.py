"""Networks that gradients pass through without their weights taking part."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*modules: nn.Module, evaluating: bool = False) -> Iterator[None]:
    """Within the context the parameters require no gradient, so that graphs recorded there reach inputs alone.

    Such a graph is cheaper, and can be differentiated after the context has ended.

    Args:
        modules: what is frozen; all flags are as before afterwards.
        evaluating: put them in eval mode too.
    """
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    training = [part for module in modules for part in module.modules() if part.training] if evaluating else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for part in training:
            part.training = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for part in training:
            part.training = True
