"""Between latents and images: what a latent diffusion model's network needs noted where a loss looks at images, or
where images are to be pushed by what the network says of their latents."""

from collections.abc import Callable

from torch import Tensor, nn

Decode = Callable[[Tensor], Tensor]
"""Latents (items, ...) as images (items, channels, height, width) in [-1, 1]."""

Encode = Callable[[Tensor], Tensor]
"""Images (items, channels, height, width) in [-1, 1] as latents (items, ...), with a gradient."""

_ATTRIBUTE = "limbeck_decoder"
_ENCODER = "limbeck_encoder"


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


def note_encoder(network: nn.Module, encode: Encode) -> nn.Module:
    """Notes on a network how images become its latents; returns the network.

    The encoder is no part of the network either. For a VAE of diffusers it is
    `lambda images: vae.encode(images).latent_dist.mode() * vae.config.scaling_factor`.
    """
    network.__dict__[_ENCODER] = encode
    return network


def encoder_of(network: nn.Module) -> Encode | None:
    """The encoder noted on a network; None where what it works on are images themselves."""
    return getattr(network, _ENCODER, None)


def _as_it_is(images: Tensor) -> Tensor:
    return images
