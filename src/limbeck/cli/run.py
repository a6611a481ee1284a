"""`limbeck run`: a recipe into a folder."""

from pathlib import Path

from limbeck.cli.overrides import parse_overrides
from limbeck.cli.parameters import Flag, Overrides

_OPTIONS = ("out", "resume", "dry-run", "quiet", "help", "debug")


def run(
    recipe: str,
    /,
    *overrides: Overrides,
    out: Path | None = None,
    resume: Flag = False,
    dry_run: Flag = False,
    quiet: Flag = False,
) -> None:
    """Run a recipe: a shipped name or a YAML file.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, a YAML file, or the folder of a run (to resume it).
    overrides
        Dotted paths with values.
    out
        Folder to write; runs/NAME by the recipe's name if absent.
    resume
        Continue the run in that folder where it stopped.
    dry_run
        Check the recipe, print it with all defaults, and write nothing.
    quiet
        Show no progress and no results.
    """
    from limbeck.running import default_folder, resolve
    from limbeck.running import run as run_recipe

    values = parse_overrides(overrides, _OPTIONS)
    if dry_run:
        import yaml

        print(yaml.safe_dump(resolve(recipe, values).model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        return
    from limbeck.core.errors import Interrupted
    from limbeck.core.progress import is_main

    folder = out or default_folder(recipe)
    try:
        finished = run_recipe(recipe, folder, overrides=values, resume=resume, quiet=quiet)
    except Interrupted as error:
        raise Interrupted(error.message, f"resume with: limbeck run {folder} --resume") from error
    if not quiet and is_main():
        from limbeck.cli.tables import show_results

        show_results(finished.results())
        print(f"\n{folder}/student")
