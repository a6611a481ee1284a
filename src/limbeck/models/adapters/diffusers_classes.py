"""Folders and classes of diffusers: what may be loaded, and of which kind it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import UsageError
from limbeck.models.files import check_folder, read_object

INDEX = "model_index.json"
COMPONENTS = ("unet", "transformer")
"""Names that pipelines give their denoising network."""

EMPTY = "limbeck_null_prompt.safetensors"
"""File with the condition of the empty prompt, where it is known."""

PIPELINE = "limbeck_pipeline"
"""Attribute of a network that holds the folder of the pipeline that it goes with."""

_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # the last is where safety checkers lie
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_COPIED = (".json", ".safetensors", ".txt", ".model", ".jinja")


def named_class(name: Any, kind: type) -> Any:
    """The class of diffusers that is called so and extends `kind`; None for anything else that may be called so."""
    import diffusers

    if not isinstance(name, str) or not name.isidentifier():
        return None
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, kind) else None


@contextmanager
def without_progress() -> Iterator[None]:
    """Without progress bars of the libraries' own between those of the run."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [one for one in (of_diffusers, of_transformers) if one.is_progress_bar_enabled()]
    for one in shown:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()


def local_folder(origin: str | Path) -> Path:
    """The checked folder of a pipeline or model: a local one, or what the hub gives of a pipeline's id.

    Raises:
        UsageError: neither; files that run code or leave the folder, or components of another library.
        DamagedFileError: the index is no JSON object.
    """
    folder = Path(origin).expanduser()
    folder = folder.resolve() if folder.is_dir() else _downloaded(str(origin))
    check_folder(folder)
    for part in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        files = [path for path in part.iterdir() if path.is_file()]
        pickles = sorted(path.name for path in files if path.suffix in _PICKLES and "training" not in path.name)
        if pickles and not any(path.suffix == ".safetensors" for path in files):
            raise UsageError(
                f"the weights in {part} are a pickle ({pickles[0]}), which can run code when loaded",
                "save them again as safetensors",
            )
    if (folder / INDEX).is_file():
        _check_index(folder)
    return folder


def components_of(index: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Library and class of each component in a pipeline's index; (None, None) for one that is left out."""
    return {name: (entry[0], entry[1]) for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}


def pipeline_of(network: nn.Module) -> Path | None:
    """The folder of the pipeline that a network goes with; None where there is none, or none any more."""
    noted = getattr(network, PIPELINE, None)
    return Path(noted) if noted is not None and (Path(noted) / INDEX).is_file() else None


def stored_scheduler(folder: Path) -> dict[str, Any] | None:
    """The configuration of the scheduler in a pipeline's or model's folder; None where there is none."""
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    return next((read_object(place) for place in places if place.is_file()), None)


def pipeline_class(index: dict[str, Any]) -> Any:
    """The class of a pipeline, from its index; None where diffusers has none of that name."""
    from diffusers import DiffusionPipeline

    return named_class(index.get("_class_name"), DiffusionPipeline)


def may_be_copied(path: Path) -> bool:
    """Whether a component's file goes into a copy: weights in full precision and configurations, and no pickles."""
    return path.suffix in _COPIED and not path.name.endswith((".fp16.safetensors", ".non_ema.safetensors"))


def _check_index(folder: Path) -> None:
    index = read_object(folder / INDEX)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or entry[0] not in _LIBRARIES:
            raise UsageError(
                f"the component '{name}' in {folder / INDEX} is of neither diffusers nor transformers",
                "code that comes with a model is never run",
            )
    if not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{folder / INDEX} names no pipeline of diffusers", "set its '_class_name'")


def _downloaded(name: str) -> Path:
    from diffusers import DiffusionPipeline

    is_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if not is_id:
        raise UsageError(f"there is no folder '{name}'", "give a folder that holds model_index.json")
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"'{name}' is no folder or hub pipeline that diffusers can read: {reason}",
            "give a folder that holds model_index.json",
        ) from error
