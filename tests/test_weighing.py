"""What an export costs is counted on its files and timed on what runs."""

from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.core.run import Run
from limbeck.weighing import weigh_export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A teacher and a student of it."""
    train = {"steps": 2, "batch_size": 8}
    stages: list[dict[str, Any]] = [
        {"name": "teacher", "method": "supervised", "student": _convnet(8), "train": train},
        {"name": "small", "method": "kd", "teacher": "stage:teacher", "student": _convnet(4), "train": train},
    ]
    out = tmp_path_factory.mktemp("weighed") / "run"
    return limbeck.run({"data": {"name": "digits"}, "stages": stages}, out=out, quiet=True)


def _convnet(width: int) -> dict[str, Any]:
    return {"name": "convnet", "arguments": {"width": width, "depth": 2}}


def test_the_student_is_its_files_and_the_teacher_what_it_would_be_stored_with(run: Run, tmp_path: Path) -> None:
    teacher, student = weigh_export(run, limbeck.export(run, "limbeck", tmp_path / "out"))
    assert (teacher.name, student.name) == ("teacher", "student")
    assert student.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    stored = (run.folder / "stages" / "teacher" / "model.safetensors").stat().st_size
    assert 0 < stored - teacher.bytes < 4096  # but for the file's header
    assert teacher.parameters > student.parameters
    assert all(one.latency is not None and one.latency > 0 for one in (teacher, student))


def test_an_exported_model_has_no_teacher_and_no_item_to_try(run: Run, tmp_path: Path) -> None:
    files = limbeck.export(run, "limbeck", tmp_path / "out")
    (weight,) = weigh_export(tmp_path / "out", files)
    assert weight.bytes == sum(file.stat().st_size for file in files)
    assert weight.latency is None


def test_an_onnx_file_is_timed_in_its_own_runtime(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    files = limbeck.export(run, "onnx", tmp_path / "out")
    monkeypatch.setattr("limbeck.weighing._onnx_latency", lambda file, item: float(file.suffix == ".onnx") + item.size)
    assert weigh_export(run, files)[-1].latency == 2
    monkeypatch.undo()
    assert 0 < (weigh_export(run, files)[-1].latency or 0) < 1
