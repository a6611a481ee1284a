"""A run's folder: its resolved recipe, its metrics, its checkpoints, its results; one process writes at a time."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import yaml

from limbeck.core.checkpoint import Checkpoints
from limbeck.core.durable import is_leftover, needing_room, read_json, remove_leftovers, write_bytes, write_json
from limbeck.core.errors import DamagedFileError, RecipeError, RunBusyError, UsageError
from limbeck.core.recipe import read_yaml
from limbeck.core.specs import Recipe

_PACKAGES = ("limbeck", "torch", "numpy", "transformers", "timm")


class Run:
    """A run's folder.

    Files: `recipe.yaml` (resolved), `run.json` (status, versions), `metrics.jsonl`, `results.json` (figures by stage),
    `checkpoints/<stage>/`, `stages/<stage>/` (each stage's result), `student/` (the last one's), `report.html`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._last_step: dict[str, int] = {}

    @classmethod
    def create(cls, folder: Path | str, recipe: Recipe, resume: bool = False) -> "Run":
        """A new run's folder, or with `resume` the existing one after checking that the recipe is the same.

        Raises:
            UsageError: the folder holds something already, or another recipe, or a link that leaves it.
        """
        run = cls(folder)
        if run.recipe_path.exists():
            run._refuse_links()
            if not resume:
                raise UsageError(f"{folder} holds a run already", "continue it with --resume, or choose another folder")
            if run.recipe() != recipe:
                raise UsageError(
                    f"{folder} was started with another recipe ({_first_difference(run.recipe(), recipe)})",
                    "resume without overrides, or choose another folder",
                )
            return run
        if run.folder.exists() and not all(is_leftover(path) for path in run.folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no run", "choose another folder with --out")
        run.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_bytes(run.recipe_path, text.encode())
        return run

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """An existing run's folder.

        Raises:
            UsageError: there is no run, or a link in it leaves the folder.
        """
        run = cls(folder)
        if not run.recipe_path.is_file():
            raise UsageError(f"{folder} holds no run", "give the folder that 'limbeck run' wrote")
        run._refuse_links()
        return run

    @property
    def recipe_path(self) -> Path:
        """Where the resolved recipe lies."""
        return self.folder / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        """Where the rows of metrics lie, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def student(self) -> Path:
        """Where the last stage's result lies, in its ecosystem's format."""
        return self.folder / "student"

    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            DamagedFileError: the file is no recipe any more.
        """
        try:
            return Recipe.model_validate(read_yaml(self.recipe_path))
        except (OSError, ValueError, RecipeError) as error:
            raise DamagedFileError(self.recipe_path, "it is no resolved recipe") from error

    def checkpoints(self, stage: str, keep: int) -> Checkpoints:
        """The checkpoints of one stage."""
        return Checkpoints(self.folder / "checkpoints" / stage, keep)

    def stage_result(self, stage: str) -> Path:
        """Where a stage's result lies."""
        return self.folder / "stages" / stage

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the folder: a second process that wants to write is refused; what a crash left behind is removed.

        Raises:
            RunBusyError: another process holds it.
        """
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunBusyError(f"another process is writing to {self.folder}", "wait for it, or stop it") from error
            _locks.add(lock)
            try:
                for folder in (self.folder, self.folder / "stages"):
                    remove_leftovers(folder)
                self._read_last_steps()
                yield
            finally:
                _locks.discard(lock)

    def record(self, stage: str, row: Mapping[str, Any]) -> None:
        """Appends a row of metrics; rows of the same stage from its step on, which a crash or rewind made void, go."""
        if row["step"] <= self._last_step.get(stage, -1):
            self._drop_rows(stage, row["step"])
        line = json.dumps({"stage": stage, **row}) + "\n"
        with needing_room(self.metrics_path, len(line)), self.metrics_path.open("a") as file:
            file.write(line)
        self._last_step[stage] = row["step"]

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All whole rows, of one stage or of all; a line that a crash cut short is passed over."""
        if not self.metrics_path.exists():
            return []
        rows = (_row(line) for line in self.metrics_path.read_bytes().splitlines())
        return [row for row in rows if row is not None and (stage is None or row["stage"] == stage)]

    def results(self) -> dict[str, dict[str, Any]]:
        """Final figures by stage; empty before the first stage is done."""
        return _read_json(self.folder / "results.json")

    def add_result(self, stage: str, figures: Mapping[str, Any]) -> None:
        """Records a finished stage's figures."""
        write_json(self.folder / "results.json", {**self.results(), stage: dict(figures)})

    def status(self) -> dict[str, Any]:
        """What `run.json` says: status, time of the last change, versions, hardware."""
        return _read_json(self.folder / "run.json")

    def set_status(self, status: str, **more: Any) -> None:
        """Records whether the run is running, interrupted, failed or done."""
        about = {"versions": _versions(), "hardware": platform.processor() or platform.machine()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.folder / "run.json", {"status": status, "changed": now, **about, **more})

    def _refuse_links(self) -> None:
        home = self.folder.resolve()
        for path in self.folder.rglob("*"):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise UsageError(f"{path} is a link that leaves the run's folder", "put the file itself in its place")

    def _read_last_steps(self) -> None:
        rows = self.metrics()
        if self.metrics_path.exists():
            self._rewrite(rows)  # a torn last line would swallow the next row
        self._last_step = {row["stage"]: row["step"] for row in rows}

    def _drop_rows(self, stage: str, step: int) -> None:
        self._rewrite([row for row in self.metrics() if row["stage"] != stage or row["step"] < step])

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_bytes(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows).encode())


_locks: set[IO[str]] = set()


def _let_go() -> None:
    """A lock belongs to all processes that have its file open, so loader workers would keep it beyond a kill -9."""
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics; None where a crash or an accident left something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match row:
        case {"stage": str(), "step": int()}:
            return row
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedFileError(path, "it is no JSON object")
    return value


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ImportError:  # PackageNotFoundError: an extra that is not installed
            continue
    return found


def _first_difference(old: Recipe, new: Recipe) -> str:
    return next(iter(differences(old.model_dump(mode="json"), new.model_dump(mode="json"))), "no difference")


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted paths at which two trees of plain data differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif old != new:
        yield f"{path}: {old!r} there, {new!r} here"
