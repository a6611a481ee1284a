"""How the next token is drawn: logits warped by temperature, top-k and top-p into the distribution that is sampled."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from a model's predictions.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: only so many of the most probable tokens may be drawn; None for all.
        top_p: only the most probable tokens that together reach this probability may be drawn (nucleus), in (0, 1];
            None for all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"a temperature is at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p lies in (0, 1], not {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distributions (*, vocab) that tokens are drawn from, float32; of greedy sampling all on one token."""
        logits = logits.float()
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probs = logits.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return probs
        ordered, order = probs.sort(dim=-1, descending=True)
        # A token stays while those before it do not reach top_p; the first one always stays.
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < self.top_p)
        probs = probs * kept
        return probs / probs.sum(-1, keepdim=True)
