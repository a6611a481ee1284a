"""From documents to tokens, of which some are targets and some are not."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from limbeck.core.errors import IncompatibleError
from limbeck.data.text.documents import Document
from limbeck.data.text.tokenizer import end_token


class Encoded(NamedTuple):
    """The tokens of one document, of which the first `prompt` are no targets."""

    ids: list[int]
    prompt: int = 0


def encode(documents: Sequence[Document], tokenizer: Any, chat: bool = False) -> list[Encoded]:
    """Tokens of documents, each closed by the tokenizer's end token.

    A prompt and its completion are tokenised apart, as they will be in generation, and follow each other directly;
    special tokens that the tokenizer opens a text with come before the prompt. With `chat` they become the turns of
    user and assistant in the tokenizer's chat template, and what the assistant says is the target, its end included.
    Which tokens are targets is told by lengths alone, never by comparing ids.

    Args:
        documents: all with a prompt, or all without.
        tokenizer: of transformers.
        chat: render with the chat template; documents without a prompt are the assistant's only turn.

    Raises:
        IncompatibleError: no chat template, or one that writes a prompt differently once there is an answer.
    """
    if chat:
        return _encode_chats(documents, tokenizer)
    prompts = [document.prompt for document in documents]
    texts = [document.text for document in documents]
    if all(prompt is None for prompt in prompts):
        return [Encoded(_closed(ids, tokenizer)) for ids in _ids(tokenizer, texts, special=True)]
    openings = _ids(tokenizer, [prompt or "" for prompt in prompts], special=True)
    answers = _ids(tokenizer, texts, special=False)
    end = end_token(tokenizer)
    pairs = [
        (opening[:-1] if opening and opening[-1] == end else opening, answer)
        for opening, answer in zip(openings, answers, strict=True)
    ]
    return [Encoded(opening + _closed(answer, tokenizer), len(opening)) for opening, answer in pairs]


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    # verbose=False: texts longer than the model takes are cut or packed later, and are no reason for a warning.
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    end = end_token(tokenizer)
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _encode_chats(documents: Sequence[Document], tokenizer: Any) -> list[Encoded]:
    if tokenizer.chat_template is None:
        raise IncompatibleError("the tokenizer has no chat template", "set data.text.chat: false")
    asked = [[] if document.prompt is None else [_turn("user", document.prompt)] for document in documents]
    whole = [[*turns, _turn("assistant", doc.text)] for turns, doc in zip(asked, documents, strict=True)]
    openings = _render(tokenizer, [turns for turns in asked if turns], add_generation_prompt=True)
    encoded = []
    for turns, ids in zip(asked, _render(tokenizer, whole), strict=True):
        opening = next(openings) if turns else []
        _check_prefix(opening, ids)
        encoded.append(Encoded(ids, len(opening)))
    return encoded


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _render(tokenizer: Any, conversations: list[list[dict[str, str]]], **options: Any) -> Iterator[list[int]]:
    if not conversations:
        return iter(())
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
    return iter(_ids(tokenizer, texts, special=False))  # templates write the special tokens themselves


def _check_prefix(opening: list[int], whole: list[int]) -> None:
    if whole[: len(opening)] == opening:
        return
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, opening, strict=False)))
    raise IncompatibleError(
        f"the chat template changes a prompt at token {shared} once there is an answer",
        "use prompt_column and completion_column without chat",
    )
