"""Runs small enough to be made anew: every report in this folder shows these, or folders written by hand."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from limbeck.core.recipe import check_recipe
from limbeck.core.run import Run
from limbeck.running import run

TRAIN = {"steps": 6, "batch_size": 16, "log_every": 2, "evaluate_every": 2}
STUDENT = {"name": "mlp", "arguments": {"width": 4, "depth": 1}}


def recipe(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A teacher, a student alone and the same student taught, in a few steps."""
    stages = [
        {"name": "teacher", "method": "supervised", "student": "mlp", "train": TRAIN},
        {"name": "alone", "method": "supervised", "student": STUDENT, "train": TRAIN},
        {"name": "distilled", "method": "kd", "student": STUDENT, "teacher": "stage:teacher", "train": TRAIN},
    ]
    return {"seed": seed, "data": {"name": "digits", "limit": 100}, "stages": stages, **changes}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of three finished runs that differ in their seeds."""
    home = tmp_path_factory.mktemp("digits")
    return [run(check_recipe(recipe(seed)), home / f"seed-{seed}", quiet=True).folder for seed in range(3)]


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run that was interrupted within its second stage, before anything was measured there; written by hand."""
    return write_run(
        tmp_path / "stopped",
        recipe(),
        results={"teacher": {"items": 10, "accuracy": 0.9, "parameters": 100, "seconds": 1.0}},
        rows=[{"stage": "alone", "step": step, "student/loss": 1.0 / step} for step in (2, 4)],
        status={"status": "interrupted"},
    )


def write_run(
    folder: Path, tree: dict[str, Any], *, results: Any = None, rows: Any = (), status: Any = None, check: bool = True
) -> Path:
    """A run's folder as `Run` lays it out, with any content."""
    import json

    folder.mkdir(parents=True)
    resolved = check_recipe(tree).model_dump(mode="json") if check else tree
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if status is not None:
        (folder / "run.json").write_text(json.dumps(status))
    assert Run.open(folder).recipe()
    return folder
