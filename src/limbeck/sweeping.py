"""Searching options of a recipe: optuna proposes, each trial is a run of its own, processes share one storage."""

import fcntl
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from limbeck.core import interrupt
from limbeck.core.errors import Interrupted, LimbeckError, MissingExtraError, UsageError, did_you_mean
from limbeck.running import default_folder, resolve, run
from limbeck.search_space import Axis, corners, parse_search

if TYPE_CHECKING:
    import optuna

Direction = Literal["maximize", "minimize"]

DIRECTIONS: dict[str, Direction] = {
    "accuracy": "maximize",
    "agreement": "maximize",
    "score": "maximize",
    "cross_entropy": "minimize",
    "calibration_error": "minimize",
    "teacher_kl": "minimize",
    "parameters": "minimize",
    "flops": "minimize",
    "latency": "minimize",
    "seconds": "minimize",
}
"""Which direction of limbeck's own figures is the better one."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished trial: its number, the values by dotted path, the metric, and the folder of its run."""

    number: int
    values: dict[str, Any]
    metric: float
    folder: Path


@dataclass(frozen=True, slots=True)
class Sweep:
    """A search so far: the best trial, and all finished ones from best to worst."""

    best: Trial
    trials: list[Trial]


def sweep(
    recipe: str | Path,
    search: Sequence[str] | Mapping[str, str],
    out: Path | str | None = None,
    *,
    trials: int = 20,
    metric: str = "accuracy",
    direction: Direction | None = None,
    storage: Path | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Sweep:
    """Searches options of a recipe and returns the trials.

    Called again with the same folder and storage it goes on: runs that were interrupted are resumed, and `trials`
    counts all that there are. Several processes may do so at once.

    Args:
        recipe: name or file of the recipe.
        search: what to search, as `["distil.train.optimizer.lr=1e-4:1e-1:log", "distil.options.temperature=1,2,4"]`,
            or a mapping of path to range or choices.
        out: folder of the trials' runs; `runs/NAME-sweep` by the recipe's name if absent.
        trials: number of trials in all.
        metric: figure of the last stage.
        direction: whether more or less of it is better; known for the figures in `DIRECTIONS`.
        storage: journal file, or an sqlite data base if it ends in `.db`; `trials.log` in `out` if absent.
        overrides: values by dotted path that all trials share.
        quiet: show no progress.

    Raises:
        UsageError: the recipe, the search or the metric cannot be used, or the storage belongs to another search.
        Interrupted: a signal arrived; the same call goes on.
    """
    axes, shared = parse_search(search), dict(overrides or {})
    base = resolve(recipe, shared)
    for values in corners(axes):  # every end of every range is tried on the recipe before anything is written
        resolve(recipe, {**shared, **values})
    if trials < 1:
        raise UsageError(f"trials: there must be one at least, not {trials}", "give --trials N")
    better = direction or _direction_of(metric)
    usual = default_folder(recipe)
    folder = Path(out) if out is not None else usual.with_name(f"{usual.name}-sweep")
    asked = {"recipe": base.model_dump(mode="json"), "search": [repr(axis) for axis in axes], "metric": metric}
    study = _open_study(folder, Path(storage) if storage is not None else folder / "trials.log", better, asked)
    return _Search(recipe, shared, axes, folder, metric, base.seed, quiet, study).work(trials)


@dataclass
class _Search:
    """The work of one process on a search."""

    recipe: str | Path
    shared: dict[str, Any]
    axes: list[Axis]
    folder: Path
    metric: str
    seed: int
    quiet: bool
    study: "optuna.Study"

    def work(self, trials: int) -> Sweep:
        """Runs trials until there are as many as asked for."""
        while True:
            interrupt.pause("between two trials")
            with _locked(self.folder / ".ask.lock"):  # so that no two processes take the same trial, or one too many
                claim = self._orphan() or self._new(trials)
            if claim is None:
                return self._summary()
            number, values, lock = claim
            with lock:  # held while this process lives: what is not held by anyone may be taken over
                self._run(number, values)

    def _orphan(self) -> tuple[int, dict[str, Any], TextIO] | None:
        """A trial that was begun and is nobody's: its process was interrupted or killed."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            lock = _try_lock(self.folder / f".trial-{trial.number:04d}.lock")
            if lock is None:
                continue
            if set(trial.params) == {axis.path for axis in self.axes}:
                return trial.number, dict(trial.params), lock
            self.study.tell(trial.number, state=TrialState.FAIL)  # killed before it had all its values
            lock.close()
        return None

    def _new(self, trials: int) -> tuple[int, dict[str, Any], TextIO] | None:
        from optuna.samplers import TPESampler

        from limbeck.core.randomness import derive

        if len(self.study.trials) >= trials:
            return None
        trial = self.study.ask()
        lock = _try_lock(self.folder / f".trial-{trial.number:04d}.lock")
        assert lock is not None
        # A sampler for each trial: what it proposes is a function of the seed, its number and the trials before it.
        self.study.sampler = TPESampler(seed=derive(self.seed, "trial", trial.number) % 2**32, constant_liar=True)
        return trial.number, {axis.path: axis.suggest(trial) for axis in self.axes}, lock

    def _run(self, number: int, values: dict[str, Any]) -> None:
        from optuna.trial import TrialState

        self._say(f"trial {number}: {', '.join(f'{path}={value}' for path, value in values.items())}")
        overrides = {**self.shared, **values}
        try:
            finished = run(self.recipe, self._trial_folder(number), overrides=overrides, resume=True, quiet=self.quiet)
        except Interrupted as error:
            raise Interrupted(error.message, "the same command goes on") from error
        except Exception as error:
            self.study.tell(number, state=TrialState.FAIL)
            reason = error.message if isinstance(error, LimbeckError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"trial {number} failed: {reason}", stacklevel=2)
            return
        figures = list(finished.results().values())[-1]
        if self.metric not in figures:
            self.study.tell(number, state=TrialState.FAIL)
            raise UsageError(f"the last stage has no figure '{self.metric}'", did_you_mean(self.metric, figures))
        self.study.tell(number, figures[self.metric])
        self._say(f"trial {number}: {self.metric} {figures[self.metric]:.6g}")

    def _summary(self) -> Sweep:
        from optuna.study import StudyDirection
        from optuna.trial import TrialState

        done = [
            Trial(trial.number, dict(trial.params), trial.value, self._trial_folder(trial.number))
            for trial in self.study.get_trials(states=(TrialState.COMPLETE,))
            if trial.value is not None
        ]
        if not done:
            raise LimbeckError("no trial has finished", "the warnings above say why they failed")
        done.sort(key=lambda trial: trial.metric, reverse=self.study.direction == StudyDirection.MAXIMIZE)
        return Sweep(done[0], done)

    def _trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def _direction_of(metric: str) -> Direction:
    if metric not in DIRECTIONS:
        raise UsageError(
            f"metric: it is not known whether more or less of '{metric}' is better",
            f"{did_you_mean(metric, DIRECTIONS)} Otherwise give --direction",
        )
    return DIRECTIONS[metric]


def _open_study(folder: Path, storage: Path, better: Direction, asked: dict[str, Any]) -> "optuna.Study":
    """The study in a storage, made if there is none."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "limbeck sweep") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage.parent.mkdir(parents=True, exist_ok=True)
    place: Any = f"sqlite:///{storage}"
    if storage.suffix != ".db":
        place = optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
    with _locked(folder / ".ask.lock"):
        study = optuna.create_study(storage=place, study_name="limbeck", direction=better, load_if_exists=True)
        known = study.user_attrs.get("asked")
        if known is None:
            study.set_user_attr("asked", json.dumps(asked, sort_keys=True))
        elif known != json.dumps(asked, sort_keys=True):
            raise UsageError(f"{storage} belongs to another recipe, search or metric", "choose another --storage")
    return study


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(path: Path) -> TextIO | None:
    """An open file that is locked until it is closed or the process ends; None when someone else holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
