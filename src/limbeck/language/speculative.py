"""Speculative decoding (Leviathan et al., arXiv 2211.17192): a small draft proposes, the target checks several tokens
in one call, and what comes out is the target's own."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.language.cached import CachedReader
from limbeck.language.generation import end_tokens
from limbeck.language.sampling import Sampling
from limbeck.models.modes import device_of, evaluating
from limbeck.objectives.speculative import SpeculativeStep, greedy_step, speculative_step

Verify = Callable[[Tensor, Tensor, Tensor], SpeculativeStep]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one decoding yielded.

    Attributes:
        tokens: (tokens,) the new tokens, the end token included.
        accepted: how many drafted tokens were accepted at each call of the target; empty without a draft.
        proposed: how many were proposed at each call.
        target_calls: calls of the target, that of the prompt included.
        seconds: wall time, that of reading the prompt included.
    """

    tokens: Tensor
    accepted: tuple[int, ...]
    proposed: tuple[int, ...]
    target_calls: int
    seconds: float

    @property
    def block_efficiency(self) -> float:
        """Tokens a call of the target, from 1 to the number of drafted tokens + 1."""
        return len(self.tokens) / self.target_calls

    @property
    def tokens_per_second(self) -> float:
        """New tokens over wall time."""
        return len(self.tokens) / self.seconds


@torch.no_grad()
def speculative_decode(
    target: nn.Module,
    draft: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    drafted: int = 4,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    eos: int | Collection[int] | None = None,
    epsilon: float = 1.0,
    lenience: Literal["linear", "square", "exponential"] = "linear",
) -> Decoded:
    """Continues one prompt with the target's own distribution, at fewer calls of the target.

    Both models keep key-value caches; rejected tokens are rolled back. Temperature, top-k and top-p are applied to
    both models, so that a drafted token is weighed by the very distribution it was drawn from. Greedy sampling gives
    the target's greedy text, token for token. Draws come from torch's random stream.

    Args:
        target: a causal language model of transformers.
        draft: another one over the same vocabulary, which either may pad.
        prompt: (tokens,) ids, at least one.
        max_new_tokens: most tokens to write, at least 1.
        drafted: tokens that the draft proposes at a time, at least 1.
        sampling: how tokens are drawn.
        eos: ids that end the text; the target's own if absent, none for an empty collection.
        epsilon: below 1 more is accepted than exactness allows; see `objectives.speculative.lenient`.
        lenience: how `epsilon` is applied.

    Raises:
        IncompatibleError: no prompt, or a model whose state cannot be rolled back.
    """

    def verify(tokens: Tensor, draft_probs: Tensor, logits: Tensor) -> SpeculativeStep:
        if sampling.greedy:
            return greedy_step(tokens, logits)
        wanted = sampling.probabilities(logits)
        proposal, wanted = _same_vocabulary(draft_probs, wanted)
        return speculative_step(tokens, proposal, wanted, epsilon=epsilon, lenience=lenience)

    if drafted < 1:
        raise ValueError(f"a draft proposes at least one token, not {drafted}")
    with evaluating(target, draft):
        loop = _Loop(target, draft, prompt, sampling, max_new_tokens)
        return loop.run(drafted, verify, set(end_tokens(target, eos)))


@torch.no_grad()
def plain_decode(
    target: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    eos: int | Collection[int] | None = None,
) -> Decoded:
    """The same without a draft, one token a call: what speculative decoding is compared with; arguments as there."""
    ends, written = set(end_tokens(target, eos)), list[int]()
    with evaluating(target):
        begun, reader, ids = time.perf_counter(), CachedReader(target), _checked(prompt, target)
        while len(written) < max_new_tokens and not (written and written[-1] in ends):
            ids = _draw(reader.read(ids)[:, -1], sampling)[0]
            written.append(int(ids))
        seconds = time.perf_counter() - begun
    return Decoded(torch.tensor(written), (), (), len(written), seconds)


