"""The shipped denoiser twice, one after the other."""

from typing import Any

from limbeck.diffusion.stacked import Stacked, Wiring
from limbeck.models.configs import StackedConfig
from limbeck.models.denoising_mlp import DenoisingMLP


class StackedDenoiser(Stacked):
    """Two `DenoisingMLP`, wired as `Stacked` says: a one-step student of twice the size (InstaFlow, 2023).

    Args:
        numbers: numbers an item, after flattening.
        classes: classes to condition on, 0 for none.
        width: units of each layer.
        depth: residual layers of each of the two.
        guidance: whether the guidance scale is an input.
        wiring: "steps" or "plain".

    Attributes:
        config: all constructor arguments as plain data.
    """

    def __init__(
        self,
        numbers: int = 64,
        classes: int = 0,
        width: int = 256,
        depth: int = 3,
        guidance: bool = False,
        wiring: Wiring = "steps",
    ) -> None:
        made = StackedConfig(
            numbers=numbers, classes=classes, width=width, depth=depth, guidance=guidance, wiring=wiring
        )
        shape = made.model_dump(exclude={"wiring"})
        super().__init__(DenoisingMLP(**shape), DenoisingMLP(**shape), wiring)
        self.config: dict[str, Any] = made.model_dump()

    def layers(self) -> list[str]:
        """Module paths of the residual layers, from input to output."""
        return [f"{half}.{path}" for half in ("first", "second") for path in self.first.layers()]  # type: ignore[operator]  # a DenoisingMLP
