"""Writers that are killed, that crash at any call to the disk, and that work at once."""

import os
import random
import signal
import time

import pytest
import torch

from limbeck.core.interrupt import Interrupted
from limbeck.core.teacher import LiveTeacher
from limbeck.data.cache.reader import CacheReader
from tests.data.cache.rig import ITEMS, Slow, contents, fill, source, teacher
from tests.faults.crashes import CRASHED, HOW, Crash
from tests.faults.training import fork, wait

KILLS = 8


@pytest.fixture
def undisturbed(tmp_path):
    fill(tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def slow(seconds: float, log=None) -> LiveTeacher:
    """The usual teacher, and slower; its hash is that of its inner network."""
    live = teacher()
    fast = live.model
    live.model = Slow(fast, seconds, log)
    live.__dict__["fingerprint"] = teacher().fingerprint
    return live


def test_writers_killed_at_random_instants_leave_what_one_finishes(tmp_path, undisturbed):
    folder, draws = tmp_path / "cache", random.Random(os.urandom(8))
    kills = 0
    while kills < KILLS:
        child = fork(lambda: fill(folder, live=slow(0.01)))
        time.sleep(draws.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            kills += 1
        else:  # it was done before: begin anew
            assert contents(folder) == undisturbed
            for path in folder.iterdir():
                path.unlink()
    fill(folder)
    assert contents(folder) == undisturbed
    rows = torch.arange(ITEMS)
    assert torch.equal(CacheReader(folder).read(rows).tensors["logits"], teacher().signal(source().fetch(rows)).logits)


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("how", HOW)
def test_a_writer_can_stop_at_any_call_to_the_disk(folder, how, part):
    def crashing(place, point):
        Crash(point, how).install()
        fill(place, shard_bytes=4000)

    counting = Crash()
    with pytest.MonkeyPatch.context() as patch:
        counting.install(patch.setattr)
        fill(folder / "counted", shard_bytes=4000)
    undisturbed = contents(folder / "counted")
    points = [point for point, kind in counting.points() if kind == how]
    assert len(points) >= (6 if how == "torn" else 24)
    for point in points[part::2]:
        place = folder / f"{point}"
        child = fork(lambda place=place, point=point: crashing(place, point))
        assert wait(child) == CRASHED
        fill(place, shard_bytes=4000)
        assert contents(place) == undisturbed, point


def test_two_writers_share_the_work(tmp_path, undisturbed):
    folder, log = tmp_path / "cache", tmp_path / "log"
    children = [fork(lambda: fill(folder, live=slow(0.02, log))) for _ in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    assert contents(folder) == undisturbed
    asked = log.read_text().split()
    assert len(set(asked)) == 2  # both worked
    assert len(asked) <= -(-ITEMS // 8) + 1  # and nothing twice; one batch more to see how large the shards are


def test_a_writer_takes_over_from_one_that_is_killed(tmp_path, undisturbed):
    folder = tmp_path / "cache"
    child = fork(lambda: fill(folder, live=slow(0.05)))
    while not list(folder.glob("shard-*.lock")):
        time.sleep(0.005)
    other = fork(lambda: fill(folder, live=slow(0.02)))
    time.sleep(0.03)
    os.kill(child, signal.SIGKILL)
    wait(child)
    assert wait(other) == 0
    assert contents(folder) == undisturbed


def test_an_interrupted_writer_keeps_what_is_finished(tmp_path, undisturbed):
    calls = iter(range(100))

    def pause():
        if next(calls) == 4:
            raise Interrupted("stopped")

    folder = tmp_path / "cache"
    with pytest.raises(Interrupted):
        fill(folder, pause=pause)
    there = len(list(folder.glob("shard-*.json")))
    assert 0 < there < 4
    fill(folder)
    assert contents(folder) == undisturbed
