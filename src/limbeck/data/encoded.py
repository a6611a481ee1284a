"""Pictures and captions as a diffusion pipeline's networks see them: latents and prompt embeddings, encoded once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import CacheSpec, EncodingSpec
from limbeck.core.teacher import TeacherSignal
from limbeck.data.cache.key import CacheKey
from limbeck.data.cache.reader import CacheReader
from limbeck.data.cache.signals import FEATURE
from limbeck.data.cache.views import Views
from limbeck.data.cache.writer import fill_cache
from limbeck.data.noise import ItemNoise
from limbeck.data.source import ImageSource, Source

if TYPE_CHECKING:
    from limbeck.models.adapters.diffusers_encoders import PipelineEncoder

MEMORY_BYTES = 1 << 30
"""What may be encoded into memory where no folder for a cache is given, in bytes."""

LATENTS, DEVIATION = "latents", "deviation"
"""Names under which mean and deviation of an item's latents are kept."""

Stored = Callable[[Tensor], Mapping[str, Tensor]]


class EncodedSource(Source):
    """Latents as `image`, and `prompt`, `prompt_mask`, `pooled`, `time_ids` where the pipeline has them.

    Args:
        stored: gives what is kept of items (items,), by name.
        labels: class of each item (items,), -100 for none.
        classes: number of classes; 0 where there are none.
        rows: number in `stored` of each item; 0, 1, 2 and so on if absent.
        draw: draw latents from the autoencoder's distribution, anew in each epoch; else they are its mean.
    """

    def __init__(
        self, stored: Stored, labels: Tensor, classes: int = 0, *, rows: Tensor | None = None, draw: bool = False
    ) -> None:
        self.stored, self.labels, self.classes, self.draw = stored, labels, classes, draw
        self.rows = torch.arange(len(labels)) if rows is None else rows

    @property
    def varied(self) -> bool:
        """Whether latents are drawn."""
        return self.draw

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """The items at `indices` as a batch; see `Source.fetch`."""
        kept = dict(self.stored(self.rows[indices]))
        latents, deviation = kept.pop(LATENTS), kept.pop(DEVIATION, None)
        if seed is not None and self.draw and deviation is not None:
            latents = latents + deviation * ItemNoise(seed, indices).normal(LATENTS, latents)
        return Batch({"image": latents, **kept, "label": self.labels[indices], "index": indices})

    def select(self, rows: Tensor) -> "EncodedSource":
        """See `Source.select`; nothing is copied."""
        return EncodedSource(self.stored, self.labels[rows], self.classes, rows=self.rows[rows], draw=self.draw)


def encode(source: ImageSource, spec: EncodingSpec, part: str = "train", batch_size: int = 16) -> EncodedSource:
    """Runs the encoders of a pipeline over pictures, and their captions where they have some, or reads what they gave.

    Args:
        source: pictures, three channels for most autoencoders; it is set to [-1, 1], as autoencoders take them.
        spec: which pipeline, and where the result is kept.
        part: name of the subfolder of the cache.
        batch_size: pictures at a time.

    Raises:
        IncompatibleError: captions without a text encoder or the other way round, pictures that do not fit the
            autoencoder, or more than `MEMORY_BYTES` without a folder for a cache.
        ForeignCacheError: the folder holds what other encoders, pictures or captions gave.
    """
    channels = source.images(torch.zeros(1, dtype=torch.int64)).shape[1]
    source.set_normalisation([0.5] * channels, [0.5] * channels)
    encoder = _Encoding(source, spec)
    views = Views(source)
    stored = (
        _in_memory(encoder, views, batch_size) if spec.cache is None else _on_disk(encoder, views, part, batch_size)
    )
    return EncodedSource(stored, source.labels, source.classes, draw=spec.draw)


class _Encoding:
    """The encoders as a teacher, whose features a cache keeps."""

    def __init__(self, source: ImageSource, spec: EncodingSpec) -> None:
        self.source, self.spec = source, spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder: PipelineEncoder | None = None

    @property
    def encoder(self) -> "PipelineEncoder":
        """Loaded when something is not encoded yet."""
        if self._encoder is None:
            from limbeck.models.adapters.diffusers_encoders import PipelineEncoder

            self._encoder = PipelineEncoder(self.spec.pipeline, self.device)
            if self._encoder.has_text != (self.source.captions is not None):
                raise IncompatibleError(
                    f"the pipeline '{self.spec.pipeline}' {'has' if self._encoder.has_text else 'has no'} text encoder",
                    "name the column of captions in data.caption_column, where there is one",
                )
        return self._encoder

    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """Everything that is to be kept of a batch."""
        image = batch["image"]
        mean, deviation = self.encoder.latents(image)
        found = {LATENTS: mean} | ({DEVIATION: deviation} if self.spec.draw else {})
        if self.source.captions is not None:
            texts = [self.source.captions[item] for item in batch["index"].tolist()]
            found |= self.encoder.prompts(texts)
            sizes = self.encoder.time_ids(*image.shape[-2:])
            if sizes is not None:
                found["time_ids"] = sizes.expand(len(texts), -1)
        return TeacherSignal(None, {name: value.cpu() for name, value in found.items()})

    def tokens(self, batch: Batch) -> Any:
        """Nothing is said about tokens."""
        raise IncompatibleError("encoders say nothing about tokens")

    def to(self, device: torch.device) -> None:
        """Encoders stay where they are."""

    @property
    def fingerprint(self) -> str:
        """Hash of the encoders' files and of the captions."""
        import hashlib

        from limbeck.models.adapters.diffusers_encoders import encoders_fingerprint

        digest = hashlib.sha256(encoders_fingerprint(self.spec.pipeline).encode())
        for text in self.source.captions or ():
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()


def _in_memory(encoder: _Encoding, views: Views, batch_size: int) -> Stored:
    parts: list[dict[str, Tensor]] = []
    for rows in torch.arange(len(views)).split(batch_size):
        parts.append(dict(encoder.signal(views.fetch(rows)).features))
        wanted = sum(tensor[:1].nbytes for tensor in parts[0].values()) * len(views)
        if wanted > MEMORY_BYTES:
            raise IncompatibleError(
                f"what is encoded takes {wanted / (1 << 30):.1f} GiB", "give a folder in data.encoding.cache"
            )
    kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return lambda rows: {name: tensor.index_select(0, rows) for name, tensor in kept.items()}


def _on_disk(encoder: _Encoding, views: Views, part: str, batch_size: int) -> Stored:
    folder = Path(str(encoder.spec.cache)).expanduser() / part
    layers = [LATENTS, DEVIATION] if encoder.spec.draw else [LATENTS]
    spec = CacheSpec(folder=str(folder), kind="features", layers=layers)
    if not _is_there(folder, CacheKey.of(spec, views, encoder)):
        fill_cache(folder, encoder, views, spec, batch_size=batch_size)
    return _Reading(folder)


def _is_there(folder: Path, key: CacheKey) -> bool:
    """Whether a cache is complete; its shards are checked when they are read."""
    from limbeck.data.cache.errors import MissingCacheError

    try:
        key.check(CacheReader(folder).description.key, folder)
    except MissingCacheError:
        return False
    return True


class _Reading:
    """What a cache holds of rows; loader processes open it for themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = CacheReader(folder)

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        found = self.reader.read(rows).tensors
        return {name.removeprefix(FEATURE): tensor for name, tensor in found.items() if name.startswith(FEATURE)}
