"""From latents to images: what a latent diffusion model's network needs noted where a loss looks at images."""

from collections.abc import Callable

from torch import Tensor, nn

Decode = Callable[[Tensor], Tensor]
"""Latents (items, ...) as images (items, channels, height, width) in [-1, 1]."""

_ATTRIBUTE = "limbeck_decoder"


def note_decoder(network: nn.Module, decode: Decode) -> nn.Module:
    """Notes on a network how its latents become images; returns the network.

    The decoder is no part of the network: it is neither trained nor saved with it. For a VAE of diffusers it is
    `lambda latents: vae.decode(latents / vae.config.scaling_factor).sample`.
    """
    network.__dict__[_ATTRIBUTE] = decode  # past the registration of submodules
    return network


def decoder_of(*networks: nn.Module | None) -> Decode:
    """The first decoder noted on any of the networks; of none, what they work on are images themselves."""
    for network in networks:
        decode = getattr(network, _ATTRIBUTE, None)
        if decode is not None:
            return decode
    return _as_it_is


def _as_it_is(images: Tensor) -> Tensor:
    return images
