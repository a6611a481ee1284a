"""Options that all methods on scenes have in common."""

from typing import Annotated, Literal

from pydantic import Field

from limbeck.core.options import OptionsBase
from limbeck.diffusion.score_distillation import Weight
from limbeck.methods.scenes.views import ViewPrompts

Angle = Annotated[float, Field(ge=-360, le=360)]
Elevation = Annotated[float, Field(ge=-90, le=90)]
Length = Annotated[float, Field(gt=0, le=1e6)]
FieldOfView = Annotated[float, Field(ge=0.1, le=179)]
Label = Annotated[int, Field(ge=0, le=1_000_000)]


class SceneOptions(OptionsBase):
    """What is looked at, how the teacher is asked, and what keeps the scene tidy."""

    labels: list[Label] = Field(
        [], max_length=4, description="what is asked for, in place of the items' labels: one class, or those of "
        "front, side, back (and overhead) views"
    )  # fmt: skip
    view_prompts: ViewPrompts = Field(
        "none", description="take the prompt of the view that is nearest, or mix those of two, where data hold them"
    )
    guidance: float = Field(100.0, ge=0, le=1000, description="scale g of the teacher; 1 is conditional")
    weight: Weight = Field("sigma2", description="w(t) on the residual of noise")
    time_low: float = Field(0.02, ge=0, lt=1, description="least share of the way to noise that is drawn")
    time_high: float = Field(0.98, gt=0, le=1, description="largest share of that way")
    late_time_high: float = Field(0.98, gt=0, le=1, description="the same after the first phase")
    late_from: int = Field(5000, ge=0, le=10**9, description="steps of the first phase")
    reduction: Literal["sum_over_items", "mean"] = Field(
        "sum_over_items", description="sum the push over a view's numbers, as the papers do, or take the mean"
    )
    clip: float | None = Field(None, gt=0, le=1e6, description="largest entry of the push on a picture")
    choice: Literal["random", "in turn"] = Field(
        "random", description="which particle a view is of: any, or by the item's number"
    )
    azimuth: tuple[Angle, Angle] = Field((-180.0, 180.0), description="degrees; 0 is the front")
    elevation: tuple[Elevation, Elevation] = Field((-10.0, 45.0), description="degrees above the horizon")
    distance: tuple[Length, Length] = Field((1.0, 1.5), description="of the camera from the origin, world units")
    fov: tuple[FieldOfView, FieldOfView] = Field((40.0, 70.0), description="vertical field of view, degrees")
    size: int | None = Field(None, ge=1, le=8192, description="side of the renderings; the data's if absent")
    first_size: int | None = Field(None, ge=1, le=8192, description="the same in the first phase (64 for 512)")
    backdrops: float = Field(0.5, ge=0, le=1, description="share of views before a random colour")
    backdrops_from: int = Field(2000, ge=0, le=10**9, description="steps before there are any")
    shows: Literal["colour", "normals"] = Field("colour", description="what is rendered for the teacher")
    frozen: list[str] = Field([], description="names in the scene's parameters that stay, as [vertices]")
    ray_entropy: float | None = Field(
        None, ge=0, le=1e6, description="weight of the entropy along rays; 10 for fields if absent"
    )
    sparsity: float = Field(0.0, ge=0, le=1e6, description="weight of the opacity (10 in public code)")
    opaque: float = Field(0.0, ge=0, le=1e6, description="weight of half opacity (1000 in public code)")
    opaque_from: int = Field(10000, ge=0, le=10**9, description="steps before it counts")
    consistency: float = Field(0.0, ge=0, le=1e6, description="weight of bends of meshes (5000 to 10000)")
    laplacian: float = Field(0.0, ge=0, le=1e6, description="weight of uneven vertices of meshes (0.5 to 10000)")
