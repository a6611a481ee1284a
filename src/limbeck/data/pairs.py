"""Pairs of noise and data on disk: what a sampler made of noise, with its conditions, as shards of safetensors.

`pairs.json` says how they were made, the guidance among it, and holds size and SHA-256 of each shard; it is written
last. A recipe names the folder as `pairs:PATH`; the batches hold the noise beside the data, and methods that learn from
pairs take it from there.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.durable import sha256_of, write_bytes
from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.core.randomness import derive, generator
from limbeck.data.cache.folder import check_file, read_sealed, write_sealed
from limbeck.data.noise import ItemNoise
from limbeck.data.source import Source, check_not_empty
from limbeck.diffusion.denoiser import Condition, Denoiser, condition_of, denoiser_of
from limbeck.diffusion.pairs import PairSampling, endpoints

DESCRIPTION = "pairs.json"


def pair_noise(run_seed: int, pairs: Tensor, like: Tensor) -> Tensor:
    """X0 of the pairs of these numbers (items,), like `like` in shape and precision; a function of seed and number."""
    return ItemNoise(derive(run_seed, "coupling"), pairs).normal("noise", like)


def teacher_condition(batch: Batch, denoiser: Denoiser, classes: int) -> Condition:
    """What a teacher is told of a batch: items without a class get its own null label; none where none has classes."""
    process = getattr(denoiser, "process", None)
    condition = dict(condition_of(batch, -1 if process is None else process.null_label))  # -1: exact denoisers'
    if not classes:
        condition.pop("label", None)
    return condition


@torch.no_grad()
def write_pairs(
    folder: Path | str,
    teacher: nn.Module,
    source: Source,
    how: PairSampling,
    *,
    seed: int = 0,
    per_item: int = 1,
    batch_size: int = 256,
) -> Path:
    """Makes pairs under the conditions of a source's items and stores them; returns the folder.

    Args:
        folder: created; it may hold nothing.
        teacher: a denoiser, or a network with its process.
        source: whose items give shape and conditions; what they look like does not matter.
        how: solver, steps and guidance.
        seed: of the noise.
        per_item: pairs an item.
        batch_size: pairs at a time, and in a shard.

    Raises:
        UsageError: the folder is not empty.
        ValueError: the teacher is no denoiser, or cannot be guided as asked.
    """
    folder, denoiser = Path(folder), denoiser_of(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "choose another folder for the pairs")
    shards: list[dict[str, Any]] = []
    total = len(source) * per_item
    for start in range(0, total, batch_size):
        pairs = torch.arange(start, min(start + batch_size, total))
        batch = source.fetch(pairs // per_item)
        noise = pair_noise(seed, pairs, batch["image"])
        condition = teacher_condition(batch, denoiser, source.classes)
        data = endpoints(denoiser, noise, condition, how)
        kept = {name: value for name, value in condition_of(batch).items() if name != "label"}
        rows = {**kept, "noise": noise, "image": data, "label": source.labels[pairs // per_item]}
        path = folder / f"shard-{len(shards):05d}.safetensors"
        content = safetensors.torch.save({name: value.contiguous() for name, value in rows.items()})
        write_bytes(path, content)
        shards.append({"file": path.name, "size": len(content), "sha256": sha256_of(path)})
    about = {"sampling": asdict(how), "seed": seed, "per_item": per_item, "classes": source.classes}
    write_sealed(folder / DESCRIPTION, {**about, "rows": total, "shards": shards})
    return folder


def read_pairs(folder: Path | str) -> "PairSource":
    """The pairs that `write_pairs` stored, every byte of them checked.

    Raises:
        DamagedFileError: a file is missing or was altered.
    """
    folder = Path(folder).expanduser()
    about = read_sealed(folder / DESCRIPTION)
    parts: list[dict[str, Tensor]] = []
    for shard in about["shards"]:
        path = folder / Path(shard["file"]).name
        check_file(path, shard)
        parts.append(safetensors.torch.load_file(path))
    return PairSource({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, about["classes"], about)


def open_pairs(path: str, share: float, seed: int, limit: int | None) -> tuple["PairSource", "PairSource"]:
    """Pairs to train on, the first `limit` of them at most, and a share that is held out to measure on."""
    pairs = read_pairs(path)
    order = torch.randperm(len(pairs), generator=generator(seed, "pairs"))
    held = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    return pairs.select(order[held:][:limit].sort().values), pairs.select(order[:held].sort().values)


class PairSource(Source):
    """Pairs held in memory; a batch has `noise` and `image` (X0 and X1), `label`, `index`, and other conditions.

    Args:
        rows: `noise` and `image`, of one shape, and what pairs are conditioned on, each (pairs, ...).
        classes: number of classes, 0 for none.
        about: how the pairs were made.

    Raises:
        IncompatibleError: noise and data of different shapes, or nothing at all.
    """

    def __init__(self, rows: Mapping[str, Tensor], classes: int = 0, about: Mapping[str, Any] | None = None) -> None:
        if "noise" not in rows or "image" not in rows or rows["noise"].shape != rows["image"].shape:
            raise IncompatibleError("pairs are of noise and image, two tensors of one shape")
        check_not_empty(rows["image"])
        self.rows, self.classes, self.about = dict(rows), classes, dict(about or {})
        self.labels = self.rows.setdefault("label", torch.full((len(rows["image"]),), -100))

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """See `Source.fetch`; pairs are not augmented."""
        return Batch({**{name: value[indices] for name, value in self.rows.items()}, "index": indices})

    def select(self, rows: Tensor) -> "PairSource":
        """See `Source.select`; the pairs are copied."""
        return PairSource({name: value[rows] for name, value in self.rows.items()}, self.classes, self.about)
