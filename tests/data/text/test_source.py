"""The source of text: fields, masks and random hiding as functions of their arguments."""

import time

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.data.loader import Loader
from limbeck.data.text.masking import Masking
from limbeck.data.text.source import TextSource

IDS = torch.arange(24).view(4, 6)
LENGTHS = torch.tensor([6, 4, 2, 6])
TARGETS = torch.arange(6) >= torch.tensor([[0], [2], [1], [5]])


def masked(rate: float = 0.3) -> TextSource:
    ids = torch.randint(3, 50, (40, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 10] = 1
    return TextSource(ids, vocab=50, masking=Masking(rate, 2, 50, torch.tensor([0, 1, 2])))


def test_labels_are_the_tokens_that_are_targets_and_never_padding():
    batch = TextSource(IDS, LENGTHS, TARGETS).fetch(torch.tensor([1, 3, 0]))
    assert batch.index.tolist() == [1, 3, 0]
    assert batch.input_ids.tolist() == IDS[[1, 3, 0]].tolist()
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1] * 6]
    assert batch.labels.tolist() == [[-100, -100, 8, 9, -100, -100], [-100] * 5 + [23], IDS[0].tolist()]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_without_lengths_and_targets_every_token_counts():
    batch = TextSource(IDS).fetch(torch.arange(4))
    assert torch.equal(batch.labels, IDS)
    assert batch.attention_mask.all()


def test_a_selection_is_renumbered():
    source = TextSource(IDS, LENGTHS, TARGETS, vocab=30).select(torch.tensor([3, 1]))
    batch = source.fetch(torch.tensor([1]))
    assert (len(source), source.vocab, batch.index.tolist()) == (2, 30, [1])
    assert batch.labels.tolist() == [[-100, -100, 8, 9, -100, -100]]


def test_sequences_with_classes_have_a_label_each():
    source = TextSource(IDS, LENGTHS, label=[0, 2, -100, 1], class_names=("a", "b", "c"))
    batch = source.fetch(torch.arange(4))
    assert batch.label.tolist() == [0, 2, -100, 1]
    assert "labels" not in batch
    assert (source.info().classes, source.select(torch.tensor([0])).classes) == (3, 3)


def test_info_tells_vocabulary_and_kind():
    info = masked().info()
    assert info.text is not None
    assert (info.items, info.classes, info.text.vocab, info.text.masked, info.example.size) == (40, 0, 50, True, 2)
    plain = TextSource(IDS).info().text
    assert plain is not None
    assert (plain.vocab, plain.masked, plain.tokenizer) == (24, False, None)


def test_fetching_16_sequences_of_128_takes_microseconds():
    source = TextSource(torch.randint(0, 500, (1000, 128)), targets=torch.rand(1000, 128) < 0.5)
    rows, durations = torch.randperm(1000)[:16], []
    for _ in range(500):
        start = time.perf_counter()
        source.fetch(rows)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 50e-6


def test_hidden_tokens_are_a_function_of_seed_and_item():
    source = masked()
    whole, part = source.fetch(torch.arange(40), 7), source.fetch(torch.tensor([31, 5]), 7)
    assert torch.equal(part.input_ids, whole.input_ids[[31, 5]])
    assert torch.equal(part.labels, whole.labels[[31, 5]])
    assert not torch.equal(whole.labels, source.fetch(torch.arange(40), 8).labels)
    assert torch.equal(source.fetch(torch.arange(40)).labels, source.fetch(torch.arange(40)).labels)


def test_tokens_are_hidden_as_bert_does():
    source = masked()
    ids, batch = source._ids.long(), source.fetch(torch.arange(40), 1)
    chosen = batch.labels != -100
    assert torch.equal(batch.labels[chosen], ids[chosen])
    assert torch.equal(batch.input_ids[~chosen], ids[~chosen])
    assert not chosen[:, 10].any()  # a special token
    assert chosen.float().mean() == pytest.approx(0.3 * 63 / 64, abs=0.03)
    shown = batch.input_ids[chosen]
    assert (shown == 2).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (shown == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.04)
    assert (shown.max(), shown.min() >= 0) == (49, True)


def test_each_epoch_hides_other_tokens():
    source = masked()
    first, second = (Loader(source, 40, seed=0).at(step)[0] for step in (0, 1))
    assert not torch.equal(first.labels[first.index.argsort()], second.labels[second.index.argsort()])
    parts = Loader(source, 40, seed=0, accumulate=4).at(0)
    assert torch.equal(torch.cat([part.labels for part in parts]), first.labels)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.arange(4),), {}, "must be"),
        ((IDS, [1, 2]), {}, "must be"),
        ((IDS, None, TARGETS[:, :3]), {}, "targets"),
        ((IDS,), {"vocab": 20}, "vocabulary of 20"),
        ((-IDS,), {}, "from -23"),
        ((IDS[:0],), {}, "at least one item"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(IncompatibleError, match=message):
        TextSource(*arguments, **options)
