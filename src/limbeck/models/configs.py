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
    kernel: int = Field(3, ge=1, le=31, description="side of the kernels, odd; the first convolution is always 3x3")
    skip: bool = Field(False, description="add each convolution's input to its output")
    neck: int = Field(0, ge=0, le=65536, description="channels of a 1x1 convolution before the head; 0 for none")

    @model_validator(mode="after")
    def _centred(self) -> "ConvNetConfig":
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel ({self.kernel}) must be odd")
        return self


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


Operation = Literal["none", "skip", "conv1", "conv3", "pool"]


class CellNetConfig(OptionsBase):
    """Constructor arguments of `CellNet`."""

    channels: int = Field(3, ge=1, le=1024, description="channels of the images")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    width: int = Field(16, ge=1, le=4096, description="channels of the first stage; each later stage doubles them")
    cells: int = Field(5, ge=1, le=64, description="cells a stage; there are three stages")
    edge_10: Operation = Field("conv3", description="operation from node 0 to node 1 of every cell")
    edge_20: Operation = Field("skip", description="operation from node 0 to node 2")
    edge_21: Operation = Field("conv3", description="operation from node 1 to node 2")
    edge_30: Operation = Field("skip", description="operation from node 0 to node 3")
    edge_31: Operation = Field("skip", description="operation from node 1 to node 3")
    edge_32: Operation = Field("conv3", description="operation from node 2 to node 3")


class DenoiserConfig(OptionsBase):
    """Constructor arguments of `DenoisingMLP`."""

    numbers: int = Field(64, ge=1, description="numbers an item, after flattening")
    classes: int = Field(0, ge=0, le=1_000_000, description="classes to condition on; 0 for none")
    width: int = Field(256, ge=1, le=65536, description="units of each layer")
    depth: int = Field(3, ge=1, le=64, description="residual layers")
    guidance: bool = Field(False, description="take the guidance scale as an input")


class StackedConfig(DenoiserConfig):
    """Constructor arguments of `StackedDenoiser`."""

    wiring: Literal["steps", "plain"] = Field(
        "steps", description="the second network sees half a step by the first, or its bare output"
    )


class MLPConfig(OptionsBase):
    """Constructor arguments of `MLP`."""

    inputs: int = Field(64, ge=1, description="numbers an item, after flattening")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    width: int = Field(64, ge=1, le=65536, description="units of each hidden layer")
    depth: int = Field(2, ge=0, le=64, description="hidden layers; 0 is a linear classifier")


SHIPPED: dict[str, type[OptionsBase]] = {
    "cell": CellNetConfig,
    "convnet": ConvNetConfig,
    "denoiser": DenoiserConfig,
    "mlp": MLPConfig,
    "stacked-denoiser": StackedConfig,
    "vit": VisionTransformerConfig,
}
"""The configuration of each shipped network by its name in recipes."""
