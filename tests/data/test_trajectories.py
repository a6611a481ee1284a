"""Trajectories on disk: whole or absent, checked byte by byte, and made by several processes."""

import multiprocessing
import os

import pytest
import torch

from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.data.trajectories import TrajectoryBuffer

ABOUT = {"rho": 0.1, "seed": 3, "network": {"a": [2, 3], "b": [2]}}


def way(seed):
    draws = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 2, 3, generator=draws), "b": torch.randn(4, 2, generator=draws)}


def save(folder, number):
    TrajectoryBuffer(folder, ABOUT).save(number, way(number))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_saved_is_loaded(tmp_path):
    buffer = TrajectoryBuffer(tmp_path / "buffer", ABOUT)
    assert buffer.missing(2) == [0, 1]
    buffer.save(1, way(1))
    assert same(buffer.load(1), way(1))
    assert buffer.missing(3) == [0, 2]


def test_views_of_one_tensor_are_saved_apart(tmp_path):
    whole = torch.arange(12.0).view(2, 6)
    parts = {"a": whole[:, :4].unflatten(1, (2, 2)), "b": whole[:, 4:]}
    TrajectoryBuffer(tmp_path, ABOUT).save(0, parts)
    assert same(TrajectoryBuffer(tmp_path, ABOUT).load(0), parts)


@pytest.mark.parametrize("name", ["snapshots.safetensors", "about.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_found_named_and_made_good(tmp_path, name, damage):
    buffer = TrajectoryBuffer(tmp_path, ABOUT)
    for number in range(2):
        save(tmp_path, number)
    file = tmp_path / "expert-00001" / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content) if damage == "bit" else bytes(content[: len(content) // 2]))
    with pytest.raises(DamagedFileError, match=name):
        buffer.load(1)
    assert buffer.missing(2) == [1]
    save(tmp_path, 1)
    assert same(buffer.load(1), way(1))


def test_experts_made_from_something_else_are_refused(tmp_path):
    save(tmp_path, 0)
    other = TrajectoryBuffer(tmp_path, {**ABOUT, "rho": 0.2, "extra": 1})
    for ask in (lambda: other.load(0), lambda: other.missing(1)):
        with pytest.raises(IncompatibleError, match="another extra, rho"):
            ask()


def test_what_an_interrupted_save_left_is_cleared_away(tmp_path):
    save(tmp_path, 0)
    left = tmp_path / "expert-00001.tmp-99"
    left.mkdir()
    (left / "snapshots.safetensors").write_bytes(b"half")
    assert TrajectoryBuffer(tmp_path, ABOUT).missing(2) == [1]
    assert sorted(os.listdir(tmp_path)) == ["expert-00000"]


def test_several_processes_save_side_by_side(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=save, args=(tmp_path / "buffer", number)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    buffer = TrajectoryBuffer(tmp_path / "buffer", ABOUT)
    assert buffer.missing(3) == []
    assert all(same(buffer.load(number), way(number)) for number in range(3))
