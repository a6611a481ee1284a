"""What the commands do and print."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.cli import main
from limbeck.cli.app import COMMANDS
from limbeck.core.errors import LimbeckError, UsageError
from limbeck.core.recipe import shipped_recipes
from limbeck.core.run import Run
from tests.cli.conftest import Command, contents, write


def test_help_names_every_command(limbeck: Command) -> None:
    outcome = limbeck("--help")
    assert outcome.code == 0
    for name in COMMANDS:
        assert f" {name} " in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, limbeck: Command) -> None:
    outcome = limbeck(name, "--help")
    assert outcome.code == 0
    assert COMMANDS[name].partition("\n")[0][:40] in outcome.out


def test_the_version(limbeck: Command) -> None:
    assert limbeck("--version").out.strip()[0].isdigit()


def test_an_unknown_command(limbeck: Command) -> None:
    outcome = limbeck("rnu")
    assert outcome.code == 2
    assert outcome.err == "error: unknown command 'rnu'\nhint: did you mean 'run'?\n"


def test_a_run_prints_its_figures(tiny: dict[str, Any], tmp_path: Path, limbeck: Command) -> None:
    recipe = write(tmp_path / "tiny.yaml", tiny)
    outcome = limbeck("run", recipe, "--out", tmp_path / "run", "--distil.options.temperature", "2", "--seed=3")
    assert outcome.code == 0, outcome.err
    assert outcome.out.split()[:2] == ["teacher", "distil"]
    for title in ("accuracy", "95 % interval", "agrees with teacher", "parameters", "FLOPs an item", "latency"):
        assert title in outcome.out
    assert "distil  4/4" in outcome.err
    resolved = Run.open(tmp_path / "run").recipe()
    assert resolved.seed == 3
    assert resolved.stages[1].options == {"temperature": 2}


def test_resuming_a_finished_run_changes_nothing(finished: Path, limbeck: Command) -> None:
    before = {name: data for name, data in contents(finished).items() if name != "run.json"}
    outcome = limbeck("run", finished, "--resume", "--quiet")
    assert (outcome.code, outcome.out) == (0, "")
    after = contents(finished)
    assert {name: after[name] for name in before} == before


def test_a_taken_folder_is_refused(finished: Path, limbeck: Command) -> None:
    outcome = limbeck("run", finished)
    assert outcome.code == 2
    assert "--resume" in outcome.err


def test_resuming_with_another_recipe_names_the_difference(finished: Path, limbeck: Command) -> None:
    outcome = limbeck("run", finished, "--resume", "--seed", "7")
    assert outcome.code == 2
    assert "seed: 0 there, 7 here" in outcome.err


def test_a_dry_run_prints_a_recipe_with_all_defaults(tmp_path: Path, limbeck: Command, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = limbeck("run", "digits-kd", "--dry-run", "--distilled.train.steps", "7", "--distilled.train.epochs=null")
    tree = yaml.safe_load(outcome.out)
    assert tree["stages"][-1]["train"]["steps"] == 7
    assert tree["stages"][-1]["train"]["non_finite"] == "raise"
    Path("again.yaml").write_text(outcome.out)
    assert limbeck("run", "again.yaml", "--dry-run").out == outcome.out
    assert list(contents(tmp_path)) == ["again.yaml"]


DATA = {name: yaml.safe_load(path.read_text())["data"] for name, path in shipped_recipes().items()}
KINDS = {name: (data if isinstance(data, str) else data["name"]).partition(":") for name, data in DATA.items()}
NEED_A_PATH = {name: kind for name, (kind, _, path) in KINDS.items() if path}


@pytest.mark.parametrize("name", sorted(set(KINDS) - set(NEED_A_PATH)))
def test_shipped_recipes_are_sound(name: str, limbeck: Command) -> None:
    outcome = limbeck("run", name, "--dry-run")
    assert outcome.code == 0, outcome.err


def test_recipes_that_take_the_path_of_their_data_are_known() -> None:
    assert {"mnist-kd": "mnist", "mnist-consistency": "mnist", "cifar-kd": "parquet", "cifar-ofa": "parquet",
            "cifar-meal": "parquet", "cifar-consistency": "parquet"}.items() <= NEED_A_PATH.items()  # fmt: skip


@pytest.mark.parametrize("name", sorted(NEED_A_PATH))
def test_shipped_recipes_take_the_path_of_their_data(name: str, tmp_path: Path, limbeck: Command) -> None:
    outcome = limbeck("run", name, "--dry-run", "--data.name", f"{NEED_A_PATH[name]}:{tmp_path}")
    assert outcome.code == 0, outcome.err
    missing = limbeck("run", name, "--dry-run")
    assert missing.code == 2
    assert "data.name" in missing.err


def test_methods_lists_all(limbeck: Command) -> None:
    rows = json.loads(limbeck("methods", "--json").out)
    assert set(rows[0]) == {"slug", "title", "arxiv", "year", "family", "needs", "claim"}
    assert {"kd", "supervised"} <= {row["slug"] for row in rows}
    table = limbeck("methods").out
    assert all(row["slug"] in table for row in rows)


def test_methods_of_one_family(limbeck: Command) -> None:
    rows = json.loads(limbeck("methods", "--json", "--family", "classic").out)
    assert {row["family"] for row in rows} == {"classic"}
    outcome = limbeck("methods", "--family", "clasic")
    assert outcome.code == 2
    assert "'classic'" in outcome.err


def test_methods_shows_one(limbeck: Command) -> None:
    shown = limbeck("methods", "kd").out
    for text in (
        "1503.02531",
        "temperature",
        "(0, 1000]",
        "4.0",
        "softens both distributions",
        "claim",
        r"\mathrm{KL}",
    ):
        assert text in shown
    assert ":math:" not in shown


def test_every_method_can_be_shown(limbeck: Command) -> None:
    for row in json.loads(limbeck("methods", "--json").out):
        assert row["title"] in limbeck("methods", row["slug"]).out


def test_eval_measures_the_result_again(finished: Path, limbeck: Command) -> None:
    figures = json.loads(limbeck("eval", finished, "--json").out)
    recorded = Run.open(finished).results()["distil"]
    assert {name: recorded[name] for name in figures} == figures
    assert figures["accuracy_low"] < figures["accuracy"] < figures["accuracy_high"]
    assert "agreement" not in json.loads(limbeck("eval", finished, "--stage", "teacher", "--json").out)
    assert "agrees with teacher" in limbeck("eval", finished).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "no/run"], "holds no run"),
        (["eval", "RUN", "--stage", "techer"], "'teacher'"),
        (["report", "no/run"], "holds no run"),
        (["export", "no/run", "--to", "onnx", "--out", "x"], "no folder"),
        (["export", "RUN", "--to", "timm", "--out", "x"], "limbeck, onnx"),
        (["export", "RUN", "--to", "tim", "--out", "x"], "timm"),
        (["export", "RUN", "--to", "limbeck", "--out", "RUN"], "exists already"),
        (["export", "RUN"], "--to"),
        (["methods", "kdd"], "'kd'"),
        (["methods", "--jsn"], "--json"),
        (["sweep", "digits-kd"], "--search"),
        (["plan", "digit-kd"], "'digits-kd'"),
        (["plan", "digits-kd", "--sed", "1"], "'seed'"),
    ],
)
def test_bad_usage(words: list[str], says: str, finished: Path, tmp_path: Path, limbeck: Command, monkeypatch: Any
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = limbeck(*[str(finished) if word == "RUN" else word for word in words])
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert says in outcome.err
    assert not contents(tmp_path)


def test_export(finished: Path, tmp_path: Path, limbeck: Command) -> None:
    outcome = limbeck("export", finished, "--to", "limbeck", "--out", tmp_path / "student")
    assert outcome.code == 0, outcome.err
    files, _, table = outcome.out.partition("\n\n")
    assert files.split() == [str(tmp_path / "student" / name) for name in ("config.json", "model.safetensors")]
    header, teacher, student = table.strip().splitlines()
    assert header.split() == ["on", "disk", "parameters", "an", "item"]
    assert teacher.startswith("teacher")
    assert student.startswith("student")


def test_an_export_without_its_teacher_is_written_all_the_same(
    finished: Path, tmp_path: Path, limbeck: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*words: object) -> None:
        raise UsageError("the teacher's folder is gone")

    monkeypatch.setattr("limbeck.finished.prepare_again", gone)
    outcome = limbeck("export", finished, "--to", "limbeck", "--out", tmp_path / "student")
    assert outcome.code == 0
    assert "not compared with its teacher: the teacher's folder is gone" in outcome.err
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_failure_is_one_line_and_a_traceback_with_debug(limbeck: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("limbeck.listing.list_methods", fail)
    monkeypatch.setattr("limbeck.cli.methods.list_methods", fail)
    outcome = limbeck("methods")
    assert outcome.code == 1
    assert outcome.err.startswith("error: ZeroDivisionError: by zero\nhint: ")
    assert "Traceback" in limbeck("methods", "--debug").err


def test_exit_codes_are_those_of_the_errors(limbeck: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in _kinds(LimbeckError):
        error = LimbeckError.__new__(kind)
        Exception.__init__(error, "message")
        error.message, error.hint = "message", "hint"

        def fail(*words: object, error: LimbeckError = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("limbeck.cli.methods.list_methods", fail)
        outcome = limbeck("methods")
        assert outcome.code == kind.exit_code
        assert outcome.err.endswith(": message\nhint: hint\n")


def test_interrupts_at_once_are_told_from_failures(limbeck: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.cli.methods.list_methods", stop)
    assert limbeck("methods").code == 3


def test_main_reads_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["limbeck", "methods", "kd"])
    assert main() == 0
    assert "Distilling the Knowledge" in capsys.readouterr().out


def _kinds(base: type[LimbeckError]) -> list[type[LimbeckError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in _kinds(child))]
