"""What a generator draws on: the shape of its items, what can be asked of it, and how its samples become images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError, UsageError
from limbeck.diffusion.denoiser import Condition
from limbeck.diffusion.ports import without_adapter
from limbeck.metrics.generation import noise_for

if TYPE_CHECKING:
    from limbeck.core.specs import DataSpec
    from limbeck.data.source import ImageSource, Source
    from limbeck.models.adapters.diffusers_encoders import PipelineEncoder

_DECODED = 4
"""Latents that are decoded at a time: one image may take a gigabyte."""


class Canvas:
    """The items of one generator.

    A student that came out of a pipeline with an autoencoder, or was trained on latents of one, draws latents, which
    the pipeline decodes; where the pipeline has text encoders too, prompts are asked for, and otherwise classes.

    Args:
        student: the generator.
        spec: data of its run.
        data: the data themselves, where they were given as objects.
        labels: classes to ask for, in turn; all of the data's if empty.
        prompts: texts to ask for, in turn; the captions of the run's data if empty.

    Attributes:
        shape: of one item (channels, height, width), as the network sees it.
        columns: of a picture of samples, so that each shows one class or prompt; None where nothing suits.

    Raises:
        UsageError: the data are not there, there is no such class, or the student can be asked for none, or for no
            prompt.
    """

    def __init__(
        self,
        student: nn.Module,
        spec: "DataSpec",
        data: "Source | None" = None,
        labels: Sequence[int] = (),
        prompts: Sequence[str] = (),
    ) -> None:
        self.student, self._given = student, data is not None
        source = _opened(spec) if data is None else data
        self.encoder = _encoder(student, spec)
        if prompts and not self.has_text:
            raise UsageError("the student takes no prompts", "leave them out")
        if labels and self.has_text:
            raise UsageError("the student is asked for prompts and not for classes", "describe what to draw: --prompt")
        classes = 0 if self.has_text else source.classes
        self.labels = _labels(labels, classes)
        self.prompts = _prompts(prompts, source) if self.has_text else []
        self.shape = self._shape(source, spec)
        asked = len(self.prompts) if prompts else classes
        self.columns = asked if 2 <= asked <= 20 else None
        self._known: dict[str, dict[str, Tensor]] = {}

    @property
    def has_text(self) -> bool:
        """Whether prompts are asked for."""
        return self.encoder is not None and self.encoder.has_text

    def noise(self, rows: Tensor, seed: int) -> Tensor:
        """Standard normal noise of the items numbered `rows` (items,), each a function of its number and the seed."""
        return noise_for(Batch({"image": torch.empty(len(rows), *self.shape), "index": rows}), seed)

    def condition(self, rows: Tensor) -> Condition:
        """What the items numbered `rows` (items,) are asked to show."""
        if not self.has_text:
            return {} if self.labels is None else {"label": self.labels[rows % len(self.labels)]}
        assert self.encoder is not None
        texts = [self.prompts[row % len(self.prompts)] for row in rows.tolist()]
        for text in dict.fromkeys(texts):
            if text not in self._known:  # one by one: a text is encoded alike whatever its company
                self._known[text] = self.encoder.prompts([text])
        found = {name: torch.cat([self._known[text][name] for text in texts]) for name in self._known[texts[0]]}
        sizes = self.encoder.time_ids(*(self.encoder.pixels * side for side in self.shape[1:]))
        return found if sizes is None else {**found, "time_ids": sizes.expand(len(rows), -1)}

    def images(self, samples: Tensor) -> Tensor:
        """Samples as images (items, channels, height, width) in [0, 1]."""
        from limbeck.models.normalisation import normalisation_of

        if self.encoder is not None:
            decoded = [self.encoder.images(part) for part in samples.split(_DECODED)]
            return (torch.cat(decoded).to(samples) / 2 + 0.5).clamp(0, 1)
        known = normalisation_of(self.student) or ([0.5], [0.5])
        mean, std = (samples.new_tensor(values).view(-1, 1, 1) for values in known)
        return (samples * std + mean).clamp(0, 1)

    def _shape(self, source: "Source", spec: "DataSpec") -> tuple[int, ...]:
        if self.encoder is not None and spec.encoding is not None and not self._given:
            pictures: Any = source
            channels = pictures.images(torch.zeros(1, dtype=torch.int64)).shape[1]
            pictures.set_normalisation([0.5] * channels, [0.5] * channels)
            return tuple(self.encoder.latents(pictures.fetch(torch.zeros(1, dtype=torch.int64))["image"])[0].shape[1:])
        of_data = tuple(source.info().example["image"].shape[1:])
        if self.encoder is None:
            return of_data
        of_network = _latent_shape(self.student, self.encoder)
        return of_data if of_data[0] == of_network[0] else of_network  # the data are latents already, or pixels


def _opened(spec: "DataSpec") -> "Source":
    """Training data of a run; of encoded ones the pictures and captions, which cost nothing to open."""
    from limbeck.data.open import open_data, open_pictures

    if spec.name.startswith("object:"):
        raise UsageError("the run's data were given as objects", "give them again: limbeck.sample(run, data=…)")
    return open_data(spec).train if spec.encoding is None else open_pictures(spec)[0]


def _encoder(student: nn.Module, spec: "DataSpec") -> "PipelineEncoder | None":
    """The encoders of the pipeline that a student goes with, or its data; None where it draws pixels."""
    noted = getattr(without_adapter(student), "limbeck_pipeline", None)
    if noted is None and spec.encoding is None:
        return None
    from limbeck.models.adapters.diffusers_classes import INDEX, components_of, read_object
    from limbeck.models.adapters.diffusers_encoders import PipelineEncoder

    if noted is not None and (Path(noted) / INDEX).is_file():
        has_autoencoder = components_of(read_object(Path(noted) / INDEX)).get("vae", (None, None))[1] is not None
        if has_autoencoder or spec.encoding is None:
            return PipelineEncoder(noted) if has_autoencoder else None
    if spec.encoding is not None:
        return PipelineEncoder(spec.encoding.pipeline)
    raise UsageError(f"the pipeline of the student is gone: there is no {noted}", "put the folder back")


def _latent_shape(student: nn.Module, encoder: "PipelineEncoder") -> tuple[int, ...]:
    """What the configuration of a latent diffusion network says of its items."""
    network = without_adapter(student)
    config: Any = getattr(network, "config", None)
    config = getattr(getattr(network, "network", None), "config", None) or config  # under guidance adapters
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None:
        raise IncompatibleError(f"nothing is known of the shape of what a {type(network).__name__} draws")
    if size is None:  # Flux: rows of packed pixels, of any size
        channels, size = channels // 4, encoder.pipeline.default_sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def _labels(labels: Sequence[int], classes: int) -> Tensor | None:
    if not classes:
        if labels:
            raise UsageError("the run's data have no classes to ask for")
        return None
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise UsageError(f"there is no class {wrong[0]}", f"classes are 0 to {classes - 1}")
    return torch.tensor(list(labels) or list(range(classes)))


def _prompts(prompts: Sequence[str], source: "Source | ImageSource") -> list[str]:
    chosen = list(prompts) or list(getattr(source, "captions", None) or ())
    if not chosen:
        raise UsageError("the student draws what a prompt says, and none is given", "say what to draw: --prompt")
    return chosen


def columns_of(canvas: Canvas, items: int) -> int:
    """Columns of a picture of so many samples: one a class or prompt where that suits, else a square."""
    return canvas.columns if canvas.columns and items >= canvas.columns else math.ceil(math.sqrt(items))
