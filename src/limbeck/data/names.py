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
    "npz:PATH": "NumPy archive with the arrays image and label",
}
_PACKAGES = {"parquet": ("pyarrow", "PIL"), "folder": ("PIL",), "datasets": ("datasets", "PIL")}


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
    for package in _PACKAGES.get(kind, ()):
        if find_spec(package) is None:
            raise MissingExtraError(package, "vision", f"the data '{spec.name}'")
