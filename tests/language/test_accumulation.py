"""Gradient accumulation over sequences of uneven length: the sum over valid tokens decides, not the mean of means."""

import copy

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.text.source import TextSource
from limbeck.methods.language.kl import ForwardKL
from tests.models.texts import VOCAB, model, text

CALM = {  # dropout is drawn for each micro-batch: another sample of the same loss
    "llama": {},
    "gemma2": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def uneven() -> TextSource:
    """Items whose targets are 1 to 11 tokens, and one that has none."""
    ids = torch.randint(4, VOCAB, (12, 12), generator=torch.Generator().manual_seed(0))
    return TextSource(ids, targets=torch.arange(12) >= torch.arange(1, 13)[:, None], vocab=VOCAB)


def trained(student: torch.nn.Module, teacher: torch.nn.Module, source: TextSource, accumulate: int, **options):
    """The student after two steps of plain gradient descent, and the rows of metrics."""
    student, rows = copy.deepcopy(student), []
    method = ForwardKL(
        ForwardKL.Options(label_weight=0.5, **options),
        student=student,
        teacher=LiveTeacher(copy.deepcopy(teacher)),
        data=source.info(),
    )
    optimizer = OptimizerSpec(name="sgd", lr=0.5, momentum=0, schedule="constant")
    spec = TrainSpec(steps=2, batch_size=12, accumulate=accumulate, optimizer=optimizer, log_every=1)
    loader = Loader(source, 12, seed=0, accumulate=accumulate)
    Trainer(method, loader, spec, steps=2, items=len(source), seed=0, record=rows.append).fit()
    return student, rows


@pytest.mark.parametrize(
    ("kind", "adapter"), [("llama", None), ("gpt2", None), ("gemma2", None), ("llama", {"rank": 2})]
)
def test_it_equals_the_large_batch(kind, adapter):
    source = uneven()
    student, teacher = model(kind, source, adapter=adapter, **CALM[kind]), model("llama", source, seed=1)
    start = {name: parameter.clone() for name, parameter in student.named_parameters()}
    whole, rows = trained(student, teacher, source, 1)
    for accumulate in (3, 12):
        parts, other = trained(student, teacher, source, accumulate)
        assert [row["student/loss"] for row in other] == pytest.approx([row["student/loss"] for row in rows], rel=1e-5)
        for (name, one), another in zip(whole.named_parameters(), parts.parameters(), strict=True):
            step = (one - start[name]).norm()
            assert (one - another).norm() <= 1e-4 * step + 1e-7, name
    moved = {name for name, parameter in whole.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved
    assert adapter is None or all("lora_" in name for name in moved)


def test_the_mean_of_means_would_be_another_loss():
    """What the test above rules out is really different here."""
    source = uneven()
    counts = (source.fetch(torch.arange(12)).labels[:, 1:] != -100).sum(1)
    assert len(counts.unique()) > 8


def test_masked_models_too():
    source = text(masked=True)
    student, teacher = (model("bert", source, seed=seed, **CALM["bert"]) for seed in (0, 1))
    whole, _ = trained(student, teacher, source, 1)
    parts, _ = trained(student, teacher, source, 4)
    for one, another in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing():
    """The same sequences in wider rows give the same step."""
    source = uneven()
    whole = source.fetch(torch.arange(12))
    ids = torch.nn.functional.pad(whole.input_ids, (0, 6), value=9)
    targets = torch.nn.functional.pad(whole.labels != -100, (0, 6), value=True)
    wide = TextSource(ids, torch.full((12,), 12), targets, vocab=VOCAB)
    assert isinstance(wide.fetch(torch.arange(2)), Batch)
    student, teacher = model("llama", wide), model("gpt2", wide, seed=1)
    (narrow, rows), (broad, others) = (trained(student, teacher, one, 2) for one in (source, wide))
    assert rows[0]["student/loss"] == pytest.approx(others[0]["student/loss"], rel=1e-5)
    for one, another in zip(narrow.parameters(), broad.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-3, atol=1e-5)
