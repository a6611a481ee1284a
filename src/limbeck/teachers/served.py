"""A teacher behind an OpenAI-compatible server, asked for the log-probabilities of the tokens it is sent."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.specs import ModelSpec
from limbeck.core.teacher import TeacherSignal
from limbeck.language.predictions import kept_tokens
from limbeck.objectives.fused_head import TopKTeacher
from limbeck.teachers.completions import Entries, Pieces, read_echo, read_prompt_logprobs, request
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.options import ServedOptions, check_served


class ServedTeacher:
    """A causal language model that is run by a server, known by its k most probable tokens; a `Teacher`.

    Batches are sent as token ids, one sequence a request, several at a time. Every answer is checked against what was
    sent; one that is late, broken or wrong is asked for again, and nothing that is wrong is passed on. The server's
    model has to have the tokenizer that made the ids.

    Args:
        url: of the interface, as `http://localhost:8000/v1`.
        options: how to ask.
        vocab: number of token ids.
        tokenizer: of transformers, for servers that name tokens by their text.

    Raises:
        UsageError: no such kind of address, or the variable that holds the key is not set.
    """

    def __init__(self, url: str, options: ServedOptions, vocab: int, tokenizer: Any = None) -> None:
        self.options, self.vocab, self.tokenizer = options, vocab, tokenizer
        address = f"{url.rstrip('/')}/completions"
        self.endpoint = Endpoint(address, options.key_variable, options.timeout, options.retries, options.backoff)

    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """Refused: a server tells neither logits nor layers."""
        raise IncompatibleError(
            "a served teacher only tells the most probable tokens", "use a method for language models"
        )

    def tokens(self, batch: Batch) -> TopKTeacher:
        """The k most probable tokens (tokens, k) at every token that counts, at temperature 1.

        Raises:
            ServedTeacherError: no usable answer, however often the server was asked.
        """
        kept, sent = kept_tokens(batch).cpu(), _sequences(batch)
        futures = [self._pool.submit(self._ask, ids) for ids in sent]
        ids, log_probs = [], []
        for row, answer in zip(kept, self._answers(futures), strict=True):
            chosen = [answer[place] for place in row.nonzero().squeeze(1).tolist()]
            ids += [entries.ids for entries in chosen]
            log_probs += [entries.log_probs for entries in chosen]
        k, device = min(self.options.k, self.vocab), batch["input_ids"].device
        return TopKTeacher(
            torch.tensor(ids, dtype=torch.int64).view(-1, k).to(device), torch.tensor(log_probs).view(-1, k).to(device)
        )

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    @property
    def fingerprint(self) -> str:
        """Hash of address, model and k: whether the weights behind them stay the same, a server does not tell."""
        options = self.options
        return hashlib.sha256(f"served:{self.endpoint.url}:{options.model}:{options.k}".encode()).hexdigest()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.options.concurrency, "limbeck-served")

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.tokenizer, self.vocab)

    def _answers(self, futures: list[Future[list[Entries]]]) -> list[list[Entries]]:
        """All answers in order; the first failure ends the others' attempts."""
        try:
            return [future.result() for future in futures]
        except BaseException:
            self.endpoint.stopped.set()
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()
            self.endpoint.stopped.clear()
            raise

    def _ask(self, ids: list[int]) -> list[Entries]:
        options = self.options
        body = {**request(options.model, ids, options.k, options.shape, options.max_tokens), **options.extra}

        def read(answer: Any) -> list[Entries]:
            if options.shape == "prompt_logprobs":
                return read_prompt_logprobs(answer, ids, options.k, self.vocab)
            return read_echo(answer, ids, options.k, self._pieces, options.max_tokens)

        return self.endpoint.ask(body, read)


def build_served(spec: ModelSpec, data: DataInfo, key: str = "teacher") -> ServedTeacher:
    """The served teacher that a recipe names.

    Raises:
        RecipeError: an argument is unknown or out of range.
        IncompatibleError: the data are no text, or text whose tokens are hidden.
    """
    if data.text is None or data.text.masked or data.classes:
        raise IncompatibleError("a served teacher predicts the next token of text", "give text, without mask_rate")
    options = check_served(spec, key)
    return ServedTeacher(spec.name.partition(":")[2], options, data.text.vocab, data.text.tokenizer)


def _sequences(batch: Batch) -> list[list[int]]:
    """The ids of each sequence, without its padding."""
    ids: Tensor = batch["input_ids"]
    lengths = batch["attention_mask"].sum(1) if "attention_mask" in batch else torch.full((len(ids),), ids.shape[1])
    return [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
