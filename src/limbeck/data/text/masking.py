"""Hiding tokens for masked language models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.noise import uniforms


@dataclass(frozen=True)
class Masking:
    """BERT's way of hiding tokens (Devlin et al., arXiv 1810.04805): of the chosen ones 80 % become the mask token,
    10 % a random one, and 10 % stay.

    Attributes:
        rate: share of the targets that are chosen, in (0, 1).
        mask_token: id of the mask token.
        vocab: number of token ids; random tokens are drawn from all of them.
        special: (tokens,) ids that are never chosen.
    """

    rate: float
    mask_token: int
    vocab: int
    special: Tensor

    def __call__(self, ids: Tensor, targets: Tensor, seed: int, items: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden ids, and where the chosen tokens are; a function of the seed and each item's number.

        Args:
            ids: (items, length) int64.
            targets: (items, length) bool, what may be chosen.
            seed: 63 bits.
            items: (items,) their numbers.
        """
        draws = uniforms(seed, items, 2 * ids.shape[1])
        first, second = draws.view(len(ids), 2, -1).unbind(1)
        chosen = (first < self.rate) & targets & ~torch.isin(ids, self.special)
        hidden = torch.where(chosen & (second < 0.8), self.mask_token, ids)
        other = ((second - 0.8) * (10 * self.vocab)).long()  # second in [0.8, 0.9) becomes 0 to vocab - 1
        return torch.where(chosen & (second >= 0.8) & (other < self.vocab), other, hidden), chosen
