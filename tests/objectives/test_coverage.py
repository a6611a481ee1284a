import pytest
import torch

from limbeck.objectives.coverage import cluster_margin, k_centre


def test_each_next_item_is_the_farthest():
    features = torch.tensor([[0.0], [1.0], [5.0], [9.0], [9.5]])
    # from 0: 9.5 is farthest; then 5 (4.5 away); then 1
    assert k_centre(features, torch.zeros(1, 1), 3).tolist() == [4, 2, 1]


def test_against_a_loop():
    draws = torch.Generator().manual_seed(0)
    features, centres = torch.randn(30, 3, generator=draws), torch.randn(4, 3, generator=draws)
    held = list(centres)
    for picked in k_centre(features, centres, 8).tolist():
        distances = [min(float((row - one).norm()) for one in held) for row in features]
        assert distances[picked] == pytest.approx(max(distances), rel=1e-5)
        held.append(features[picked])


def test_equal_items_are_chosen_once_each():
    assert sorted(k_centre(torch.zeros(4, 2), torch.zeros(1, 2), 9).tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least one centre"):
        k_centre(torch.zeros(4, 2), torch.zeros(0, 2), 1)


def test_clusters_take_turns_and_small_ones_come_first():
    gains = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1, 0.0])
    clusters = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    draws = torch.Generator().manual_seed(0)
    picked = cluster_margin(gains, clusters, 5, candidates=6, generator=draws)
    assert clusters[picked].tolist() == [2, 1, 0, 1, 0]  # cluster 3 is not among the six candidates
    assert len(set(picked.tolist())) == 5


def test_the_draw_decides_within_a_cluster_and_the_budget_is_kept():
    gains, clusters = torch.linspace(0, 1, 12), torch.zeros(12, dtype=torch.int64)
    firsts = {
        int(cluster_margin(gains, clusters, 1, candidates=4, generator=torch.Generator().manual_seed(seed))[0])
        for seed in range(20)
    }
    assert firsts == {8, 9, 10, 11}
    assert sorted(cluster_margin(gains, clusters, 20, candidates=1).tolist()) == list(range(12))
