"""Trackers receive the rows; one that is not installed is refused before anything is written."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.core.errors import MissingExtraError
from limbeck.core.trackers import check_trackers, numbers
from tests.cli.conftest import TINY, contents


def test_rows_become_flat_numbers() -> None:
    row = {"step": 3, "student/loss": 0.5, "seconds": {"forward": 2}, "note": "text"}
    assert numbers("distil", row) == {"distil/student/loss": 0.5, "distil/seconds/forward": 2.0}


def test_a_missing_package_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("limbeck.core.trackers.find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(MissingExtraError, match="wandb"):
        limbeck.run({**TINY, "track": ["wandb"]}, tmp_path / "run", quiet=True)
    assert not contents(tmp_path)
    check_trackers([])


def test_tensorboard_gets_every_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = limbeck.run({**TINY, "track": ["tensorboard"]}, tmp_path / "run", quiet=True)
    events = EventAccumulator(str(run.folder / "tracking" / "run"))
    events.Reload()
    for stage in ("teacher", "distil"):
        rows = run.metrics(stage)
        seen = events.Scalars(f"{stage}/student/loss")
        assert [(event.step, event.value) for event in seen] == [
            (row["step"], pytest.approx(row["student/loss"])) for row in rows
        ]
