"""Which data can be named in a recipe, checked without importing torch."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from limbeck.core.errors import MissingExtraError, RecipeError, UnknownNameError
from limbeck.core.specs import DataSpec

FORMS = {
    "digits": "8x8 gray digits of scikit-learn, embedded",
    "mnist:PATH": "folder with IDX files, as they are or gzipped",
    "parquet:PATH": "parquet file, or folder of train and test files",
    "folder:PATH": "one folder of images a class, under train and val if these exist",
    "datasets:PATH": "data set saved with save_to_disk",
    "pairs:PATH": "folder of pairs of noise and data, from limbeck.data.pairs.write_pairs",
    "npz:PATH": "NumPy archive with the arrays image and label",
    "pydoc": "text of Python's own documentation, embedded",
    "text:PATH": "file of plain text, or folder of such files",
    "jsonl:PATH": "file of one JSON object a line with columns of text, or folder of train and test files",
}
_TEXT = ("pydoc", "text", "jsonl")
_FOR_TEXT = ("transformers", "tokenizers")
_SMALLEST_BPE = 260  # every byte, and the special tokens
_PACKAGES: dict[str, tuple[str, ...]] = {
    "parquet": ("pyarrow", "PIL"),
    "folder": ("PIL",),
    "datasets": ("datasets", "PIL"),
}


class DataName(NamedTuple):
    """A data set's name in its two parts: the kind before the colon, the path after it ("" for `digits`)."""

    kind: str
    path: str


def known_data() -> list[str]:
    """The names and forms of data in recipes."""
    return sorted(FORMS)


def parse_data_name(name: str) -> DataName:
    """Takes a name apart.

    Raises:
        UnknownNameError: none of `known_data()`.
    """
    kind, _, path = name.partition(":")
    kinds = {form.partition(":")[0]: ":" in form for form in FORMS}
    if kind not in kinds or kinds[kind] != bool(path):
        raise UnknownNameError("data set", name, known_data())
    return DataName(kind, path)


def check_data(spec: DataSpec, key: str = "data") -> None:
    """Refuses what can be seen to be wrong without reading the data: name, path, package.

    Args:
        spec: the data.
        key: dotted path of the spec in its recipe, for messages.

    Raises:
        UnknownNameError, MissingExtraError: no such data, or a package for them is not installed.
        RecipeError: the path does not exist.
    """
    kind, path = parse_data_name(spec.name)
    if path and not Path(path).expanduser().exists():
        raise RecipeError(f"{key}.name", f"there is no file or folder '{path}'", FORMS[f"{kind}:PATH"])
    packages, extra = _PACKAGES.get(kind, ()), "vision"
    if is_text(spec):
        packages, extra = (*(package for package in packages if package != "PIL"), *_FOR_TEXT), "language"
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra, f"the data '{spec.name}'")
    if is_text(spec):
        _check_text(spec, key)
    _check_encoding(spec, key)


def is_text(spec: DataSpec) -> bool:
    """Whether the data are text: always, by their kind, or because a column of text is named."""
    named = spec.text.completion_column or spec.text.prompt_column
    return parse_data_name(spec.name).kind in (*_TEXT, *(("parquet", "datasets") if named else ()))


def _check_encoding(spec: DataSpec, key: str) -> None:
    if spec.whiten is not None and (is_text(spec) or parse_data_name(spec.name).kind == "pairs"):
        raise RecipeError(f"{key}.whiten", "only pictures are whitened", "remove the key")
    if spec.encoding is None:
        if spec.caption_column is not None:
            raise RecipeError(f"{key}.caption_column", "captions are for a pipeline's encoders", "set data.encoding")
        return
    kind, pipeline = parse_data_name(spec.name).kind, spec.encoding.pipeline
    if is_text(spec) or kind == "pairs":
        raise RecipeError(f"{key}.encoding", "only pictures, with or without captions, are encoded", "remove the key")
    if spec.augment:
        raise RecipeError(f"{key}.augment", "what is encoded once is not augmented", "remove the key")
    if spec.caption_column is not None and kind not in ("folder", "parquet", "datasets"):
        raise RecipeError(f"{key}.caption_column", f"'{kind}' has no captions", "remove the key")
    if find_spec("diffusers") is None:
        raise MissingExtraError("diffusers", "diffusion", f"encoding with '{pipeline}'")
    is_path = pipeline.startswith((".", "/", "~")) or pipeline.count("/") > 1
    if is_path and not Path(pipeline).expanduser().is_dir():
        raise RecipeError(
            f"{key}.encoding.pipeline", f"there is no folder '{pipeline}'", "give a folder that holds model_index.json"
        )


def _check_text(spec: DataSpec, key: str) -> None:
    name, text = spec.text.tokenizer, f"{key}.text"
    kind, colon, size = name.partition(":")
    if kind == "bpe" and not (colon and size.isdecimal() and _SMALLEST_BPE <= int(size) <= 1 << 20):
        raise RecipeError(
            f"{text}.tokenizer", f"'{name}' is no size of a vocabulary", f"bpe:SIZE with SIZE from {_SMALLEST_BPE}"
        )
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).expanduser().is_dir():
        raise RecipeError(f"{text}.tokenizer", f"there is no folder '{name}'", "give a folder with tokenizer.json")
    if spec.label_column is not None and (spec.text.prompt_column or spec.text.mask_rate or spec.text.chat):
        raise RecipeError(f"{key}.label_column", "text with classes has no prompts and hides nothing", "remove the key")
    if spec.augment:
        raise RecipeError(f"{key}.augment", "augmentations are for images", "remove the key")