class _Loop:
    """The state of one speculative decoding: what is written, and what each model has read of it."""

    def __init__(self, target: nn.Module, draft: nn.Module, prompt: Tensor, sampling: Sampling, most: int) -> None:
        self.sampling, self.most = sampling, most
        self.begun = time.perf_counter()
        self.ids = _checked(prompt, target)  # (1, tokens) prompt and what is written
        self.prompt = self.ids.shape[1]
        self.target, self.draft = CachedReader(target), CachedReader(draft)

    def run(self, drafted: int, verify: Verify, ends: set[int]) -> Decoded:
        accepted, proposed = [], []
        while (room := self.most - self._written()) > 0 and not self._ended(ends):
            tokens, probs = self._propose(min(drafted, room - 1))
            logits = self._check(tokens)
            step = verify(tokens, probs, logits)
            taken = int(step.accepted)
            accepted.append(taken)
            proposed.append(tokens.shape[1])
            self._append(step.tokens[:, : taken + 1], ends)
        tokens = self.ids[0, self.prompt :].cpu()
        seconds = time.perf_counter() - self.begun
        return Decoded(tokens, tuple(accepted), tuple(proposed), len(accepted), seconds)

    def _propose(self, count: int) -> tuple[Tensor, Tensor]:
        """The draft's next tokens (1, count) and what they were drawn from (1, count, vocab)."""
        tokens, probs = [], []
        fresh = self.ids[:, self.draft.length :]
        for _ in range(count):
            # Of padded vocabularies one is longer. The draft may propose anything that the target knows, and reads
            # something else for what itself does not know: its proposals need not be good for the text to be exact.
            known = fresh.masked_fill(fresh >= self.draft.vocab, 0)
            drawn, distribution = _draw(self.draft.read(known)[:, -1, : self.target.vocab], self.sampling)
            tokens.append(drawn)
            probs.append(distribution)
            fresh = drawn
        if not tokens:
            return self.ids.new_empty(1, 0), torch.zeros(1, 0, self.target.vocab, device=self.ids.device)
        return torch.cat(tokens, 1), torch.stack(probs, 1)

    def _check(self, tokens: Tensor) -> Tensor:
        """The target's logits (1, count + 1, vocab) at each drafted token and after the last one, in one call."""
        fresh = torch.cat([self.ids[:, self.target.length :], tokens], 1)
        return self.target.read(fresh)[:, -tokens.shape[1] - 1 :]

    def _append(self, tokens: Tensor, ends: set[int]) -> None:
        """Writes tokens up to an end token, and takes back whatever the models read beyond them."""
        values = tokens[0].tolist()
        kept = next((place + 1 for place, value in enumerate(values) if value in ends), len(values))
        self.ids = torch.cat([self.ids, tokens[:, :kept]], 1)
        # The last token is unread: each model's next call begins with it.
        for reader in (self.target, self.draft):
            reader.take_back(self.ids.shape[1] - 1)

    def _written(self) -> int:
        return self.ids.shape[1] - self.prompt

    def _ended(self, ends: set[int]) -> bool:
        return self._written() > 0 and int(self.ids[0, -1]) in ends


def _draw(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token (items, 1) and the distribution (items, vocab) it was drawn from."""
    if sampling.greedy:
        return logits.argmax(-1, keepdim=True), logits
    probs = sampling.probabilities(logits)
    return torch.multinomial(probs, 1), probs


def _same_vocabulary(draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the longer of two vocabularies; what one side lacks has none."""
    longest = max(draft.shape[-1], target.shape[-1])
    padded = (torch.nn.functional.pad(one, (0, longest - one.shape[-1])) for one in (draft, target))
    first, second = padded
    return first, second


def _checked(prompt: Tensor, model: nn.Module) -> Tensor:
    if prompt.ndim != 1 or not len(prompt):
        raise IncompatibleError(f"a prompt is a row of at least one token, not of shape {tuple(prompt.shape)}")
    return prompt.to(device_of(model)).unsqueeze(0)
