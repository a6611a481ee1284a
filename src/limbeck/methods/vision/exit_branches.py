"""Exits: small networks that turn what a stage of a student returns into logits, trained along and left behind.

Each family has its own: separable convolutions for maps, patch merging and transformer blocks for tokens, a linear map
for vectors (Hao et al., *One-for-All*, NeurIPS 2023, arXiv 2310.19444).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.errors import IncompatibleError

_HEADS = 4
_GRID = 7
"""Side of the grid of patches, about, down to which tokens are merged."""
_MOST_PREFIX_TOKENS = 5
"""Class, distillation and register tokens, where a model does not say how many it has."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stage's feature lies in its tensor.

    Attributes:
        kind: maps (items, width, rows, columns), tokens (items, tokens, width) or (items, rows, columns, width), or a
            vector (items, width).
        width: channels.
        grid: (rows, columns) of the patches, for tokens.
        prefix: tokens before the patches: class, distillation and register tokens.
        class_token: whether the first of these is read out; the mean over the patches is, where not.
    """

    kind: str
    width: int
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    class_token: bool = False


def layout_of(feature: Tensor, image: Tensor, model: nn.Module, path: str) -> Layout:
    """Reads the layout of a stage's feature off an example; `model` and `path` say whose and where it was tapped.

    timm's models tell the channels of a stage (`feature_info`), the number of prefix tokens and whether one of them is
    a class token; of other models maps have their channels first, and a token before the grid is a class token.

    Raises:
        IncompatibleError: the feature is none of the kinds of `Layout`, or its tokens fill no grid like the image's.
    """
    if len(feature) != len(image) or feature.ndim not in (2, 3, 4):
        raise IncompatibleError(
            f"'{path}' returns {tuple(feature.shape)} for {len(image)} images, for which there is no exit",
            "name layers in the option stages that return maps, tokens or vectors, one for each image",
        )
    if feature.ndim == 2:
        return Layout("vector", feature.shape[1])
    if feature.ndim == 4 and not _channels_last(feature, model, path):
        return Layout("maps", feature.shape[1])
    if feature.ndim == 4:
        return Layout("tokens", feature.shape[3], (feature.shape[1], feature.shape[2]))
    known: Any = model
    prefix, grid = _grid(feature.shape[1], image, getattr(known, "num_prefix_tokens", None))
    class_token = prefix > 0 and bool(getattr(known, "has_class_token", True))
    return Layout("tokens", feature.shape[2], grid, prefix, class_token)


def exit_branch(layout: Layout, remaining: int, final_width: int, head_width: int, classes: int) -> nn.Module:
    """A fresh exit for features of one layout.

    Args:
        layout: of the stage.
        remaining: stages that follow; as many separable blocks or transformer blocks stand in the exit.
        final_width: width of the student's last stage, in which an exit on tokens works.
        head_width: width of the vector that an exit on maps reads its logits from.
        classes: number of logits.
    """
    if layout.kind == "maps":
        made: nn.Module = map_exit(layout.width, remaining, head_width, classes)
    elif layout.kind == "tokens":
        made = TokenExit(layout, final_width, max(remaining, 1), classes)
    else:
        made = nn.Linear(layout.width, classes)
    return made.apply(_initialise)


def map_exit(width: int, remaining: int, head_width: int, classes: int) -> nn.Module:
    """Separable blocks of doubling width, the last of `head_width`; a 1x1 convolution where no stage remains."""
    widths = [width * 2**block for block in range(remaining)] + [head_width]
    body = [separable_block(one, other) for one, other in pairwise(widths)]
    if not body:
        body = [nn.Sequential(nn.Conv2d(width, head_width, 1, bias=False))]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head_width, classes))


def separable_block(inputs: int, outputs: int) -> nn.Sequential:
    """Two depthwise separable convolutions with batch norm and ReLU, the first with stride 2."""

    def half(outputs: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        return [depthwise, pointwise, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*half(inputs, 2), *half(outputs, 1))


class PatchMerging(nn.Module):
    """Joins the patches of each 2x2 square into one: layer norm, linear map and GELU on their concatenation.

    Args:
        inputs: width of a patch.
        outputs: width of a joined patch.
        grid: (rows, columns) of the patches; an odd side is filled up with zeros.
    """

    def __init__(self, inputs: int, outputs: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * inputs)
        self.linear = nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (items, rows * columns, inputs) to (items, ceil(rows / 2) * ceil(columns / 2), outputs)."""
        rows, columns = self.grid
        maps = patches.unflatten(1, self.grid)
        if rows % 2 or columns % 2:
            maps = functional.pad(maps, (0, 0, 0, columns % 2, 0, rows % 2))
        corners = [maps[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return functional.gelu(self.linear(self.norm(torch.cat(corners, -1).flatten(1, 2))))


class TokenExit(nn.Module):
    """Merges patches, runs a few transformer blocks, and reads the class token or the mean over the patches.

    Args:
        layout: of the tokens.
        width: of the blocks.
        depth: number of blocks.
        classes: number of logits.
    """

    def __init__(self, layout: Layout, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.layout = layout
        differs = layout.width != width
        merges, grid, inputs = [], layout.grid, layout.width
        for _ in range(max(0, int(math.log2(min(grid) / _GRID)))):
            merges.append(PatchMerging(inputs, width, grid))
            grid, inputs = (-(-grid[0] // 2), -(-grid[1] // 2)), width
        if differs and not merges:
            self.merge: nn.Module = nn.Linear(layout.width, width)
        else:
            self.merge = nn.Sequential(*merges)
        self.align = nn.Linear(layout.width, width) if differs and layout.prefix else nn.Identity()
        self.blocks = nn.Sequential(*(_block(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits (items, classes) of a feature of the exit's layout."""
        tokens = feature.flatten(1, 2) if feature.ndim == 4 else feature
        prefix = self.layout.prefix
        patches = self.merge(tokens[:, prefix:])
        tokens = torch.cat([self.align(tokens[:, :prefix]), patches], 1) if prefix else patches
        tokens = self.blocks(tokens)
        return self.head(tokens[:, 0] if self.layout.class_token else tokens[:, prefix:].mean(1))


def readout_width(model: nn.Module, classes: int) -> int:
    """Width of the vector that a classifier's last layer reads; 0 where no layer has as many outputs as classes."""
    width = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == classes:
            width = module.in_features
        elif isinstance(module, nn.Conv2d) and module.out_channels == classes and module.kernel_size == (1, 1):
            width = module.in_channels
    return width


def last_stages(layers: Sequence[str], count: int = 4) -> list[str]:
    """The stages that carry exits: the last ones of a hierarchical network, and of a list of like blocks every n-th."""
    if len(layers) <= count + 1:
        return list(layers[-count:])
    return [layers[round((place + 1) * len(layers) / count) - 1] for place in range(count)]


def _block(width: int) -> nn.Module:
    """A pre-norm transformer block without dropout."""
    heads = math.gcd(width, _HEADS)
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)


def _channels_last(feature: Tensor, model: nn.Module, path: str) -> bool:
    known: Any = model
    noted = getattr(known, "feature_info", ())
    entries = [entry for entry in getattr(noted, "info", noted) if isinstance(entry, dict)]
    width = next((entry.get("num_chs") for entry in entries if entry.get("module") == path), None)
    if width is not None and (feature.shape[1] == width) != (feature.shape[3] == width):
        return feature.shape[3] == width
    return str(getattr(known, "output_fmt", "")).endswith("NHWC")


def _grid(tokens: int, image: Tensor, told: int | None) -> tuple[int, tuple[int, int]]:
    """How many tokens stand before the patches, and the patches' grid, which has the sides' ratio of the image."""
    height, width = image.shape[2:]
    for prefix in [told or 0, *range(_MOST_PREFIX_TOKENS + 1)]:
        rows = round(math.sqrt(max(0, tokens - prefix) * height / width))
        columns = round(rows * width / height)
        if rows and rows * columns == tokens - prefix:
            return prefix, (rows, columns)
    raise IncompatibleError(
        f"{tokens} tokens fill no grid like that of images of {height}x{width}",
        "name other layers in the option stages",
    )
