"""From a recipe's description of text to a training and a validation source."""

from collections.abc import Sequence
from typing import Any

import torch

from limbeck.core.errors import RecipeError
from limbeck.core.specs import DataSpec
from limbeck.data.readers.texts import read_rows
from limbeck.data.text.documents import Corpus, corpus_of, hold_out
from limbeck.data.text.encoding import encode
from limbeck.data.text.masking import Masking
from limbeck.data.text.packing import pack, pad
from limbeck.data.text.source import TextSource
from limbeck.data.text.tokenizer import open_tokenizer, padding_token


def open_text(kind: str, path: str, spec: DataSpec, seed: int = 0) -> tuple[TextSource, TextSource]:
    """Opens text: reads and splits documents, trains or loads the tokenizer, encodes and packs.

    Data that bring no split of their own are split by document. A tokenizer is trained on the training part alone.

    Args:
        kind: of `data.names`.
        path: of the data, "" where they are embedded.
        spec: the data.
        seed: which documents are held out where the data bring no split; of embedded text always the same ones.

    Raises:
        RecipeError, IncompatibleError: a column, tokenizer or length that does not go with the data.
        DamagedFileError: a file is not what its name says.
    """
    rows, held_rows = read_rows(kind, path, spec)
    train = corpus_of(rows, spec)
    if held_rows is None:
        kept, held = hold_out(train.documents, spec.validation, 0 if kind == "pydoc" else seed)
        train, validation = Corpus(kept, train.class_names), Corpus(held, train.class_names)
    else:
        validation = corpus_of(held_rows, spec, train.class_names)
    texts = (part for document in train.documents for part in (document.prompt, document.text) if part)
    tokenizer = open_tokenizer(spec.text.tokenizer, texts)
    return _source(train, tokenizer, spec, spec.limit), _source(validation, tokenizer, spec)


def masking_of(tokenizer: Any, rate: float) -> Masking:
    """How a tokenizer's tokens are hidden: with its mask token, its special tokens never.

    Raises:
        RecipeError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise RecipeError("data.text.mask_rate", "the tokenizer has no mask token", "remove the key, or choose another")
    return Masking(rate, tokenizer.mask_token_id, len(tokenizer), torch.tensor(tokenizer.all_special_ids))


def _source(corpus: Corpus, tokenizer: Any, spec: DataSpec, limit: int | None = None) -> TextSource:
    encoded = encode(corpus.documents, tokenizer, spec.text.chat)
    classified = bool(corpus.class_names)
    rows = (pack if spec.text.packing and not classified else pad)(encoded, spec.text.length, padding_token(tokenizer))
    source = TextSource(
        rows.ids,
        rows.lengths,
        rows.targets,
        vocab=len(tokenizer),
        tokenizer=tokenizer,
        masking=None if spec.text.mask_rate is None else masking_of(tokenizer, spec.text.mask_rate),
        label=_labels(corpus, rows.kept) if classified else None,
        class_names=corpus.class_names,
    )
    return source if limit is None or limit >= len(source) else source.select(torch.arange(limit))


def _labels(corpus: Corpus, kept: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    labels = torch.tensor([document.label for document in corpus.documents])
    return labels if kept is None else labels[kept]
