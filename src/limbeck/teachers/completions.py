"""Requests for and answers with the log-probabilities of a prompt, as vLLM and OpenAI's older interface write them.

Nothing in an answer is believed before it was looked at: how many tokens, which ones, how many entries, and that these
are log-probabilities of one distribution.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from limbeck.teachers.endpoint import BadAnswerError

_SLACK = 1e-3  # of log-probabilities that were rounded on the way
_MASS_SLACK = 1e-2
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class Entries(NamedTuple):
    """The most probable tokens at some position: ids (before they are looked up, names), and log-probabilities in
    descending order."""

    ids: list[Any]
    log_probs: list[float]


class Pieces:
    """Tokens as strings and back, for servers that name tokens by their text.

    Args:
        tokenizer: of transformers; without one, tokens have to come as `token_id:N`.
        vocab: number of token ids.
    """

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self.vocab = vocab
        self.texts = (
            [] if tokenizer is None else [tokenizer.decode([token]) for token in range(min(vocab, len(tokenizer)))]
        )
        self.special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        times = Counter(self.texts)
        self._ids = {text: token for token, text in enumerate(self.texts) if times[text] == 1}

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name; None where no token, or more than one, is called so."""
        if name.startswith("token_id:"):
            return _id(name.removeprefix("token_id:"), self.vocab)
        return self._ids.get(name)

    def known(self, name: str, place: int) -> int | None:
        """The id of a token by its name at some place, as `id_of`; an id must be one of the vocabulary."""
        token = self.id_of(name)
        if token is None and name.startswith("token_id:"):
            raise BadAnswerError(f"{name!r:.40} at token {place} is no id below {self.vocab}")
        return token

    def may_be(self, name: str, token: int) -> bool:
        """Whether a server may call a token so; one that is a part of a character has no text to be sure by."""
        if name.startswith("token_id:"):
            return self.id_of(name) == token
        text = self.texts[token] if token < len(self.texts) else None
        return text is not None and (name == text or _UNREADABLE in text or (not name and token in self.special))


def request(model: str, ids: Sequence[int], k: int, shape: str, max_tokens: int) -> dict[str, Any]:
    """The body of a request for what a model expects at each token of a prompt.

    Args:
        model: its name on the server.
        ids: of the prompt.
        k: most probable tokens a position.
        shape: "prompt_logprobs" or "echo".
        max_tokens: tokens to generate, which are thrown away.
    """
    body = {"model": model, "prompt": list(ids), "max_tokens": max_tokens, "temperature": 1.0, "n": 1, "stream": False}
    return body | ({"prompt_logprobs": k} if shape == "prompt_logprobs" else {"echo": True, "logprobs": k})


def read_prompt_logprobs(answer: Any, ids: Sequence[int], k: int, vocab: int) -> list[Entries]:
    """What an answer of vLLM says: the entries for each token of the prompt but the first.

    Raises:
        BadAnswerError: it is not what was asked for; the message says why.
    """
    choice = _choice(answer)
    found = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
    if not isinstance(found, list) or len(found) != len(ids):
        raise BadAnswerError(f"prompt_logprobs of {_length(found)} tokens, and {len(ids)} were sent")
    result = []
    for place, (sent, entries) in enumerate(zip(ids[1:], found[1:], strict=True), 1):
        if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
            raise BadAnswerError(f"no log-probabilities at token {place}")
        values = {_known_id(name, vocab, place): entry.get("logprob") for name, entry in entries.items()}
        ranks = {_known_id(name, vocab, place): entry.get("rank") for name, entry in entries.items()}
        if sent not in values:
            raise BadAnswerError(f"token {place} was sent as {sent} and is not among those that came back")
        checked = _checked(values, k, vocab, place)
        _check_ranks(checked, ranks, place)
        result.append(checked)
    return result


