"""A pipeline's own encoders: of prompts into embeddings, and of pictures into latents, as its stock pipeline does."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from limbeck.core.durable import sha256_of
from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.models.adapters.diffusers_classes import (
    COMPONENTS,
    INDEX,
    components_of,
    local_folder,
    may_be_copied,
    named_class,
    without_progress,
)
from limbeck.models.files import read_object

_NOT_NEEDED = (*COMPONENTS, "safety_checker", "image_encoder", "feature_extractor")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def has_text(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's index names a text encoder."""
    return components_of(dict(index)).get("text_encoder", (None, None))[1] is not None


class PipelineEncoder:
    """The encoders of a pipeline folder; its denoising network is not loaded.

    Args:
        folder: of the pipeline, or its id on the hub.
        device: where the encoders run.

    Raises:
        UsageError: no such pipeline, or files that would run code.
        DamagedFileError: a component cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from diffusers import DiffusionPipeline

        self.folder, self.device = local_folder(folder), torch.device(device)
        index = read_object(self.folder / INDEX)
        kind = named_class(index["_class_name"], DiffusionPipeline)
        if kind is None:
            raise IncompatibleError(f"diffusers has no pipeline '{index['_class_name']}'")
        parts, wanted = components_of(index), inspect.signature(kind.__init__).parameters
        left_out: dict[str, Any] = {name: None for name in _NOT_NEEDED if name in parts}
        # Pipelines that were saved without a part, such as SD3's third text encoder, have to be told so.
        for name in wanted:
            if name.startswith(("text_encoder_", "tokenizer_")) and parts.get(name, (None, None))[1] is None:
                left_out[name] = None
        if "requires_safety_checker" in index:
            left_out["requires_safety_checker"] = False
        try:
            with without_progress():
                self.pipeline: Any = kind.from_pretrained(
                    str(self.folder),
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    **left_out,
                )
        except _DAMAGE as error:
            raise DamagedFileError(self.folder, f"its encoders cannot be loaded ({str(error)[:200]})") from error
        self.has_text = has_text(index)
        self.pipeline.to(self.device)
        for name in COMPONENTS:
            if name in left_out and (self.folder / name / "config.json").is_file():
                # Some encoders ask the network for a width of its configuration, and need no more of it.
                config = SimpleNamespace(**read_object(self.folder / name / "config.json"))
                self.pipeline.__dict__[name] = SimpleNamespace(config=config, dtype=torch.float32)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (items, tokens, width), and `prompt_mask` or `pooled` where the pipeline has them."""
        return self._named(self._encode(list(texts), guided=False), negative=False)

    @torch.no_grad()
    def empty(self) -> dict[str, Tensor]:
        """The same of no prompt at all, one row: what the pipeline itself guides away from."""
        if "do_classifier_free_guidance" in inspect.signature(self.pipeline.encode_prompt).parameters:
            return self._named(self._encode([""], guided=True), negative=True)
        return self._named(self._encode([""], guided=False), negative=False)

    @torch.no_grad()
    def latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents (items, channels, height, width) of images in [-1, 1], as the network sees
        them: shifted and scaled.

        Raises:
            IncompatibleError: the pipeline has no autoencoder, or one that scales each channel by itself.
        """
        vae, shift, scale = self._autoencoder()
        channels = vae.config.get("in_channels", images.shape[1])
        if images.shape[1] != channels:
            raise IncompatibleError(f"the autoencoder takes {channels} channels, and images have {images.shape[1]}")
        encoded = vae.encode(images.to(self.device))
        if hasattr(encoded, "latent_dist"):
            made = encoded.latent_dist
            return (made.mean - shift) * scale, made.std * scale
        return (encoded.latent - shift) * scale, torch.zeros_like(encoded.latent)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Images (items, channels, height, width), about in [-1, 1], of latents as the network sees them.

        Raises:
            IncompatibleError: as `latents` does.
        """
        vae, shift, scale = self._autoencoder()
        return vae.decode(latents.to(self.device) / scale + shift).sample

    @property
    def pixels(self) -> int:
        """Pixels of an image to a side of a latent."""
        return int(self.pipeline.vae_scale_factor)

    def time_ids(self, height: int, width: int) -> Tensor | None:
        """SDXL's sizes and place of an image that was not cropped, in pixels (1, 6); None for other pipelines."""
        if not hasattr(self.pipeline, "_get_add_time_ids"):
            return None
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)

    def _autoencoder(self) -> tuple[Any, float, float]:
        """The autoencoder, and the shift and scale between its latents and those that the network sees."""
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            raise IncompatibleError(f"the pipeline in {self.folder} has no autoencoder", "remove data.encoding")
        if vae.config.get("latents_mean") is not None:
            raise IncompatibleError("an autoencoder that scales each channel by itself is not known here")
        return vae, vae.config.get("shift_factor") or 0.0, vae.config.get("scaling_factor") or 1.0

    def _encode(self, texts: list[str], guided: bool) -> tuple[Any, ...]:
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        given: dict[str, Any] = {"prompt": texts, "device": self.device, "num_images_per_prompt": 1}
        if "do_classifier_free_guidance" in parameters:
            given["do_classifier_free_guidance"] = guided
        for name in ("prompt_2", "prompt_3"):
            if name in parameters:
                given[name] = None
        usual = inspect.signature(type(self.pipeline).__call__).parameters
        for name in ("complex_human_instruction", "max_sequence_length"):
            if name in parameters and name in usual:
                given[name] = usual[name].default  # as the pipeline's own call does
        return self.pipeline.encode_prompt(**given)

    def _named(self, made: tuple[Any, ...], negative: bool) -> dict[str, Tensor]:
        """Names the outputs of `encode_prompt`; their order is that of the pipeline's family."""
        family = type(self.pipeline).__name__
        if family.startswith(("Sana", "PixArt")):
            names = ("prompt", "prompt_mask")
            chosen = made[2:4] if negative else made[:2]
        elif family.startswith("Flux"):
            names, chosen = ("prompt", "pooled"), made[:2]
        else:
            names, chosen = ("prompt", "pooled"), made[1::2] if negative else made[::2]
        return {name: value for name, value in zip(names, chosen, strict=False) if value is not None}


class NullPrompt(Mapping[str, Tensor]):
    """The condition of the empty prompt, encoded when it is first needed: text encoders can be larger than networks.

    Args:
        folder: of the pipeline whose encoders are asked.

    Attributes:
        known: what was encoded; empty before that.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, dict[str, Tensor]()

    def _made(self) -> dict[str, Tensor]:
        if not self.known:
            self.known = PipelineEncoder(self.folder).empty()
        return self.known

    def __getitem__(self, name: str) -> Tensor:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


def encoders_fingerprint(folder: str | Path) -> str:
    """Hash of the files of all components that encode, without loading them."""
    home = local_folder(folder)
    digest = hashlib.sha256()
    for name, (_, kind) in sorted(components_of(read_object(home / INDEX)).items()):
        if kind is None or name in (*_NOT_NEEDED, "scheduler"):
            continue
        for path in sorted((home / name).rglob("*")):
            if path.is_file() and may_be_copied(path):
                digest.update(f"{name}/{path.relative_to(home / name)}:{sha256_of(path)}".encode())
    return digest.hexdigest()
