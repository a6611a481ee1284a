"""Selections against exhaustive search and plain loops."""

import itertools

import pytest
import torch

from limbeck.synthesis.selection import SELECTIONS, herding, k_centre, k_means


def draws():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", SELECTIONS)
def test_rows_are_different_even_of_equal_features(name):
    features = torch.cat([torch.zeros(5, 3), torch.ones(3, 3)])
    for count in (1, 4, 8):
        chosen = SELECTIONS[name](features, count, draws())
        assert len(chosen.unique()) == count
        assert chosen.dtype == torch.int64


def test_herding_is_the_greedy_loop():
    torch.manual_seed(0)
    features = torch.randn(20, 4)
    chosen: list[int] = []
    for _ in range(6):
        free = [row for row in range(20) if row not in chosen]
        gaps = [float((features[[*chosen, row]].mean(0) - features.mean(0)).norm()) for row in free]
        chosen.append(free[gaps.index(min(gaps))])
    assert herding(features, 6).tolist() == chosen


def test_herded_means_are_closer_than_drawn_ones():
    torch.manual_seed(0)
    features = torch.randn(200, 8)
    herded = (features[herding(features, 10)].mean(0) - features.mean(0)).norm()
    drawn = [(features[torch.randperm(200)[:10]].mean(0) - features.mean(0)).norm() for _ in range(20)]
    assert herded < 0.5 * min(drawn)


def test_k_centre_covers_within_twice_the_best_radius():
    torch.manual_seed(0)
    features = torch.randn(12, 2)
    between = torch.cdist(features, features)

    def radius(rows):
        return float(between[:, list(rows)].min(1).values.max())

    best = min(radius(rows) for rows in itertools.combinations(range(12), 3))
    assert best <= radius(k_centre(features, 3).tolist()) <= 2 * best


def test_k_means_finds_clusters_that_are_apart():
    torch.manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    features = (centres[:, None] + torch.randn(3, 20, 2)).flatten(0, 1)
    chosen = k_means(features, 3, torch.Generator().manual_seed(3))
    assert sorted((chosen // 20).tolist()) == [0, 1, 2]
    for row in chosen.tolist():  # the row next to its cluster's mean
        own = features[row // 20 * 20 : row // 20 * 20 + 20]
        assert int((own - own.mean(0)).norm(dim=1).argmin()) == row % 20
