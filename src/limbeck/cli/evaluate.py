"""`limbeck eval`: a finished run's student, measured again."""

import json
from pathlib import Path

from limbeck.cli.parameters import Json


def evaluate(run: Path, /, *, stage: str | None = None, as_json: Json = False) -> None:
    """Measure a finished run's student on its validation data.

    Parameters
    ----------
    run
        Folder of the run.
    stage
        Measure this stage's result; the last one's if absent.
    as_json
        Print JSON.
    """
    from limbeck.finished import evaluate as measure

    figures = measure(run, stage)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    from limbeck.cli.tables import show_results

    show_results({stage or "student": figures})
