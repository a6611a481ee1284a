"""Filling the caches of a recipe: its teachers are run once, and every later run reads what they said."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import RecipeError, UsageError, did_you_mean
from limbeck.core.specs import Recipe, StageSpec
from limbeck.running import RecipeLike, resolve

if TYPE_CHECKING:
    from limbeck.core.trackers import Watch
    from limbeck.experiment import Experiment


def cache(
    recipe: RecipeLike,
    stage: str | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
    watch: "Watch | None" = None,
) -> list[Path]:
    """Runs a recipe's teachers over the training data and stores what they say; returns the caches' folders.

    What is stored already stays; damaged parts are made again. Several processes may work on one cache.

    Args:
        recipe: what is to be trained; for teachers that are results of earlier stages, the folder of a run in which
            these are finished.
        stage: whose teachers; all stages' that have a cache if absent.
        overrides: values by dotted path.
        quiet: show no progress.
        watch: receives (stage, rows in all, {"step": rows there}) as the work goes on.

    Raises:
        UsageError: no stage has a cache, an earlier stage is not finished, or a folder holds something else.
        Interrupted: a signal arrived; what is finished is kept.

    Example::

        limbeck.cache("recipe.yaml")
        limbeck.run("recipe.yaml", "runs/first")
    """
    resolved = resolve(recipe, overrides)
    stages = _chosen(resolved, stage)
    from limbeck.core import interrupt
    from limbeck.core.progress import progress
    from limbeck.core.run import Run
    from limbeck.experiment import Experiment

    folder = Path(recipe) if isinstance(recipe, str | Path) else Path()
    experiment = Experiment(resolved, Run(folder))
    with interrupt.interruptible(), progress() as show:
        for one in stages:
            _load_earlier(experiment, one)

            def report(done: int, rows: int, name: str = one.name) -> None:
                for shown in ([] if quiet else [show]) + ([] if watch is None else [watch]):
                    shown(name, rows, {"step": done})

            experiment.fill_cache(one, report)
    return [Path(one.cache.folder) for one in stages if one.cache is not None]


def _chosen(recipe: Recipe, name: str | None) -> list[StageSpec]:
    """The stages whose caches are to be filled."""
    names = [stage.name for stage in recipe.stages]
    if name is not None and name not in names:
        raise UsageError(f"there is no stage '{name}'", did_you_mean(name, names))
    stages = [stage for stage in recipe.stages if stage.cache is not None and name in (None, stage.name)]
    if not stages:
        key = f"{name or names[-1]}.cache"
        raise RecipeError(key, "there is no cache to fill", "add the key, e.g. cache: {folder: caches/teacher}")
    return stages


def _load_earlier(experiment: "Experiment", stage: StageSpec) -> None:
    """Loads the results of earlier stages that a stage works with."""
    from limbeck.models.saved import load_model

    finished = experiment.run.results() if experiment.run.recipe_path.is_file() else {}
    for name in stage.earlier:
        if name in experiment.results:
            continue
        if name not in finished:
            raise UsageError(
                f"stage '{stage.name}' works with stage '{name}', which is not finished",
                "start the recipe with limbeck run; once it asks for the cache: limbeck cache FOLDER",
            )
        experiment.results[name] = load_model(experiment.run.stage_result(name))
