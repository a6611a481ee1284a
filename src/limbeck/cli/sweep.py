"""`limbeck sweep`: a search over options of a recipe."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from limbeck.cli.overrides import parse_overrides
from limbeck.cli.parameters import Flag, Overrides

_OPTIONS = ("search", "trials", "metric", "direction", "storage", "out", "quiet", "help", "debug")


def sweep(
    recipe: str,
    /,
    *overrides: Overrides,
    search: Annotated[list[str], Parameter(allow_repeating=True)],
    trials: int = 20,
    metric: str = "accuracy",
    direction: Literal["maximize", "minimize"] | None = None,
    storage: str | None = None,
    out: Path | None = None,
    quiet: Flag = False,
) -> None:
    """Search options of a recipe with optuna.

    Parameters
    ----------
    recipe
        Name of a shipped recipe or a YAML file.
    overrides
        Dotted paths with values that all trials share, as for `limbeck run`.
    search
        What to search, once for each path: PATH=LOW:HIGH, PATH=LOW:HIGH:log, or PATH=A,B,C.
    trials
        How many trials there are to be in all, over all processes.
    metric
        Figure of the last stage to optimise.
    direction
        Whether more or less of it is better; known for limbeck's own figures.
    storage
        File that the processes share; FILE.db is an sqlite data base, any other a journal; trials.log in OUT if absent.
    out
        Folder for the trials' runs; runs/NAME-sweep by the recipe's name if absent.
    quiet
        Show no progress.
    """
    from limbeck.sweeping import sweep as search_options

    result = search_options(
        recipe,
        search,
        out,
        trials=trials,
        metric=metric,
        direction=direction,
        storage=storage,
        overrides=parse_overrides(overrides, _OPTIONS),
        quiet=quiet,
    )
    from limbeck.cli.tables import show_table

    paths = list(result.best.values)
    best_first = [result.best, *(trial for trial in result.trials if trial is not result.best)]
    rows = [
        [str(trial.number), f"{trial.metric:.6g}", *(f"{trial.values[path]}" for path in paths), str(trial.folder)]
        for trial in best_first[:10]
    ]
    show_table(("trial", metric, *paths, "folder"), rows, title=f"best of {len(result.trials)} finished trials")
