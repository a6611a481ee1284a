"""Unrolled inner loops: training a network with gradients that reach through every step of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]
"""A network's parameters by name."""

InnerLoss = Callable[..., Tensor]
"""(weights, step, *shared) -> loss: the scalar loss of weights at a step counted from 0, a function of these alone."""


class Stateless:
    """A network as a function of weights that are not its own: in train mode, and nothing of it is changed.

    Layers that keep statistics of their batches use those of the batch at hand, and forget them.

    Args:
        network: gives the structure; its mode, weights and buffers stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, weights: Weights, images: Float[Tensor, "items *shape"]) -> Tensor:
        """What the network, with these weights, makes of images; logits (items, classes) for a classifier."""
        state = {name: buffer.detach().clone() for name, buffer in self.network.named_buffers()}
        resting = [part for part in self.network.modules() if not part.training]
        try:
            for part in resting:
                part.training = True
            return functional_call(self.network, {**state, **weights}, (images,))
        finally:
            for part in resting:
                part.training = False


def unrolled_sgd(
    weights: Mapping[str, Tensor],
    loss: InnerLoss,
    shared: Sequence[Tensor],
    lr: Tensor | float,
    steps: int,
    *,
    chunk: int = 0,
) -> Weights:
    r"""Plain SGD whose result is differentiable in the first weights, in `shared` and in `lr`.

    .. math:: \theta_{i+1} = \theta_i - a \nabla_\theta L(\theta_i, i)

    The graph of all steps grows with their number. In chunks, what is held is the graph of one chunk and the weights
    between chunks: with about the square root of `steps` in a chunk, memory grows with that square root, for the price
    of one more pass. (`torch.utils.checkpoint` does not serve here: an inner gradient makes it recompute at once.)

    Args:
        weights: where to start.
        loss: what is descended. It may draw from torch's global stream, which repeats itself in the second pass, and
            from no other; what it holds besides `shared` gets no gradient from a loop in chunks.
        shared: tensors that the loss takes at every step, such as images and labels.
        lr: step size a, a scalar.
        steps: how many; 0 returns the start.
        chunk: steps that are recomputed together in the backward pass; 0 keeps the whole graph.

    Returns:
        The last weights.
    """
    if not chunk:
        return _descend(dict(weights), loss, tuple(shared), lr, range(steps), graph=True)
    rate = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)  # rounded no more than a number is
    names, values = tuple(weights), tuple(weights.values())
    for first in range(0, steps, chunk):
        part = _Part(names, loss, range(first, min(first + chunk, steps)))
        values = _Chunk.apply(part, *values, *shared, rate)
    return dict(zip(names, values, strict=True))


class _Part(NamedTuple):
    """Some consecutive steps of a loop."""

    names: tuple[str, ...]
    loss: InnerLoss
    steps: range

    def run(self, inputs: Sequence[Tensor], graph: bool) -> tuple[Tensor, ...]:
        count = len(self.names)
        weights = dict(zip(self.names, inputs[:count], strict=True))
        end = _descend(weights, self.loss, tuple(inputs[count:-1]), inputs[-1], self.steps, graph)
        return tuple(end.values())


class _Chunk(torch.autograd.Function):
    """Steps that leave no graph; their backward pass takes them once more, with one."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.part, ctx.device = part, inputs[0].device
        ctx.stream = _stream(ctx.device)
        kind = ctx.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*inputs)
        return part.run([tensor.detach() for tensor in inputs], graph=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        kind, dtype, enabled = ctx.autocast
        with _repeating(ctx.stream, ctx.device), torch.autocast(kind, dtype, enabled), torch.enable_grad():
            outputs = ctx.part.run(inputs, graph=True)
        sought = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, sought, slopes, allow_unused=True))
        return (None, *(next(found) if tensor.requires_grad else None for tensor in inputs))


def _descend(
    weights: Weights, loss: InnerLoss, shared: tuple[Tensor, ...], lr: Tensor | float, steps: range, graph: bool
) -> Weights:
    for step in steps:
        with torch.enable_grad():
            leaves = {name: value if value.requires_grad else value.detach() for name, value in weights.items()}
            for value in leaves.values():
                value.requires_grad_()
            slopes = torch.autograd.grad(loss(leaves, step, *shared), list(leaves.values()), create_graph=graph)
        pairs = zip(leaves.items(), slopes, strict=True)
        if graph:
            weights = {name: value - lr * slope for (name, value), slope in pairs}
        else:
            weights = {name: value.detach() - lr * slope for (name, value), slope in pairs}
    return weights


def _stream(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _repeating(state: Tensor, device: torch.device) -> Iterator[None]:
    """Within it torch's stream goes on from `state`; afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def trajectory_loss(end: Mapping[str, Tensor], target: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    r"""How far training ended from an expert's later weights, relative to how far these lie from its start.

    .. math:: L = \frac{\lVert \hat\theta_N - \theta^*_{t+M} \rVert^2}{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2}

    0 where the end is the target, 1 where it is the start. All weights count together. The denominator carries no
    graph. Source: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", 2022.

    Args:
        end: weights after the inner loop, by name.
        target: the expert's weights that these should be.
        start: the expert's weights that the loop began with; at another place than the target.
    """
    with torch.no_grad():
        way = _squared_distance(start, target)
    return _squared_distance(end, target) / way


def _squared_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(_exact(one[name]) - _exact(other[name])).square().sum() for name in one]).sum()


def _exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
