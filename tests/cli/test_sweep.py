"""Sweeps: what is searched, that processes share it, and that it goes on where it stopped."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

import limbeck
from limbeck.core.errors import Interrupted, UsageError
from limbeck.search_space import parse_search
from tests.cli.conftest import Command, contents, write

WIDTH = "distil.student.arguments.width=2,4"
RATE = "distil.train.optimizer.lr=1e-3:1e-1:log"


@pytest.fixture
def recipe(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny recipe with its first stage alone, for speed."""
    tiny["stages"] = [{**tiny["stages"][0], "name": "distil", "train": {"steps": 2, "batch_size": 8}}]
    return write(tmp_path / "tiny.yaml", tiny)


def test_ranges_and_choices() -> None:
    width, rate, norm, depth = parse_search(["a.width=8,16", "b.lr=1e-4:1e-1:log", "c.norm=batch,none", "d=1:3"])
    assert width.choices == (8, 16)
    assert (rate.low, rate.high, rate.log) == (1e-4, 1e-1, True)
    assert norm.choices == ("batch", "none")
    assert (depth.low, depth.high, depth.log) == (1, 3, False)


@pytest.mark.parametrize(
    "search",
    [[], ["a"], ["a="], ["=1,2"], ["a=3"], ["a=3:1"], ["a=0:1:log"], ["a=1:2:lin"], ["a=x:y"], ["a=1,2", "a=3,4"]],
)
def test_what_is_no_search(search: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_search(search)


def test_a_sweep_prints_the_best(recipe: Path, tmp_path: Path, limbeck: Command) -> None:
    words = ["sweep", recipe, "--search", WIDTH, "--search", RATE, "--trials", 3, "--out", tmp_path / "out", "--quiet"]
    outcome = limbeck(*words)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "best of 3 finished trials" in lines[0]
    accuracies = [float(line.split()[1]) for line in lines[2:]]
    assert accuracies == sorted(accuracies, reverse=True)
    again = limbeck(*words)
    assert again.out == outcome.out, "nothing was left to do"


def test_trials_are_a_function_of_the_seed(recipe: Path, tmp_path: Path) -> None:
    one, other = (limbeck.sweep(recipe, [RATE], tmp_path / name, trials=2, quiet=True) for name in ("a", "b"))
    assert {t.number: (t.values, t.metric) for t in one.trials} == {
        t.number: (t.values, t.metric) for t in other.trials
    }


def test_a_figure_of_which_less_is_better(recipe: Path, tmp_path: Path) -> None:
    storage = tmp_path / "trials.db"
    sweep = limbeck.sweep(
        recipe, {"distil.student.arguments.width": "2,8"}, tmp_path / "out", trials=4, metric="parameters", quiet=True,
        storage=storage,
    )  # fmt: skip
    assert storage.is_file()
    assert sweep.best.values["distil.student.arguments.width"] == 2
    assert sweep.best.metric == min(trial.metric for trial in sweep.trials)


def test_an_interrupted_trial_is_taken_up_again(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise Interrupted("SIGTERM received")

    with monkeypatch.context() as patch:
        patch.setattr("limbeck.sweeping.run", interrupted)
        with pytest.raises(Interrupted):
            limbeck.sweep(recipe, [RATE], tmp_path / "out", trials=2, quiet=True)
    sweep = limbeck.sweep(recipe, [RATE], tmp_path / "out", trials=2, quiet=True)
    assert sorted(trial.number for trial in sweep.trials) == [0, 1]


def test_a_trial_that_fails_does_not_end_the_sweep(recipe: Path, tmp_path: Path) -> None:
    rates = {"distil.train.optimizer.lr": "1e-2,100"}
    wild = {"distil.train.optimizer.name": "sgd", "distil.train.steps": 40, "distil.student.arguments.depth": 8}
    with pytest.warns(UserWarning, match="failed"):
        sweep = limbeck.sweep(recipe, rates, tmp_path / "out", trials=6, overrides=wild, quiet=True)
    assert {trial.values["distil.train.optimizer.lr"] for trial in sweep.trials} == {1e-2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--search", "distil.train.optimizer.lrr=1:2"], "'lr'"),
        (["--search", "distill.train.steps=1:2"], "'distil'"),
        (["--search", "distil.student.arguments.width=0:4"], "distil.student.arguments.width"),
        (["--search", "distil.train.steps"], "PATH=LOW:HIGH"),
        (["--search", WIDTH, "--metric", "acuracy"], "'accuracy'"),
        (["--search", WIDTH, "--trials", "0"], "trials"),
        (["--search", WIDTH, "--trials", "few"], "--trials"),
        (["--search", WIDTH, "--direction", "up"], "maximize"),
        (["--search", WIDTH, "--sed", "1"], "'seed'"),
    ],
)
def test_bad_sweeps(words: list[str], says: str, recipe: Path, tmp_path: Path, limbeck: Command) -> None:
    before = contents(tmp_path)
    outcome = limbeck("sweep", recipe, "--out", tmp_path / "out", *words)
    assert outcome.code == 2, outcome
    assert says in outcome.err
    assert contents(tmp_path) == before


def test_a_storage_of_another_search_is_refused(recipe: Path, tmp_path: Path, limbeck: Command) -> None:
    limbeck_sweep = ["sweep", recipe, "--out", tmp_path / "out", "--trials", 1, "--quiet", "--search"]
    assert limbeck(*limbeck_sweep, WIDTH).code == 0
    outcome = limbeck(*limbeck_sweep, RATE)
    assert outcome.code == 2
    assert "another recipe, search or metric" in outcome.err


@pytest.mark.timeout(300)  # both import torch, on a machine that may be busy
def test_two_processes_share_a_sweep(recipe: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared.log"
    command = [
        sys.executable, "-m", "limbeck", "sweep", str(recipe), "--search", RATE, "--trials", "4", "--quiet",
        "--storage", str(storage), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    backend = optuna.storages.journal.JournalFileBackend(str(storage))
    study = optuna.load_study(study_name="limbeck", storage=optuna.storages.JournalStorage(backend))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    assert len({trial.params["distil.train.optimizer.lr"] for trial in study.trials}) == 4
    assert len(list((tmp_path / "out").glob("trial-*"))) == 4
