"""What contrastive distillation starts from: memory banks and the samples that each anchor is compared with."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def new_bank(samples: int, dim: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "{samples} {dim}"]:
    r"""A memory bank of random rows, uniform in :math:`\pm\sqrt{3 / dim}`, hence of about unit length.

    Args:
        samples: how many training samples there are.
        dim: the dimension of the embeddings.
        generator: source of the randomness; torch's own without one.

    Returns:
        (samples, dim), float32, on the generator's device.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    bound = math.sqrt(3 / dim)
    device = generator.device if generator is not None else None
    return (2 * torch.rand(samples, dim, generator=generator, device=device) - 1) * bound


def uniform_negatives(
    sample_indices: Int[Tensor, "batch"],
    negatives: int,
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch 1+{negatives}"]:
    """Indices of each sample and of negatives drawn uniformly, with replacement, from all samples.

    Args:
        sample_indices: (batch), the positives.
        negatives: how many for each.
        samples: how many training samples there are.
        generator: source of the randomness.

    Returns:
        (batch, 1 + negatives), the positive first; a negative may by chance be the positive.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    size, device = (len(sample_indices), negatives), sample_indices.device
    drawn = torch.randint(samples, size, generator=generator, device=device)
    return torch.cat([sample_indices[:, None].long(), drawn], dim=1)


def other_class_negatives(
    sample_indices: Int[Tensor, "batch"],
    negatives: int,
    all_labels: Int[Tensor, "samples"],
    *,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch 1+{negatives}"]:
    """Indices of each sample and of negatives drawn uniformly, with replacement, from the samples of other classes.

    Args:
        sample_indices: (batch), the positives.
        negatives: how many for each.
        all_labels: (samples), the class of every training sample; with a single class its samples are the negatives.
        generator: source of the randomness.

    Returns:
        (batch, 1 + negatives), the positive first.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    by_class = all_labels.argsort(stable=True)
    sizes = torch.bincount(all_labels.long())
    own_class = all_labels[sample_indices.long()].long()
    own_size, own_start = sizes[own_class][:, None], (sizes.cumsum(0) - sizes)[own_class][:, None]
    # A class is one run of the sorted order: draw among the places outside it and jump over the run.
    uniform = torch.rand(
        len(sample_indices), negatives, generator=generator, device=sample_indices.device, dtype=torch.float64
    )
    place = (uniform * (len(all_labels) - own_size)).long()
    place = place + own_size * (place >= own_start)
    drawn = by_class[place.clamp_max(len(all_labels) - 1)]  # with a single class there are no others: any will do
    return torch.cat([sample_indices[:, None].long(), drawn], dim=1)
