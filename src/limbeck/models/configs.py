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


Behind = Literal["white", "black", "gray", "trained"]


class SceneConfig(OptionsBase):
    """What the shipped scenes have in common."""

    particles: int = Field(1, ge=1, le=64, description="scenes that are trained side by side and share nothing")
    background: Behind = Field("white", description="behind the scene; trained is a network from directions to colours")
    elevation: float = Field(17.5, ge=-90, le=90, description="degrees, of the cameras that show the finished scene")
    distance: float = Field(1.25, gt=0, le=1e6, description="of these cameras from the origin, world units")
    fov: float = Field(55.0, ge=1, le=170, description="of these cameras, vertical, degrees")


class FieldSceneConfig(SceneConfig):
    """What the shipped radiance fields have in common."""

    samples: int = Field(64, ge=1, le=4096, description="steps along a ray")
    resampled: int = Field(0, ge=0, le=4096, description="steps of a second pass, placed by the first; 0 for none")
    bound: float = Field(1.0, gt=0, le=1e6, description="half the side of the field's cube, world units")
    blob: float = Field(10.0, ge=-1000, le=1000, description="strength of the ball that it starts from; below 0 hollow")
    blob_radius: float = Field(0.5, gt=0, le=1e6, description="radius of that ball, world units")


class VoxelSceneConfig(FieldSceneConfig):
    """Constructor arguments of `VoxelScenes`."""

    resolution: int = Field(24, ge=2, le=512, description="values along each side of the grid")
    samples: int = Field(48, ge=1, le=4096, description="steps along a ray")
    bound: float = Field(0.6, gt=0, le=1e6, description="half the side of the field's cube, world units")
    noise: float = Field(0.1, ge=0, le=10, description="deviation of the grid's first values")


class HashSceneConfig(FieldSceneConfig):
    """Constructor arguments of `HashScenes`."""

    levels: int = Field(8, ge=1, le=32, description="feature grids")
    table: int = Field(15, ge=4, le=24, description="log2 of the entries of each grid's table")
    base: int = Field(16, ge=2, le=512, description="resolution of the coarsest grid")
    width: int = Field(32, ge=1, le=1024, description="hidden units of the network")


class GaussianSceneConfig(SceneConfig):
    """Constructor arguments of `GaussianScenes`."""

    count: int = Field(256, ge=1, le=10_000_000, description="Gaussians")
    radius: float = Field(0.5, gt=0, le=1e6, description="of the ball that they start in, world units")
    opacity: float = Field(0.1, gt=0, lt=1, description="of every Gaussian at the start")
    degree: int = Field(0, ge=0, le=1, description="of the spherical harmonics of their colours")


class MeshSceneConfig(SceneConfig):
    """Constructor arguments of `MeshScenes`."""

    subdivisions: int = Field(3, ge=0, le=8, description="of an octahedron: 8 triangles become four times as many each")
    radius: float = Field(0.4, gt=0, le=1e6, description="of the sphere, world units")
    noise: float = Field(0.01, ge=0, le=1, description="deviation of the first vertices, in radii")


class ImageSceneConfig(OptionsBase):
    """Constructor arguments of `ImageScenes`."""

    particles: int = Field(1, ge=1, le=1_000_000, description="images that are trained side by side")
    channels: int = Field(3, ge=1, le=1024, description="channels of the images")
    height: int = Field(32, ge=1, le=8192, description="of the images, pixels")
    width: int = Field(32, ge=1, le=8192, description="of the images, pixels")
    noise: float = Field(1.0, ge=0, le=1000, description="deviation of the first values; of logits where bounded")
    bounded: bool = Field(
        False, description="keep the images in [0, 1]; else they are what the teacher works on, such as latents"
    )


Start = Literal["real", "noise", "kmeans", "herding", "k-centre"]
Augmentation = Literal["flip", "color", "crop", "cutout", "scale", "rotate"]


class SyntheticSetConfig(OptionsBase):
    """Constructor arguments of `SyntheticImages`."""

    channels: int = Field(1, ge=1, le=1024, description="channels of the images")
    height: int = Field(32, ge=1, le=8192, description="of the images, pixels")
    width: int = Field(32, ge=1, le=8192, description="of the images, pixels")
    classes: int = Field(10, ge=1, le=1_000_000, description="classes")
    per_class: int = Field(10, ge=1, le=1_000_000, description="images of each class")
    start: Start = Field(
        "real", description="begin with drawn real images, with noise, or with real images chosen by their pixels"
    )
    augmentation: tuple[Augmentation, ...] = Field(
        ("color", "crop", "cutout", "flip", "scale", "rotate"),
        description="siamese augmentation of the images; leave flip out where a mirrored image is another thing",
    )
    soft: bool = Field(False, description="labels are probabilities, and not classes")
    lr: float | None = Field(
        None, gt=0, le=1000, description="step size of networks on the images, trained along; none if absent"
    )
    begun: bool = Field(False, description="the images are stored with the set: they do not start anew")
    whitened: bool = Field(False, description="how the images were whitened is stored with the set")


ExpertNetwork = Literal["pooled-convnet", "mlp"]
BlockNorm = Literal["instance", "batch", "none"]


class ExpertsConfig(OptionsBase):
    """Constructor arguments of `Experts`."""

    network: ExpertNetwork = Field("pooled-convnet", description="ConvNet-D of the papers, or a perceptron")
    channels: int = Field(3, ge=1, le=1024, description="channels of the images")
    height: int = Field(32, ge=1, le=8192, description="of the images, pixels")
    side: int = Field(32, ge=1, le=8192, description="width of the images, pixels")
    classes: int = Field(10, ge=1, le=1_000_000, description="logits")
    width: int = Field(128, ge=1, le=65536, description="channels of every block; units of every hidden layer")
    depth: int = Field(3, ge=1, le=8, description="blocks, each of which halves the resolution; hidden layers")
    norm: BlockNorm = Field("instance", description="normalisation of the pooled-convnet")
    experts: int = Field(100, ge=1, le=100_000, description="networks whose training is kept")
    epochs: int = Field(50, ge=1, le=100_000, description="epochs that each is trained")


SHIPPED: dict[str, type[OptionsBase]] = {
    "cell": CellNetConfig,
    "convnet": ConvNetConfig,
    "denoiser": DenoiserConfig,
    "experts": ExpertsConfig,
    "mlp": MLPConfig,
    "scene-gaussians": GaussianSceneConfig,
    "scene-hash": HashSceneConfig,
    "scene-images": ImageSceneConfig,
    "scene-mesh": MeshSceneConfig,
    "scene-voxels": VoxelSceneConfig,
    "stacked-denoiser": StackedConfig,
    "synthetic-set": SyntheticSetConfig,
    "vit": VisionTransformerConfig,
}
"""The configuration of each shipped network by its name in recipes."""
