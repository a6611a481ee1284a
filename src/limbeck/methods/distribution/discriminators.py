"""Critics of a game that look at noised items through the eyes of a diffusion network: features of a truncated pass."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps, match_modules
from limbeck.diffusion.denoiser import Condition, Denoiser, NetworkDenoiser, Transported


class Discriminator(nn.Module):
    """Heads on features of a denoiser at (x_t, t, condition): positive logits mean real.

    The features are another network's, which is given at each call; the pass ends where the last of them is known.

    Args:
        denoiser: whose features they are.
        x_t: a few noised items, which the heads' shapes are read from.
        t: their times.
        condition: of them.
        layers: module paths or globs; the middle of the network if empty.
    """

    def __init__(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, layers: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.paths = match_modules(network_behind(denoiser), layers or [middle_layer(network_behind(denoiser))])
        with torch.no_grad():
            features = self.features(denoiser, x_t, t, condition)
        self.heads = nn.ModuleList(head_for(feature) for feature in features)

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits (items, heads); graphs reach whatever of the denoiser and the items requires gradients."""
        features = self.features(denoiser, x_t, t, condition)
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], 1)

    def features(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """The tapped outputs, one a layer."""
        with Taps(network_behind(denoiser), self.paths, stop=True) as taps:
            taps.during(lambda: denoiser(x_t, t, condition))
            return [value.to(torch.promote_types(value.dtype, torch.float32)) for value in taps.values()]


def network_behind(denoiser: Denoiser) -> nn.Module:
    """The network that a denoiser asks.

    Raises:
        IncompatibleError: it asks none, such as an exact denoiser.
    """
    if isinstance(denoiser, NetworkDenoiser):
        return denoiser.network
    if isinstance(denoiser, Transported):
        return network_behind(denoiser.denoiser)
    raise IncompatibleError(
        f"a {type(denoiser).__name__} is no network with features", "let the discriminator see others: features: own"
    )


def middle_layer(network: nn.Module) -> str:
    """The bottleneck of a U-Net, or the middle block of the longest row of blocks.

    Raises:
        IncompatibleError: there is neither.
    """
    modules = dict(network.named_modules())
    bottleneck = next((name for name in modules if name.rpartition(".")[2] == "mid_block"), None)
    if bottleneck is not None:
        return bottleneck
    rows = [(name, module) for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    if not rows:
        raise IncompatibleError(f"no middle is known of a {type(network).__name__}", "name layers in feature_layers")
    name, row = max(rows, key=lambda entry: len(entry[1]))
    return f"{name}.{(len(row) - 1) // 2}"


def head_for(feature: Tensor) -> nn.Sequential:
    """A head that makes logits (items, places) of features in the shape of `feature`.

    Maps (items, channels, height, width): convolutions of stride 2 down to 4 x 4, one over all that is left, and one
    logit, as in DMD2. Vectors (items, width), and tokens (items, tokens, width) in their mean: two layers.
    """
    if feature.ndim == 4:
        return _map_head(feature.shape[1], min(feature.shape[2:]))
    if feature.ndim not in (2, 3):
        raise IncompatibleError(f"no head is known for features of shape {tuple(feature.shape)}", "tap other layers")
    width = feature.shape[-1]
    pool = [_MeanOverTokens()] if feature.ndim == 3 else []
    return nn.Sequential(*pool, nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 1))


def _map_head(channels: int, size: int) -> nn.Sequential:
    def normalised() -> list[nn.Module]:
        return [nn.GroupNorm(gcd(32, channels), channels), nn.SiLU()]

    layers: list[nn.Module] = []
    while size >= 8:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), *normalised()]
        size //= 2
    window = min(size, 4)
    layers += [nn.Conv2d(channels, channels, window, window), *normalised(), nn.Conv2d(channels, 1, 1)]
    return nn.Sequential(*layers, nn.Flatten())


class _MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
