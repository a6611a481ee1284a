"""Selections: which few of many vectors stand for all of them. The baselines of data-set distillation.

All take features (items, dims), how many to choose (1 to items) and a generator, and return that many different row
numbers (chosen,) int64.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def random(features: Float[Tensor, "items dims"], count: int, draws: torch.Generator) -> Int64[Tensor, " chosen"]:
    """Any rows, each with the same probability, without repetition."""
    return torch.randperm(len(features), generator=draws)[:count].to(features.device)


def herding(
    features: Float[Tensor, "items dims"], count: int, draws: torch.Generator | None = None
) -> Int64[Tensor, " chosen"]:
    """Row after row, the one that brings the mean of all chosen closest to the mean of all (Welling, 2009).

    Nothing is drawn. The first row is the one next to the mean, as in iCaRL (Rebuffi et al., 2017).
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for step in range(1, count + 1):
        distance = ((total + features) / step - mean).square().sum(1)
        row = distance.masked_fill(~free, torch.inf).argmin()
        chosen.append(row)
        total = total + features[row]
        free[row] = False
    return torch.stack(chosen)


def k_centre(
    features: Float[Tensor, "items dims"], count: int, draws: torch.Generator | None = None
) -> Int64[Tensor, " chosen"]:
    """Row after row, the one that is farthest from all chosen (greedy k-centre; Sener and Savarese, 2018).

    Nothing is drawn: the first row is the one next to the mean of all.
    """
    features = features.double()
    chosen = [(features - features.mean(0)).square().sum(1).argmin()]
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
        nearest[torch.stack(chosen)] = -1.0  # never again, however many rows are equal
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


def k_means(
    features: Float[Tensor, "items dims"], count: int, draws: torch.Generator, rounds: int = 50
) -> Int64[Tensor, " chosen"]:
    """The rows next to the centres of `count` clusters, which Lloyd's iterations find from drawn rows.

    Args:
        features: see above.
        count: number of clusters.
        draws: chooses the first centres.
        rounds: most iterations; they end earlier once no row changes its cluster.
    """
    features = features.double()
    centres, cluster = features[random(features, count, draws)], None
    for _ in range(rounds):
        nearest = torch.cdist(features, centres).argmin(1)
        if cluster is not None and torch.equal(nearest, cluster):
            break
        cluster = nearest
        for number in range(count):
            own = features[cluster == number]
            if len(own):  # a centre that lost all its rows stays where it is
                centres[number] = own.mean(0)
    distance, chosen = torch.cdist(features, centres), []
    for number in range(count):
        chosen.append(distance[:, number].argmin())
        distance[chosen[-1]] = torch.inf
    return torch.stack(chosen)


Selection = Callable[[Tensor, int, torch.Generator], Tensor]
SELECTIONS: dict[str, Selection] = {"real": random, "herding": herding, "k-centre": k_centre, "kmeans": k_means}
"""The selections by the names that `SyntheticSet` gives them."""
