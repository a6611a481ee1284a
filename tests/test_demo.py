"""The demo: from nothing to a table and a report, and on from where it stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limbeck import demo
from limbeck.core.errors import Interrupted, UsageError
from limbeck.core.run import Run


def words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "limbeck", "demo", *arguments]


def test_the_command_prints_a_table_and_writes_a_report(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        words("--quick", "--seeds", "2", "--out", str(out)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()[:12]
    for title in ("Accuracy", "Agrees with teacher", "Perplexity", "Fréchet", "On all real", "Parameters", "Training"):
        assert title in header
    stages = [f"{part}: {stage}" for part in ("digits", "language") for stage in ("teacher", "alone", "distilled")]
    stages += [f"diffusion: {stage}" for stage in ("teacher", "four", "two", "one")] + ["dataset: distil"]
    assert [" ".join(row.split()[:2]) for row in rows] == stages
    assert ["±" in row for row in rows] == [True] * 3 + [False] * 8
    assert "over 2 seeds" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert (out / "report.html").stat().st_size < 2 * 1024 * 1024
    assert {path.name for path in out.iterdir()} == {"dataset", "diffusion", "digits", "language", "report.html"}
    page = (out / "report.html").read_text()
    assert "<h1" in page
    for title in ("teacher, 50 steps", "four, 4 steps", "two, 2 steps", "one, 1 step"):
        assert f"samples of {title}" in page
    assert "synthetic images of distil" in page


def test_an_interrupted_demo_exits_with_3_and_can_go_on(tmp_path):
    arguments = words("--quick", "--seeds", "1", "--out", str(tmp_path / "demo"))
    said = _interrupted(arguments)
    assert f"continue with: limbeck demo --out {tmp_path / 'demo'} --seeds 1 --quick" in said
    assert not (tmp_path / "demo" / "report.html").exists()
    saved = Run.open(tmp_path / "demo" / "digits" / "seed-0").checkpoints("teacher", 1).steps()
    assert saved
    _interrupted(arguments)  # what it goes on to is the next test's concern
    assert Run.open(tmp_path / "demo" / "digits" / "seed-0").checkpoints("teacher", 1).steps() >= saved


def _interrupted(arguments: list[str]) -> str:
    """Starts a demo, interrupts it as soon as it trains, and returns all that it said."""
    stopped = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert stopped.stderr is not None
    first = stopped.stderr.readline()  # a line of progress: training is under way
    assert "digits, seed 0, teacher" in first
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 3, said
    return said


def test_a_resumed_demo_is_the_same_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PARTS", demo.PARTS[:1])  # one part tells, and the other takes seconds to import
    whole = demo.demonstrate(tmp_path / "whole", 1, quick=True, quiet=True)

    @contextmanager
    def interrupting() -> Iterator[demo.Watch]:
        def watch(stage: str, steps: int, row: dict) -> None:
            if stage == "digits, seed 0, distilled" and row["step"] == 50:
                os.kill(os.getpid(), signal.SIGINT)

        yield watch

    monkeypatch.setattr(demo, "progress", interrupting)
    with pytest.raises(Interrupted, match="demo --out"):
        demo.demonstrate(tmp_path / "cut", 1, quick=True)
    cut = demo.demonstrate(tmp_path / "cut", 1, quick=True, quiet=True)
    rows = [_without_time(Run.open(shown.report.parent / "digits" / "seed-0")) for shown in (whole, cut)]
    assert rows[0] == rows[1]
    assert whole.table()[0] == cut.table()[0]


def _without_time(run: Run) -> list[str]:
    return [json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in run.metrics()]


@pytest.mark.parametrize("name", ["demo", "demo-language"])
def test_only_the_objective_sets_the_students_apart(name):
    from limbeck.core.recipe import load_recipe

    recipe = load_recipe(name)
    teacher, alone, distilled = recipe.stages
    assert alone.student == distilled.student
    assert alone.train == distilled.train
    assert not alone.teacher
    assert distilled.teacher[0].name == f"stage:{teacher.name}"


def test_without_transformers_the_language_part_says_that_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"language part is left out.*limbeck\[language\]"):
        assert demo.language_model(tmp_path, 1, True, lambda stage, steps, row: None) == []


@pytest.mark.parametrize("seeds", [0, -1, 101])
def test_bad_numbers_of_seeds(tmp_path, seeds):
    with pytest.raises(UsageError, match="--seeds"):
        demo.demonstrate(tmp_path / "demo", seeds, quick=True)
    assert not (tmp_path / "demo").exists()


def test_a_quick_demo_does_not_go_on_as_a_full_one(tmp_path: Path):
    from limbeck.core.recipe import load_recipe

    Run.create(tmp_path / "digits" / "seed-0", load_recipe("demo", {"teacher.train.steps": 60}))
    with pytest.raises(UsageError, match=r"another recipe .*(\n.*)*--quick"):
        demo.demonstrate(tmp_path, 1, quiet=True)
