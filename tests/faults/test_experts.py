"""Experts made in processes of their own, and experts whose making is killed at any instant."""

import os
import random
import signal
import time

import pytest
import torch

from tests.faults.conftest import Tally
from tests.faults.training import fork, wait
from tests.methods.datasets.test_experts import empty, made


@pytest.mark.slow  # a fresh process imports torch once more, which takes most of the time
def test_a_process_that_starts_afresh_makes_the_same_expert(tmp_path):
    here = made(tmp_path / "here", empty(experts=1))
    assert torch.equal(made(tmp_path / "apart", empty(experts=1), processes=2).snapshots, here.snapshots)


def test_killed_again_and_again_they_are_the_same_in_the_end(folder, tally: Tally):
    begun = time.perf_counter()
    straight = made(folder / "straight", empty(experts=6)).snapshots
    seconds, draws = time.perf_counter() - begun, random.Random(0)
    for _ in range(8):
        child = fork(lambda: made(folder / "torn", empty(experts=6)))
        time.sleep(draws.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        wait(child)
    with tally("kills of experts survived"):
        assert torch.equal(made(folder / "torn", empty(experts=6)).snapshots, straight)
