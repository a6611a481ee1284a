"""Choosing items that cover a pool: k-centre by features, and margins spread over clusters."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def k_centre(
    features: Float[Tensor, "items dim"], centres: Float[Tensor, "centres dim"], budget: int
) -> Int[Tensor, "chosen"]:
    """Chooses items one by one, each the one farthest (Euclidean) from all centres and all items chosen before.

    Args:
        features: (items, dim) of the pool.
        centres: (centres, dim), what is covered already, at least one.
        budget: how many to choose; all where there are fewer.

    Returns:
        (min(budget, items),) int64, in the order in which they were chosen.

    Raises:
        ValueError: there is no centre.

    Source: Sener, Savarese, *Active Learning for Convolutional Neural Networks: A Core-Set Approach*, ICLR 2018,
    arXiv 1708.00489 (the greedy form).
    """
    if not len(centres):
        raise ValueError("k_centre needs at least one centre to start from")
    features, centres = features.detach().float(), centres.detach().float()
    distance = torch.cat([torch.cdist(part, centres).amin(1) for part in features.split(1024)])
    chosen = []
    for _ in range(min(budget, len(features))):
        farthest = distance.argmax()
        chosen.append(farthest)
        distance = torch.minimum(distance, (features - features[farthest]).norm(dim=1))
        distance[farthest] = -1  # equal items have distance 0 too
    return torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=features.device)


def cluster_margin(
    gains: Float[Tensor, "items"],
    clusters: Int[Tensor, "items"],
    budget: int,
    *,
    candidates: int,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "chosen"]:
    """Chooses among the items of the highest gains in turn from each of their clusters, small clusters first.

    Args:
        gains: (items,), such as the margin's.
        clusters: (items,), number of each item's cluster, from 0.
        budget: how many to choose; all where there are fewer.
        candidates: how many of the highest gains take part; never fewer than the budget.
        generator: decides between the items of a cluster.

    Returns:
        (min(budget, items),) int64.

    Source: Citovsky et al., *Batch Active Learning at Scale*, NeurIPS 2021, arXiv 2107.14263.
    """
    taken = min(max(candidates, budget), len(gains))
    best = gains.detach().cpu().topk(taken).indices
    best = best[torch.randperm(taken, generator=generator)]
    group = clusters.cpu()[best].long()
    sizes = torch.bincount(group)
    turn = torch.zeros_like(group)  # an item's place within its cluster is the round in which its turn comes
    for cluster in sizes.nonzero().flatten().tolist():
        members = (group == cluster).nonzero().flatten()
        turn[members] = torch.arange(len(members))
    # Rounds in order, within a round clusters by size, and clusters of one size by number.
    keys = list(zip(turn.tolist(), sizes[group].tolist(), group.tolist(), strict=True))
    order = sorted(range(taken), key=keys.__getitem__)
    return best[torch.tensor(order[:budget], dtype=torch.int64)]
