"""`limbeck plan`: what a recipe will cost."""

import json
from dataclasses import asdict

from limbeck.cli.overrides import parse_overrides
from limbeck.cli.parameters import Json, Overrides


def plan(recipe: str, /, *overrides: Overrides, as_json: Json = False) -> None:
    """Say what a recipe will cost before it is run: parameters, FLOPs, memory, disk, time.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, a YAML file, or the folder of a run.
    overrides
        Dotted paths with values, as for `limbeck run`.
    as_json
        Print JSON.
    """
    from limbeck.planning import plan as measure

    found = measure(recipe, overrides=parse_overrides(overrides, ("json", "help", "debug")))
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    from limbeck.cli.tables import count, duration, show_table, size

    header = ("stage", "method", "student", "teacher", "FLOPs a step", "of which teacher", "memory", "disk", "steps")
    rows = [
        [
            stage.stage,
            stage.method,
            count(stage.student_parameters),
            count(stage.teacher_parameters) if stage.teacher_parameters else "–",
            count(stage.flops_step),
            count(stage.flops_teacher) if stage.flops_teacher else "–",
            size(stage.memory_bytes),
            size(stage.disk_bytes),
            str(stage.steps) if stage.steps else "–",
            duration(stage.seconds_step) if stage.steps else "–",
            duration(stage.seconds) if stage.steps else "not predicted",
        ]
        for stage in found.stages
    ]
    show_table((*header, "a step", "in all"), rows, left=("method",))
    print(
        f"\nin all {duration(found.seconds)} on {found.device}; {size(found.memory_bytes)} of memory at the peak; "
        f"{size(found.disk_bytes)} on disk"
    )
