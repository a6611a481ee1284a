"""Texts that are kept: a queue of what the student wrote lately, and what a teacher wrote for each item."""

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.language.generation import Prompts, joined
from limbeck.objectives.tokens import IGNORED_LABEL


class ReplayBuffer(nn.Module):
    """The latest texts, the oldest making room for the newest; all of it in tensors, so that checkpoints hold it.

    Each rank keeps the texts of its own; a checkpoint holds those of the first.

    Args:
        capacity: most texts.
        length: most tokens of a text, prompt included; longer ones are cut.
    """

    tokens: Tensor
    spans: Tensor
    pushed: Tensor

    def __init__(self, capacity: int, length: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(capacity, length, dtype=torch.int32))
        self.register_buffer("spans", torch.zeros(capacity, 2, dtype=torch.int32))  # ends of prompt and response
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.pushed), len(self.tokens))

    @property
    def full(self) -> bool:
        """Whether the next text will replace one."""
        return len(self) == len(self.tokens)

    def push(self, texts: Batch) -> None:
        """Adds texts as `generate` returns them, the first one first."""
        width = min(texts["input_ids"].shape[1], self.tokens.shape[1])
        kept = slice(max(0, texts.size - len(self.tokens)), None)  # of more than fit, the last
        ends = torch.stack([texts["prompt_length"], texts["prompt_length"] + texts["response_length"]], 1)
        places = (self.pushed + torch.arange(texts.size, device=self.tokens.device))[kept] % len(self.tokens)
        rows = torch.zeros(len(places), self.tokens.shape[1], dtype=torch.int32, device=self.tokens.device)
        rows[:, :width] = texts["input_ids"][kept, :width]
        self.tokens[places] = rows
        self.spans[places] = ends[kept].clamp_max(self.tokens.shape[1]).to(torch.int32)
        self.pushed += texts.size

    def draw(self, items: int) -> Batch:
        """Different texts at random, as many as asked for or as there are; at least one must be."""
        places = torch.randperm(len(self))[:items].to(self.tokens.device)
        prompts, ends = self.spans[places].long().unbind(1)
        return text_batch(self.tokens[places, : int(ends.max())].long(), prompts, ends)


class RememberedResponses(nn.Module):
    """One response for each item of the data, written when the item first comes by.

    The responses are tensors, so that checkpoints hold them and a resumed run sees the same ones.

    Args:
        items: items of the data.
        length: most tokens of a response.
    """

    tokens: Tensor
    lengths: Tensor

    def __init__(self, items: int, length: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(items, length, dtype=torch.int32))
        self.register_buffer("lengths", torch.zeros(items, dtype=torch.int32))  # 0: not written yet

    def missing(self, index: Tensor) -> Tensor:
        """Rows of `index` (items,) whose response is not written yet."""
        return (self.lengths[index] == 0).nonzero().squeeze(1)

    def store(self, index: Tensor, texts: Batch) -> None:
        """Keeps the responses of texts as `generate` returns them, for the items at `index`."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        source = (texts["prompt_length"].unsqueeze(1) + places).clamp_max(texts["input_ids"].shape[1] - 1)
        self.tokens[index] = texts["input_ids"].gather(1, source).to(torch.int32)
        self.lengths[index] = texts["response_length"].clamp_max(len(places)).to(torch.int32)

    def recall(self, index: Tensor, prompts: Prompts) -> Batch:
        """Prompts with the responses kept for the items at `index`; see `generate` for the fields."""
        return joined(prompts, self.tokens[index].long(), self.lengths[index].long())


def text_batch(ids: Tensor, prompts: Tensor, ends: Tensor) -> Batch:
    """A batch as `generate` returns it.

    Args:
        ids: (items, length) prompt and response without a gap; whatever stands behind has no meaning.
        prompts: (items,) tokens of each prompt.
        ends: (items,) tokens of prompt and response.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    present = places < ends.unsqueeze(1)
    ids = ids.masked_fill(~present, 0)
    return Batch(
        {
            "input_ids": ids,
            "attention_mask": present.long(),
            "labels": ids.masked_fill(~present | (places < prompts.unsqueeze(1)), IGNORED_LABEL),
            "prompt_length": prompts,
            "response_length": ends - prompts,
        }
    )
