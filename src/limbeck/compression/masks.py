"""Masks of zeros: choosing which weights stay, and keeping the others at zero while a network is trained."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Scope = Literal["tensor", "row", "global"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """At most `kept` weights that are not zero in each run of `run` inputs, as sparse matrix units want it.

    Attributes:
        kept: how many may stay, at least 1.
        run: length of a run, above `kept`.
    """

    kept: int
    run: int

    @classmethod
    def parse(cls, text: str) -> "Pattern | None":
        """`2:4` as a pattern; None for "unstructured".

        Raises:
            ValueError: it is neither.
        """
        if text == "unstructured":
            return None
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"'{text}' is no pattern: say unstructured, or KEPT:RUN as 2:4")
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.run


def keep_largest(
    scores: Float[Tensor, "groups outputs inputs"], sparsity: float, scope: Literal["tensor", "row"] = "tensor"
) -> Bool[Tensor, "groups outputs inputs"]:
    """True for the weights that stay: exactly round(sparsity x count) of the smallest scores go, ties by position.

    Args:
        scores: of a layer's weights.
        sparsity: share of zeros, in [0, 1].
        scope: compare all weights of the layer, or those of each output with each other.

    Raises:
        ValueError: the sparsity is no share.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity lies in [0, 1], not {sparsity}")
    rows = scores.flatten(0, 1) if scope == "row" else scores.reshape(1, -1)
    return keep_but(rows, round(sparsity * rows.shape[1])).view(scores.shape)


def keep_but(scores: Float[Tensor, "rows entries"], removed: int) -> Bool[Tensor, "rows entries"]:
    """True for all entries of each row but the `removed` smallest."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    if removed:
        keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, :removed], False)
    return keep


def keep_pattern(
    scores: Float[Tensor, "groups outputs inputs"], pattern: Pattern
) -> Bool[Tensor, "groups outputs inputs"]:
    """True for the `kept` largest scores in each run of inputs.

    Raises:
        ValueError: the inputs are no whole number of runs.
    """
    if scores.shape[-1] % pattern.run:
        raise ValueError(f"{scores.shape[-1]} inputs are no whole number of runs of {pattern.run}: leave the layer out")
    runs = scores.reshape(-1, pattern.run)
    return keep_but(runs, pattern.run - pattern.kept).view(scores.shape)


def keep_globally(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """True for the weights that stay where all layers' scores are compared with each other."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = keep_but(flat[None], round(sparsity * len(flat)))[0].split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for part, (name, score) in zip(keep, scores.items(), strict=True)}


class Masks(nn.Module):
    """Which weights of a network may differ from zero; buffers, so that checkpoints hold them.

    The network itself is no part of this: it is given to `apply`, which belongs behind every optimizer step, since
    momentum and weight decay move a weight that gets no gradient too. The masks stay whole where weights are sharded,
    and are split like these on use.

    Args:
        keep: by name of the parameter, True where it may differ from zero.
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(keep)
        for name, mask in keep.items():
            self.register_buffer(_buffer(name), mask.clone())

    @classmethod
    def of_zeros(cls, model: nn.Module, names: Iterable[str]) -> "Masks":
        """The masks that a network's own zeros stand for."""
        return cls({name: model.get_parameter(name).detach() != 0 for name in names})

    def __getitem__(self, name: str) -> Bool[Tensor, "*shape"]:
        return self.get_buffer(_buffer(name))

    @torch.no_grad()
    def narrow(self, name: str, keep: Bool[Tensor, "*shape"]) -> None:
        """Takes away from a mask what is False in `keep`; nothing ever comes back."""
        self[name].logical_and_(keep.to(self[name].device))

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Sets what is masked to exactly zero."""
        for name in self.names:
            weight = model.get_parameter(name)
            weight.copy_(torch.where(self._like(name, weight), weight, torch.zeros_like(weight)))

    def mask_gradients(self, model: nn.Module) -> list[Any]:
        """Makes the gradients of masked weights zero from now on; `remove()` of what is returned ends it.

        Zeros are kept by `apply_to` alone; this keeps what they would do out of the gradient's norm and the moments.
        """

        def masked(name: str) -> Any:
            return lambda gradient: gradient * self._like(name, gradient)

        return [model.get_parameter(name).register_hook(masked(name)) for name in self.names]

    def sparsity(self) -> Float[Tensor, ""]:
        """Share of masked weights."""
        total = sum(self[name].numel() for name in self.names)
        kept = torch.stack([self[name].sum() for name in self.names]).sum()
        return 1 - kept / total

    def _like(self, name: str, weight: Tensor) -> Tensor:
        """The mask on the weight's device, and split over processes as the weight is."""
        mask = self[name].to(weight.device)
        placements: Any = getattr(weight, "placements", None)
        if placements is None:
            return mask
        from torch.distributed.tensor import distribute_tensor

        mesh: Any = getattr(weight, "device_mesh", None)
        return distribute_tensor(mask, mesh, placements)


def sparsity_report(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Shares of zeros: `sparsity` over all the named parameters, and `sparsity_by_layer` of each; sharded
    ones are gathered.
    """
    weights = {name: _whole(model.get_parameter(name).detach()) for name in names}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    layers = {name.removesuffix(".weight"): zeros[name] / weight.numel() for name, weight in weights.items()}
    return {"sparsity": sum(zeros.values()) / max(total, 1), "sparsity_by_layer": layers}


def _whole(weight: Tensor) -> Tensor:
    gather: Any = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def _buffer(name: str) -> str:
    """Buffers may not have dots in their names."""
    return name.replace(".", "/")
