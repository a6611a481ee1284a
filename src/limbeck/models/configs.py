"""What the shipped networks are made of, as closed, typed configurations that need no torch to be checked."""

from typing import Literal

from pydantic import Field, model_validator

from limbeck.core.options import OptionsBase

Norm = Literal["batch", "group", "none"]


class ConvNetConfig(OptionsBase):
    """Constructor arguments of `ConvNet`."""

    channels: int = Field(1, ge=1, le=1024, description="channels of the images")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    width: int = Field(16, ge=1, le=4096, description="channels of the first stage; each later stage doubles them")
    depth: int = Field(3, ge=1, le=8, description="stages; each after the first halves the resolution")
    blocks: int = Field(1, ge=1, le=32, description="convolutions a stage")
    norm: Norm = Field("batch", description="normalisation after each convolution")


class VisionTransformerConfig(OptionsBase):
    """Constructor arguments of `VisionTransformer`."""

    image_size: int = Field(32, ge=1, le=4096, description="side of the square images in pixels")
    patch_size: int = Field(4, ge=1, le=1024, description="side of a patch in pixels; divides image_size")
    channels: int = Field(3, ge=1, le=1024, description="channels of the images")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    dim: int = Field(64, ge=1, le=16384, description="width of a token; a multiple of heads")
    depth: int = Field(4, ge=1, le=200, description="transformer blocks")
    heads: int = Field(4, ge=1, le=256, description="attention heads")
    distilled: bool = Field(False, description="add DeiT's distillation token with a head of its own")

    @model_validator(mode="after")
    def _divides(self) -> "VisionTransformerConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide image_size ({self.image_size})")
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        return self


class MLPConfig(OptionsBase):
    """Constructor arguments of `MLP`."""

    inputs: int = Field(64, ge=1, description="numbers an item, after flattening")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    width: int = Field(64, ge=1, le=65536, description="units of each hidden layer")
    depth: int = Field(2, ge=0, le=64, description="hidden layers; 0 is a linear classifier")


SHIPPED: dict[str, type[OptionsBase]] = {"convnet": ConvNetConfig, "mlp": MLPConfig, "vit": VisionTransformerConfig}
"""The configuration of each shipped network by its name in recipes."""
