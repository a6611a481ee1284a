import torch

from limbeck.metrics.memory import PeakMemory

KIB = 256  # float32 entries


def test_counts_what_is_alive():
    with PeakMemory() as memory:
        first = torch.ones(4 * KIB)
        second = first + 1
        del first
        third = second * 2
        del second, third
        torch.ones(KIB)
    assert memory.peak_bytes == 8 * 1024


def test_views_and_in_place_results_cost_nothing():
    given = torch.ones(8 * KIB)
    with PeakMemory() as memory:
        own = torch.ones(KIB)
        own.add_(1)
        given.mul_(2)
        held = [given.view(-1, 2), given[3:], own.t(), own.detach()]
    assert memory.peak_bytes == 1024
    del held


def test_sees_what_autograd_holds():
    values = torch.ones(KIB, requires_grad=True)
    with PeakMemory() as memory:
        loss = values.exp().exp().exp().sum()  # three results, each kept for the backward pass
        held = memory.peak_bytes
        loss.backward()
    assert held == 3 * 1024 + 4
    assert memory.peak_bytes > held


def test_forgets_nothing_between_uses():
    memory = PeakMemory()
    with memory:
        torch.ones(KIB)
    with memory:
        torch.ones(2 * KIB)
    assert memory.peak_bytes == 2 * 1024
