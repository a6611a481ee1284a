"""kill -9 at random instants, again and again, and the run still ends with the same bits."""

import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest

from limbeck.core.run import Run
from tests.faults.conftest import Tally
from tests.faults.training import Undisturbed, fork, run, wait

KILLS = int(os.environ.get("LIMBECK_KILLS", "200"))


def _killed_until_done(undisturbed: Undisturbed, folder: Path, draws: random.Random, tally: Tally, most: int) -> int:
    """Starts the run and kills it at random instants, at most `most` times, until it is done; returns the kills."""
    for kills in range(most + 1):
        child = fork(lambda: run(undisturbed.recipe, folder))
        if kills < most:
            time.sleep(draws.uniform(0, undisturbed.seconds))
            os.kill(child, signal.SIGKILL)
        if (code := wait(child)) != -signal.SIGKILL:
            assert code == 0
            break
        with tally("checkpoints whole after a kill"):
            _latest_are_whole(folder)
    for _ in range(kills):
        with tally("kills survived"):
            assert not undisturbed.changes(folder)
    return kills


def _latest_are_whole(folder: Path) -> None:
    """Every stage has a whole latest checkpoint or none at all; nothing is damaged that would need a fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stage in ("teach", "distil"):
            Run(folder).checkpoints(stage, 2).load()


def _kill(count: int, undisturbed: Undisturbed, folder: Path, tally: Tally) -> None:
    draws = random.Random(os.urandom(8))
    done = attempt = 0
    while done < count:
        attempt += 1
        done += _killed_until_done(undisturbed, folder / str(attempt), draws, tally, most=min(6, count - done))


@pytest.mark.parametrize("part", range(4))
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(part, undisturbed, folder, tally):
    _kill(5, undisturbed, folder, tally)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_survives_hundreds_of_kills(undisturbed, folder, tally):
    _kill(KILLS, undisturbed, folder, tally)
