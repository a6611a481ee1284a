"""Running a recipe into a folder: checked as a whole before anything is written, shown and tracked while it runs."""

import copy
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core import catalogue
from limbeck.core.errors import RecipeError, UsageError, did_you_mean
from limbeck.core.recipe import check_recipe, load_recipe, shipped_recipes
from limbeck.core.specs import Recipe, StageSpec

if TYPE_CHECKING:
    from limbeck.core.run import Run
    from limbeck.core.trackers import Watch
    from limbeck.experiment import Experiment

RecipeLike = Recipe | Mapping[str, Any] | str | Path
"""A recipe, its plain data, the name of a shipped one, a YAML file, or the folder of a run."""


def run(
    recipe: RecipeLike,
    out: Path | str | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
    watch: "Watch | None" = None,
) -> "Run":
    """Runs a recipe and returns its run.

    Args:
        recipe: what to do.
        out: folder to write; `default_folder` if absent.
        overrides: values by dotted path, as `{"distil.train.steps": 500}`.
        resume: continue the run in `out` where an interruption or crash left it.
        quiet: show no progress.
        watch: receives (stage, steps in all, row) for each row of metrics.

    Raises:
        UsageError: the recipe or the folder cannot be used; nothing was written.
        Interrupted: a signal arrived; a checkpoint is on disk, and the run can be resumed.

    Example::

        finished = limbeck.run("digits-kd", "runs/first", overrides={"seed": 1})
        print(finished.results()["distilled"]["accuracy"])
    """
    resolved = resolve(recipe, overrides)
    folder = Path(out) if out is not None else default_folder(recipe)

    from limbeck.experiment import Experiment  # imports torch: only once the recipe is known to be sound

    return execute(Experiment(resolved, _unwritten(folder)), resume=resume, quiet=quiet, watch=watch)


def resolve(recipe: RecipeLike, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe in any form as a checked `Recipe`; torch is not imported.

    Raises:
        UsageError: no such recipe, or it cannot be used; the message names the key.
    """
    from limbeck.core.trackers import check_trackers

    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        if overrides:
            raise UsageError("overrides go with a recipe's name or file", "change the recipe itself")
        tree = dict(recipe)
        resolved = _knowing_own_methods(lambda: check_recipe(copy.deepcopy(tree)))
    else:
        name = _recipe_file(recipe)
        resolved = _knowing_own_methods(lambda: load_recipe(name, overrides))
    check_trackers(resolved.track)
    return resolved


def _knowing_own_methods(check: Callable[[], Recipe]) -> Recipe:
    """Runs a check, with methods that the caller's own code registered, which no generated catalogue holds."""
    try:
        return check()
    except RecipeError as error:
        if not error.key.endswith(".method") or "limbeck.core.registry" not in sys.modules:
            raise
        own = {slug: entry for slug, entry in catalogue.build().items() if slug not in catalogue.read()}
        if not own:
            raise
        catalogue.read().update(own)
        return check()


def default_folder(recipe: RecipeLike) -> Path:
    """Where a run is written when nothing is said: the run's own folder, or `runs/NAME` by the recipe's name.

    Raises:
        UsageError: the recipe is an object and has no name.
    """
    if not isinstance(recipe, str | Path):
        raise UsageError("a recipe given as an object needs a folder", "give out")
    path = Path(_recipe_file(recipe))
    return path.parent if path.parent == Path(recipe) and path.name == "recipe.yaml" else Path("runs") / path.stem


def execute(
    experiment: "Experiment", *, resume: bool = False, quiet: bool = False, watch: "Watch | None" = None
) -> "Run":
    """Checks an experiment as a whole, creates its folder and runs it, with progress and trackers.

    Raises:
        UsageError: two things in it do not go together, or the folder is taken; nothing was written.
        Interrupted: a signal arrived; a checkpoint is on disk.
    """
    from limbeck.core.progress import progress
    from limbeck.core.trackers import tracking

    check(experiment)
    _create_folder(experiment, resume)
    with ExitStack() as stack:
        watchers = [stack.enter_context(tracking(experiment.recipe, experiment.run.folder))]
        if not quiet:
            watchers.append(stack.enter_context(progress()))
        if watch is not None:
            watchers.append(watch)

        def tell_all(stage: str, steps: int, row: dict[str, Any]) -> None:
            for watcher in watchers:
                watcher(stage, steps, row)

        experiment.watch = tell_all
        return experiment.execute()


def check(experiment: "Experiment") -> None:
    """Builds every stage once, with untrained results of the stages before it, so that what does not go together is
    refused before the first stage has trained for hours.

    Raises:
        UsageError: the models, the method and the data of a stage do not fit.
    """
    given = experiment.objects
    # Students of the caller are copied: a method may change its student as it is built.
    copies = {key: copy.deepcopy(model) for key, model in given.items() if key.endswith(".student")}
    experiment.objects = {**given, **copies}
    for stage in experiment.recipe.stages:
        prepared = experiment.prepare(stage)
        _check_players(stage, getattr(prepared.method, "players", dict)())
        experiment.results[stage.name] = prepared.method.student  # which a conversion has made anew
    experiment.objects, experiment.results = given, {}


def _check_players(stage: StageSpec, players: Collection[str]) -> None:
    for name in stage.train.players if stage.train else ():
        if name not in players:
            key = f"{stage.name}.train.players.{name}"
            raise RecipeError(key, "the method has no such player", did_you_mean(name, players))


def _recipe_file(recipe: str | Path) -> str:
    """A run's folder stands for the recipe in it."""
    inside = Path(recipe) / "recipe.yaml"
    return str(inside) if str(recipe) not in shipped_recipes() and inside.is_file() else str(recipe)


def _unwritten(folder: Path) -> "Run":
    from limbeck.core.run import Run

    return Run(folder)


def _create_folder(experiment: "Experiment", resume: bool) -> None:
    """The main process creates the folder; the others wait, and find it there."""
    from limbeck.core.run import Run

    if experiment.world.main:
        experiment.run = Run.create(experiment.run.folder, experiment.recipe, resume)
    experiment.world.barrier()
