"""Flipped bits, truncated and missing files: each is noticed and named, and the checkpoint before it takes over."""

import errno
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.durable import verify_folder
from limbeck.core.errors import DamagedFileError
from limbeck.core.run import Run
from tests.faults.training import fork, run, wait

FILES = ("method", "optimizer-student", "average", "meter")
NAMES = (*(f"{name}.safetensors" for name in FILES), "state.json", "manifest.json")


def content(step: int) -> Checkpoint:
    draws = torch.Generator().manual_seed(step)
    tensors = {name: {"a": torch.randn(40, generator=draws), "b": torch.randn(3, generator=draws)} for name in FILES}
    return Checkpoint(step, tensors, {"offset": 0, "note": "é", "seconds": {"forward": 0.5}})


@pytest.fixture
def saved(folder: Path) -> Checkpoints:
    """Two whole checkpoints, of steps 8 and 9: one bit turns the name of one into the other's."""
    checkpoints = Checkpoints(folder / "stage")
    for step in (8, 9):
        checkpoints.save(content(step))
    return checkpoints


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.state) == (expected.step, expected.state)
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert all(torch.equal(tensors[name], found.tensors[group][name]) for name in tensors)


def load_and_hear(checkpoints: Checkpoints) -> tuple[Checkpoint | None, str]:
    """What is loaded, and the warnings in one text."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = checkpoints.load()
    return found, "\n".join(str(warning.message) for warning in heard)


def flip(path: Path, bit: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_the_latest_checkpoint_is_named_and_the_one_before_is_used(name, saved, tally):
    path = saved.folder / "step-000000009" / name
    whole, draws = path.read_bytes(), random.Random(name)
    for bit in draws.sample(range(8 * len(whole)), min(60, 8 * len(whole))):
        flip(path, bit)
        with tally("flips caught"):
            found, heard = load_and_hear(saved)
            assert str(path) in heard
            assert_same(found, content(8))
        path.write_bytes(whole)
    assert load_and_hear(saved)[1] == ""


def test_a_flipped_bit_in_the_pointer_is_named_and_the_newest_checkpoint_is_used(saved, tally):
    path = saved.folder / "latest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flip(path, bit)
        with tally("flips caught"):
            found, heard = load_and_hear(saved)
            assert str(path) in heard
            assert_same(found, content(9))
        path.write_bytes(whole)


def test_a_flipped_bit_in_the_student_is_named(undisturbed, folder, tally):
    student = folder / "student"
    shutil.copytree(undisturbed.folder / "student", student)
    draws = random.Random(0)
    for path in sorted(student.iterdir()):
        whole = path.read_bytes()
        for bit in draws.sample(range(8 * len(whole)), 40):
            flip(path, bit)
            with tally("flips caught"):
                with pytest.raises(DamagedFileError) as caught:
                    verify_folder(student)
                assert caught.value.path == str(path)
            path.write_bytes(whole)
    verify_folder(student)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [None, 0.0, 0.1, 0.5, 0.9, -1])
def test_a_truncated_or_missing_file_is_named_and_the_checkpoint_before_is_used(name, kept, saved, tally):
    path = saved.folder / "step-000000009" / name
    shorten(path, kept)
    with tally("truncated or missing files caught"):
        found, heard = load_and_hear(saved)
        assert str(path) in heard
        assert_same(found, content(8))


@pytest.mark.parametrize("kept", [None, 0.0, 0.5, -2])
def test_a_truncated_or_missing_pointer_is_named_and_the_newest_checkpoint_is_used(kept, saved, tally):
    path = saved.folder / "latest.json"
    shorten(path, kept)
    with tally("truncated or missing files caught"):
        found, heard = load_and_hear(saved)
        assert str(path) in heard
        assert_same(found, content(9))


def shorten(path: Path, kept: float | None) -> None:
    """Deletes a file, keeps a share of it, or takes some bytes away."""
    if kept is None:
        path.unlink()
    else:
        size = path.stat().st_size
        os.truncate(path, size + int(kept) if kept < 0 else int(kept * size))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_the_disk_cannot_read_is_damage_too(name, saved, tally, monkeypatch):
    path, read = saved.folder / "step-000000009" / name, Path.open

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())
    with tally("truncated or missing files caught"):
        found, heard = load_and_hear(saved)
        assert str(path) in heard
        assert_same(found, content(8))


def test_a_file_that_the_manifest_does_not_list_is_not_read(saved):
    shutil.copy(saved.folder / "step-000000008/method.safetensors", saved.folder / "step-000000009/more.safetensors")
    found, heard = load_and_hear(saved)
    assert_same(found, content(9))
    assert heard == ""


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda step: flip(step / "method.safetensors", 1000),
    "missing file": lambda step: (step / "state.json").unlink(),
    "emptied": lambda step: [file.unlink() for file in step.iterdir()],
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(damage, saved):
    for step in saved.folder.glob("step-*"):
        DAMAGES[damage](step)
    with pytest.raises(DamagedFileError):
        load_and_hear(saved)


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_fallback_the_damaged_later_checkpoint_gives_way(keep, saved):
    """Else it would count among those that are kept, and the only whole one would be deleted."""
    saved.keep = keep
    flip(saved.folder / "step-000000009" / "method.safetensors", 1000)
    saved.folder.joinpath("step-000000009").rename(saved.folder / "step-000000012")
    saved.save(content(10))
    found, heard = load_and_hear(saved)
    assert_same(found, content(10))
    assert heard == ""
    assert saved.steps() == [8, 10][-keep:]


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(undisturbed, folder, tally):
    """The run is set back to the middle of its second stage, with its latest checkpoint damaged."""
    place = folder / "run"
    shutil.copytree(undisturbed.folder, place)
    (place / "results.json").write_text(json.dumps({"teach": Run(place).results()["teach"]}))
    with tally("runs mended"):
        flip(place / "checkpoints/distil/step-000000012/optimizer-student.safetensors", 4000)
        assert wait(fork(lambda: run(undisturbed.recipe, place))) == 0
        assert not undisturbed.changes(place)


def test_a_damaged_result_of_a_stage_is_made_again_from_its_checkpoint(undisturbed, folder, tally):
    place = folder / "run"
    shutil.copytree(undisturbed.folder, place)
    with tally("runs mended"):
        flip(place / "stages/teach/model.safetensors", 4000)
        assert wait(fork(lambda: run(undisturbed.recipe, place))) == 0
        assert not undisturbed.changes(place)


def test_a_run_without_a_whole_checkpoint_stops(undisturbed, folder):
    place = folder / "run"
    shutil.copytree(undisturbed.folder, place)
    (place / "results.json").unlink()
    for state in place.glob("checkpoints/teach/*/state.json"):
        flip(state, 3)
    rows = (place / "metrics.jsonl").read_bytes()
    assert wait(fork(lambda: run(undisturbed.recipe, place))) == DamagedFileError.exit_code
    assert (place / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("torn", [b'{"stage": "distil", "st', b"\xff\xfe\x00", b"[" * 100_000, b"{}", b"\n\n7\n"])
def test_a_torn_last_line_of_the_metrics_is_passed_over_and_mended(torn, undisturbed, folder, tally):
    place = folder / "run"
    shutil.copytree(undisturbed.folder, place)
    rows = (place / "metrics.jsonl").read_bytes()
    with tally("torn rows mended"):
        (place / "metrics.jsonl").write_bytes(rows + torn)
        assert len(Run(place).metrics()) == len(rows.splitlines())
        with Run.open(place).writing():
            assert (place / "metrics.jsonl").read_bytes() == rows


def test_the_student_is_checked_when_it_is_loaded(undisturbed, folder):
    import limbeck

    shutil.copytree(undisturbed.folder, folder / "run")
    flip(folder / "run/student/model.safetensors", 4000)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        limbeck.load(folder / "run")