def read_echo(answer: Any, ids: Sequence[int], k: int, pieces: Pieces, max_tokens: int) -> list[Entries]:
    """What an answer with an echoed prompt says: the entries for each token of the prompt but the first.

    Entries whose name no token, or more than one, has are left out: their probability counts among the tail.

    Raises:
        BadAnswerError: it is not what was asked for; the message says why.
    """
    found = _choice(answer).get("logprobs")
    if not isinstance(found, Mapping):
        raise BadAnswerError("no logprobs")
    parts: list[Any] = [found.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")]
    tokens, own, tops = parts
    lengths = set(map(_length, parts))
    if len(lengths) != 1 or not len(ids) <= lengths.pop() <= len(ids) + max_tokens:
        raise BadAnswerError(f"logprobs of {_length(tokens)} tokens, and {len(ids)} were sent")
    for place, (sent, name) in enumerate(zip(ids, tokens, strict=False)):
        if not isinstance(name, str) or not pieces.may_be(name, sent):
            raise BadAnswerError(f"token {place} was sent as {sent} and came back as {name!r:.40}")
    return [_echoed(tops[place], own[place], k, pieces, place) for place in range(1, len(ids))]


def _echoed(entries: Any, own: Any, k: int, pieces: Pieces, place: int) -> Entries:
    if not isinstance(entries, Mapping):
        raise BadAnswerError(f"no log-probabilities at token {place}")
    checked = _checked(entries, k, pieces.vocab, place)
    if not _is_number(own) or (own > checked.log_probs[-1] + _SLACK and not _among(own, checked.log_probs)):
        raise BadAnswerError(f"the log-probability {own!r:.40} of token {place} does not fit those of the others")
    named = [(pieces.known(str(name), place), value) for name, value in zip(*checked, strict=True)]
    known = {token: value for token, value in named if token is not None}
    # What is left out makes room for ids that are impossible: every row has k entries.
    spare = (token for token in range(pieces.vocab) if token not in known)
    missing = [next(spare) for _ in range(min(k, pieces.vocab) - len(known))]
    return Entries([*known, *missing], [*known.values(), *[-math.inf] * len(missing)])


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadAnswerError("the answer is no single completion")
    return choices[0]


def _checked(values: Mapping[Any, Any], k: int, vocab: int, place: int) -> Entries:
    """The k largest of k or k + 1 entries: with the token that was sent there may be one more."""
    wanted = min(k, vocab)
    if not wanted <= len(values) <= wanted + 1:
        raise BadAnswerError(f"{len(values)} entries at token {place}, and {wanted} were asked for")
    for name, value in values.items():
        if not _is_number(value) or value > _SLACK:
            raise BadAnswerError(f"{value!r:.40} is no log-probability (token {place}, entry {name!r:.40})")
    order = sorted(values, key=lambda name: values[name], reverse=True)[:wanted]
    log_probs = [min(0.0, float(values[name])) for name in order]
    if sum(map(math.exp, log_probs)) > 1 + _MASS_SLACK:
        raise BadAnswerError(f"the probabilities at token {place} sum to more than 1")
    return Entries(order, log_probs)


def _check_ranks(checked: Entries, ranks: Mapping[int, Any], place: int) -> None:
    """Where ranks are given, a better rank has no lower log-probability."""
    ranked = [(ranks[token], value) for token, value in zip(*checked, strict=True) if isinstance(ranks[token], int)]
    by_rank = [value for _, value in sorted(ranked, key=lambda pair: pair[0])]
    if any(later > earlier + _SLACK for earlier, later in pairwise(by_rank)):
        raise BadAnswerError(f"ranks and log-probabilities at token {place} contradict each other")


def _known_id(name: Any, vocab: int, place: int) -> int:
    token = _id(name, vocab)
    if token is None:
        raise BadAnswerError(f"{name!r:.40} at token {place} is no id below {vocab}")
    return token


def _id(name: Any, vocab: int) -> int | None:
    text = str(name)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 and int(text) < vocab else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _among(value: float, others: Sequence[float]) -> bool:
    return any(abs(value - other) <= _SLACK for other in others)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0
