"""The second score of ProlificDreamer and its kin: a copy of a denoiser that is told where the camera stands."""

from typing import Any

from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.low_rank import LowRankNetwork, trainable_copy
from limbeck.diffusion.denoiser import Condition, Denoiser, NetworkDenoiser, Process, Transported
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Schedule

_TIME_LAYERS = ("time", "time_embedding", "time_text_embed")
"""Where networks embed the time: ours, UNets of diffusers, SD3 and Flux."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class CameraScore(nn.Module):
    """A trainable copy of a denoising network, whole or low-rank, with a camera among its inputs.

    A small network turns the 16 numbers of a camera into what is added to the output of the time's embedding. It starts
    at zero, so that the copy begins as what it was copied from. The null camera is 16 zeros.

    Args:
        source: the network to start from; it is not changed.
        process: how it denoises.
        rank: of low-rank additions; None trains a whole copy.
        alpha: numerator of their factor; the rank if absent.
        layers: which layers get additions; attention's projections if absent, all where there are none.
        camera: whether it is told the camera.
        camera_layer: module path of the time's embedding, where it is in no known place.

    Raises:
        IncompatibleError: there is no such layer.
    """

    def __init__(
        self,
        source: nn.Module,
        process: Process,
        rank: int | None = None,
        alpha: float | None = None,
        layers: list[str] | None = None,
        camera: bool = True,
        camera_layer: str | None = None,
    ) -> None:
        super().__init__()
        self.process = process
        self.base: nn.Module = trainable_copy(source)
        if rank is not None:
            chosen = layers or [n for n, _ in source.named_modules() if n.endswith(_ATTENTION)] or None
            self.base = LowRankNetwork(source, rank, alpha, chosen)
        self.camera: nn.Sequential | None = None
        self._added: Tensor | None = None
        if camera:
            place = time_layer(self.network, camera_layer)
            width = [layer for layer in place.modules() if isinstance(layer, nn.Linear)][-1].out_features
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.camera = nn.Sequential(nn.Linear(16, width), nn.SiLU(), last)
            place.register_forward_hook(self._join)  # a bound method: deep copies follow it

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self.base.network if isinstance(self.base, LowRankNetwork) else self.base

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, poses: Tensor | None, schedule: Schedule
    ) -> Prediction:
        """The prediction at noisy items (items, ...), times (items,) of a schedule, and cameras (items, 16) or None."""
        own: Denoiser = NetworkDenoiser(self.network, self.process)
        asked = own if own.schedule.config() == schedule.config() else Transported(own, schedule)
        if self.camera is not None and poses is not None:
            self._added = self.camera(poses.to(x_t.dtype))
        try:
            return asked(x_t, t, condition)
        finally:
            self._added = None

    def _join(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if self._added is None else output + self._added.to(output.dtype)


def time_layer(network: nn.Module, path: str | None = None) -> nn.Module:
    """The module whose output (items, width) says which time it is.

    Raises:
        IncompatibleError: it is in no known place, or holds no linear layer.
    """
    known = dict(network.named_modules())
    found = next((known[name] for name in ([path] if path else _TIME_LAYERS) if name in known), None)
    if found is None or not any(isinstance(layer, nn.Linear) for layer in found.modules()):
        raise IncompatibleError(
            f"a {type(network).__name__} shows no layer that embeds the time",
            "name it in camera_layer, or set camera: none",
        )
    return found
