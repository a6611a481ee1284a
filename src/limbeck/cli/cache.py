"""`limbeck cache`: what teachers say, stored once."""

from limbeck.cli.overrides import parse_overrides
from limbeck.cli.parameters import Flag, Overrides

_OPTIONS = ("stage", "quiet", "help", "debug")


def cache(recipe: str, /, *overrides: Overrides, stage: str | None = None, quiet: Flag = False) -> None:
    """Run a recipe's teachers once and store what they say.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, a YAML file, or the folder of a run (for teachers that are results of its stages).
    overrides
        Dotted paths with values, as for `limbeck run`.
    stage
        Only this stage's teachers; all that have a cache if absent.
    quiet
        Show no progress.
    """
    from limbeck.caching import cache as fill
    from limbeck.core.errors import Interrupted

    try:
        folders = fill(recipe, stage, overrides=parse_overrides(overrides, _OPTIONS), quiet=quiet)
    except Interrupted as error:
        message = error.message.partition(";")[0]
        raise Interrupted(f"{message}; what is stored is kept", f"continue with: limbeck cache {recipe}") from error
    for folder in folders:
        print(folder)
