"""Layers seen as matrices: which layers hold the weights that count, and what comes into them."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_HEADS = ("lm_head", "head", "classifier", "score", "fc")


def is_matrix_layer(module: nn.Module) -> bool:
    """Whether a layer multiplies its input by a matrix: linear, convolutional (1-d, 2-d), or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or is_transposed(module)


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer that keeps its weight as (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def matrix_layers(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers whose weights are worth thinning out or rounding, by module path, in the model's own order.

    Embeddings and norms are no matrix layers. Without `include` the output head stays out too, and so does every weight
    that an embedding shares. Of layers that share one weight the first stands for all.

    Args:
        model: any network.
        include: globs of module paths; all but the head if absent.
        exclude: globs of module paths that are left out of these.

    Raises:
        ValueError: a glob matches no matrix layer, or nothing is left.
    """
    found = {path: module for path, module in model.named_modules() if path and is_matrix_layer(module)}
    for pattern in (*(include or ()), *exclude):
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"'{pattern}' matches no linear or convolutional layer among {', '.join([*found][:12])}")
    if include is None:
        dense = {id(module) for module in _heads(model, found)} | {id(m.weight) for m in _embeddings(model)}
        found = {path: m for path, m in found.items() if not {id(m), id(m.weight)} & dense}
    else:
        found = {path: m for path, m in found.items() if any(fnmatch.fnmatchcase(path, p) for p in include)}
    found = {path: m for path, m in found.items() if not any(fnmatch.fnmatchcase(path, p) for p in exclude)}
    first = {id(module.weight): path for path, module in reversed(found.items())}
    found = {path: module for path, module in found.items() if first[id(module.weight)] == path}
    if not found:
        raise ValueError(f"no linear or convolutional layer of the {type(model).__name__} is left")
    return found


def as_matrices(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as (groups, outputs, inputs); groups is 1 but for grouped convolutions.

    Linear layers and convolutions give a view, GPT-2's Conv1D, which keeps (inputs, outputs), a transposed one.
    """
    if is_transposed(layer):
        return tensor.t().unsqueeze(0)
    return tensor.reshape(_groups(layer), -1, tensor[0].numel())


def from_matrices(layer: nn.Module, matrices: Tensor) -> Tensor:
    """The inverse of `as_matrices`: (groups, outputs, inputs) in the shape of the layer's weight."""
    if is_transposed(layer):
        return matrices[0].t()
    return matrices.reshape(_shape(layer))


def input_rows(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the matrices of a layer are multiplied with: (groups, samples, inputs).

    Args:
        layer: a matrix layer.
        x: its input, (*samples, inputs) or, of a convolution, (items, channels, *positions); each place of the kernel
            is then a sample of its own.
        mask: True for samples that count, (*samples,); ignored where its shape is another, as of images.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        kept = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
        return kept.unsqueeze(0)
    flat = isinstance(layer, nn.Conv1d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [layer.kernel_size, layer.dilation, layer.stride]
    kernel, dilation, stride = [(1, *size) if flat else size for size in sizes]
    patches = F.unfold(padded.unsqueeze(2) if flat else padded, kernel, dilation=dilation, stride=stride)
    grouped = patches.unflatten(1, (layer.groups, -1))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


class LayerInput(NamedTuple):
    """What is known of a layer's inputs.

    Attributes:
        products: sum over samples of x x^T, (groups, inputs, inputs) float32; the squares alone as (groups, inputs).
        samples: how many there were.
    """

    products: Tensor
    samples: int


class _AllReached(Exception):
    """Ends a forward pass whose remaining layers nobody asks about."""


class InputStatistics:
    """Sums what comes into layers while a network runs within its context; nothing stays on the network afterwards.

    Args:
        layers: matrix layers by path.
        squares: keep the sums of squares alone, not of all products.

    Attributes:
        found: what was summed, by path; of layers that were not reached there is nothing.
        mask: True for tokens that count (items, length), set before each pass; None where all do.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, squares: bool = False) -> None:
        self.layers, self.squares = dict(layers), squares
        self.found: dict[str, LayerInput] = {}
        self.mask: Bool[Tensor, "items length"] | None = None
        self._handles: list[Any] = []
        self._until: set[str] | None = None

    def __enter__(self) -> "InputStatistics":
        self._handles = [
            layer.register_forward_pre_hook(self._listener(path), with_kwargs=True)
            for path, layer in self.layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def during(self, forward: Any, mask: Tensor | None = None) -> None:
        """Calls `forward`, which runs the network, and ends it once every layer has been reached.

        Layers that a pass reaches several times, as shared ones, count each time but after the last of the others.
        """
        self.mask, self._until = mask, set(self.layers)
        try:
            forward()
        except _AllReached:
            pass
        finally:
            self._until = None

    def _listener(self, path: str) -> Any:
        def hook(layer: nn.Module, args: Any, options: Any) -> None:
            self._add(path, layer, args[0] if args else next(iter(options.values())))
            if self._until is not None:
                self._until.discard(path)
                if not self._until:
                    raise _AllReached

        return hook

    @torch.no_grad()
    def _add(self, path: str, layer: nn.Module, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            rows = input_rows(layer, x.detach(), self.mask)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            products = rows.square().sum(1) if self.squares else rows.mT @ rows
        before = self.found.get(path)
        total = products if before is None else before.products + products
        self.found[path] = LayerInput(total, rows.shape[1] + (before.samples if before else 0))


def reached_in_order(layers: Mapping[str, nn.Module], forward: Any) -> list[str]:
    """Paths of the layers that a forward pass reaches, in the order in which it first does."""
    order: dict[str, None] = {}

    def noting(path: str) -> Any:
        return lambda layer, args: order.setdefault(path)

    handles = [layer.register_forward_pre_hook(noting(path)) for path, layer in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def reconstruction_error(
    before: Float[Tensor, "groups outputs inputs"],
    after: Float[Tensor, "groups outputs inputs"],
    products: Float[Tensor, "groups inputs inputs"],
) -> Float[Tensor, ""]:
    """Squared error of a layer's outputs over their own square, `|(W - W') X|^2 / |W X|^2`, from the inputs' X X^T.

    0 for equal weights, 1 for a layer that gives nothing any more.
    """
    before, gap = before.double(), before.double() - after.double()
    products = products.double()

    def energy(weight: Tensor) -> Tensor:
        return ((weight @ products) * weight).sum()

    return (energy(gap) / energy(before).clamp_min(torch.finfo(torch.float64).tiny)).float()


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else 1


def _shape(layer: nn.Module) -> torch.Size:
    weight: Any = layer.weight
    return weight.shape


def _heads(model: nn.Module, found: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The output layers: what the model names as such, else a child with a usual name, else its last layer."""
    for name in ("get_output_embeddings", "get_classifier"):
        ask: Any = getattr(model, name, None)
        head = ask() if callable(ask) else None
        if isinstance(head, nn.Module):
            return list(head.modules())
    named = [child for name, child in model.named_children() if name in _HEADS]
    inside: list[nn.Module] = [module for child in named for module in child.modules()]
    return inside or [*found.values()][-1:]


def _embeddings(model: nn.Module) -> Iterable[nn.Embedding]:
    return (module for module in model.modules() if isinstance(module, nn.Embedding))
