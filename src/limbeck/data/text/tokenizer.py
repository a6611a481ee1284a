"""Tokenizers: one trained on the text at hand, or one that transformers loads."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from limbeck.core.errors import RecipeError, UsageError

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}
"""Special tokens of a trained tokenizer, in the order of their ids from 0."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
"""How a trained tokenizer writes conversations."""

_MOST_CHARACTERS = 1 << 24  # more text changes the merges no more, and takes minutes


def open_tokenizer(name: str, texts: Iterable[str], key: str = "data.text.tokenizer") -> Any:
    """The tokenizer that a recipe names: `bpe:SIZE` is trained on `texts`, anything else is a folder or hub id.

    Raises:
        RecipeError: a folder or id that transformers cannot read. Code that comes with a tokenizer is never run.
    """
    kind, _, size = name.partition(":")
    if kind == "bpe":
        return train_tokenizer(texts, int(size))
    return load_tokenizer(name, key)


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) as a `PreTrainedTokenizerFast`, a function of the text alone.

    Any text can be written with it, since every byte has a token. Special tokens are those of `SPECIAL`; none is added
    by itself.

    Args:
        texts: what to train on; no more than the first 16 million characters are used.
        size: entries of the vocabulary, 260 (bytes and special tokens alone) or more; fewer come out where the text
            has no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(texts, _MOST_CHARACTERS), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(origin: str, key: str = "data.text.tokenizer") -> Any:
    """A tokenizer of transformers from a local folder, or from the hub where its cache or the network has it.

    Raises:
        RecipeError: neither a folder nor an id that transformers can read.
    """
    from transformers import AutoTokenizer

    folder = Path(origin).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else origin, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            key, f"'{origin}' is no tokenizer that transformers can read: {reason}", "give a folder with tokenizer.json"
        ) from error


def end_token(tokenizer: Any) -> int | None:
    """The id that ends a text: the end of sequence, or the separator of encoders; None where there is neither."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def padding_token(tokenizer: Any) -> int:
    """The id that fills sequences up; the end token, or 0, where a tokenizer has none of its own."""
    found = tokenizer.pad_token_id
    return found if found is not None else end_token(tokenizer) or 0


def _first(texts: Iterable[str], most: int) -> Iterator[str]:
    for text in texts:
        if most <= 0:
            return
        yield text[:most]
        most -= len(text)
