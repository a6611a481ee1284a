"""`limbeck sample`."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from limbeck.cli import main
from tests.cli.conftest import Command, contents, write

RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "limit": 64, "mean": [0.5], "std": [0.5]},
    "stages": [
        {
            "name": "teacher",
            "method": "denoising",
            "student": {"name": "denoiser", "arguments": {"width": 16, "depth": 1}},
            "options": {"steps": 2},
            "train": {"steps": 2, "batch_size": 16},
        }
    ],
}


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a generator; tests put nothing but samples.png into it."""
    folder = tmp_path_factory.mktemp("drawer")
    recipe = write(folder / "recipe.yaml", RECIPE)
    assert main(["run", str(recipe), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def test_a_picture_is_written_where_it_is_asked_for(drawer: Path, tmp_path: Path, limbeck: Command) -> None:
    out = tmp_path / "x.png"
    words = ["sample", drawer, "--items", "7", "--label", "3", "5", "--steps", "1", "--guidance", "1.5", "--out", out]
    outcome = limbeck(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}\n"
    # Seven images in columns of three, each 32 pixels and a line.
    assert Image.open(out).size == (3 * 33, 3 * 33)
    first = out.read_bytes()
    assert limbeck(*words).code == 0
    assert out.read_bytes() == first
    assert limbeck(*words, "--seed", "1").code == 0
    assert out.read_bytes() != first


def test_the_run_s_folder_is_where_it_lies_otherwise(drawer: Path, limbeck: Command) -> None:
    outcome = limbeck("sample", drawer, "--items", "10")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{drawer / 'samples.png'}\n"
    assert Image.open(drawer / "samples.png").size == (10 * 33, 33)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN", "--label", "10"], "no class 10"),
        (["RUN", "--label", "x"], "--label"),
        (["RUN", "--items", "0"], "between 1 and 65536"),
        (["RUN", "--steps", "0"], "one step or more"),
        (["RUN", "--guidance", "-2"], "0 or more"),
        (["RUN", "--prompt", "a cat"], "takes no prompts"),
        (["RUN", "--out", "nowhere/x.png"], "no folder nowhere"),
        (["CLASSIFIER", "--out", "x.png"], "draws no samples"),
        (["nowhere"], "nowhere holds no run"),
        (["UNFINISHED", "--out", "x.png"], "is not finished"),
        ([], "RUN"),
    ],
)
def test_bad_usage(words: list[str], says: str, drawer: Path, finished: Path, tmp_path: Path, limbeck: Command,
                   monkeypatch: Any) -> None:  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_bytes((drawer / "recipe.yaml").read_bytes())
    places = {"RUN": drawer, "CLASSIFIER": finished, "UNFINISHED": unfinished}
    before = {name: contents(place) for name, place in places.items()}
    outcome = limbeck("sample", *[str(places.get(word, word)) for word in words])
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert says in outcome.err
    assert not contents(home)
    assert {name: contents(place) for name, place in places.items()} == before
