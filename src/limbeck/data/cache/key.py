"""What a cache is a cache of: everything that its content depends on, and how to tell a foreign one."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from limbeck.core.specs import CacheSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Teacher
from limbeck.data.cache.errors import ForeignCacheError
from limbeck.data.cache.views import Views
from limbeck.data.source import ImageSource, Source
from limbeck.models.normalisation import normalisation_of

_SAMPLED = 1024  # items of which the content is hashed; that of all others is checked item by item, as it is read


@dataclass(frozen=True)
class CacheKey:
    """What a cache's content is a function of; two keys differ where their caches do.

    Attributes:
        teacher: content hash of the teacher; None to take the cache's word for it.
        normalisation: mean and deviation that the teacher sees its images with; None for other data, and to take the
            cache's word for it.
        tokenizer: hash of the tokenizer; None for data without one.
        data: hash of the items.
        targets: hash of which tokens count; None for data that are not to be predicted token by token.
        augmentation: seed and names of what makes an item look different in each epoch; None where nothing does.
        kind: see `CacheSpec`.
        k: entries, for top-k alone.
        dtype: of what is stored.
        layers: as they were named.
        epochs: views of every item; None for data that always look the same.
    """

    teacher: str | None
    normalisation: Any
    tokenizer: str | None
    data: str
    targets: str | None
    augmentation: Any
    kind: str
    k: int | None
    dtype: str
    layers: list[str]
    epochs: int | None

    @classmethod
    def of(cls, spec: CacheSpec, views: Views, teacher: Teacher | None) -> "CacheKey":
        """The key of what a recipe asks for; without a teacher what depends on it stays None."""
        source = views.source
        content = fingerprint(source)
        return cls(
            teacher=None if teacher is None else teacher.fingerprint,
            normalisation=None if teacher is None else _normalisation(teacher, source),
            tokenizer=tokenizer_fingerprint(getattr(source, "tokenizer", None)),
            data=content["data"],
            targets=content.get("targets"),
            augmentation=_augmentation(views),
            kind=spec.kind,
            k=spec.k if spec.kind == "top-k" else None,
            dtype="compact" if spec.kind == "top-k" else spec.dtype,
            layers=list(spec.layers),
            epochs=views.epochs if source.varied else None,
        )

    @property
    def digest(self) -> str:
        """Hash of the whole key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, stored: "CacheKey") -> tuple[str, ...]:
        """Names of what another key has otherwise; more epochs than are needed are no difference."""
        wrong = []
        for name in (field.name for field in fields(self)):
            here, there = getattr(self, name), getattr(stored, name)
            unknown = here is None and name in ("teacher", "normalisation")
            enough = name == "epochs" and None not in (here, there) and there >= here
            if here != there and not unknown and not enough:
                wrong.append(name)
        return tuple(wrong)

    def check(self, stored: "CacheKey", folder: object) -> None:
        """Refuses a cache with another key.

        Raises:
            ForeignCacheError: naming everything that differs.
        """
        wrong = self.differences(stored)
        if wrong:
            reasons = "; ".join(
                _REASONS[name].format(there=getattr(stored, name), here=getattr(self, name)) for name in wrong
            )
            raise ForeignCacheError(
                f"the cache in {folder} is not for this: {reasons}", "choose another cache.folder", wrong
            )


_REASONS = {
    "teacher": "another teacher made it",
    "normalisation": "its teacher saw images normalised with {there}, and this one would see {here}",
    "tokenizer": "its text was split by another tokenizer",
    "data": "it is of other data",
    "targets": "other tokens of the text count (prompts, masks or packing differ)",
    "augmentation": "its items were augmented with {there}, and are with {here} now",
    "kind": "it holds {there}, and {here} is asked for",
    "k": "it holds the {there} most probable tokens, and {here} are asked for",
    "dtype": "it holds {there}, and {here} is asked for",
    "layers": "it holds the layers {there}, and {here} are asked for",
    "epochs": "it holds {there} epochs of augmented items, and {here} are needed",
}


def fingerprint(source: Source) -> dict[str, str]:
    """Cheap hashes of a source: `data`, and for text without classes `targets`, which of its tokens count.

    The labels and 1,024 items evenly over the whole are hashed, as they are stored: without augmentation, images
    without normalisation.
    """
    count = min(len(source), _SAMPLED)
    rows = torch.arange(count) * len(source) // count
    if isinstance(source, ImageSource):
        images = [source.images(part) for part in rows.split(64)]
        return {"data": _hash(source.labels, *images)}
    batch = source.fetch(rows)
    tokens = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    found = {"data": _hash(source.labels, *tokens.values())}
    if "labels" in batch:
        found["targets"] = _hash(batch["labels"] != -100)
    return found


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of a tokenizer of transformers in its serialised form; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {
            "vocab": tokenizer.get_vocab(),
            "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        }
    else:
        content = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set by the last call, no property of the tokenizer
            content.pop(passing, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _normalisation(teacher: Teacher, source: Source) -> Any:
    """What a teacher, or each of several, sees its images normalised with."""
    if not isinstance(source, ImageSource):
        return None
    if isinstance(teacher, Ensemble):
        return [_normalisation(one, source) for one in teacher.teachers]
    own = normalisation_of(teacher.model) if isinstance(teacher, LiveTeacher) else None
    return [list(part) for part in own or source.normalisation]


def _augmentation(views: Views) -> Any:
    source = views.source
    if not source.varied:
        return None
    masking = getattr(source, "masking", None)
    names = list(getattr(source, "augmentations", ()))
    return {"seed": views.seed, "names": names, "mask_rate": None if masking is None else masking.rate}
