"""Evaluating a classifier, against figures worked out by hand."""

import math

import pytest
import torch
from torch import nn

from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.metrics.classification import evaluate
from limbeck.metrics.intervals import wilson


class Table(nn.Module):
    """Gives each item the logits that its pixels spell."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.drop = nn.Dropout(0.9)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.drop(self.scale * image.flatten(1))


def source_of(logits: torch.Tensor, labels: list[int], classes: int = 4) -> ArraySource:
    return ArraySource(logits[:, None, None, :], labels, classes=classes, normalisation=([0.0], [1.0]))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(37, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch_size", [5, 37, 100])
def test_figures_are_those_of_a_plain_loop(logits, batch_size):
    labels = [item % 4 for item in range(37)]
    figures = evaluate(Table(), source_of(logits, labels), batch_size=batch_size)
    correct = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    entropy = -sum(float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True)) / 37
    assert figures["accuracy"] == correct / 37
    assert (figures["accuracy_low"], figures["accuracy_high"]) == wilson(correct, 37)
    assert figures["cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert figures["items"] == 37
    assert "agreement" not in figures


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    # Ten items, all with confidence p in class 0, six of them right: one bin, |p - 0.6|.
    logits = torch.tensor([[math.log(0.9), math.log(0.1)]]).expand(10, 2)
    figures = evaluate(Table(), source_of(logits, [0] * 6 + [1] * 4, classes=2))
    assert figures["calibration_error"] == pytest.approx(0.3, abs=1e-5)


def test_comparison_with_the_teacher(logits):
    source = source_of(logits, [0] * 37)
    teacher = Table(2.0)
    teacher_probability = (2 * logits).softmax(1)
    expected = (teacher_probability * ((2 * logits).log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    for kind in (teacher, LiveTeacher(Table(2.0)), Ensemble([LiveTeacher(Table(2.0))])):
        figures = evaluate(Table(), source, teacher=kind, batch_size=10)
        assert figures["agreement"] == 1.0
        assert figures["teacher_kl"] == pytest.approx(float(expected), rel=1e-4)
    opposite = evaluate(Table(), source, teacher=Table(-1.0))
    assert opposite["agreement"] == 0.0
    assert evaluate(teacher, source, teacher=teacher)["teacher_kl"] == 0.0


def test_items_without_a_label_count_for_agreement_only(logits):
    labels = [-100] * 30 + [int(row.argmax()) for row in logits[30:]]
    figures = evaluate(Table(), source_of(logits, labels), teacher=Table(2.0), batch_size=10)
    assert figures["accuracy"] == 1.0
    assert figures["accuracy_low"] == wilson(7, 7)[0]
    assert figures["agreement"] == 1.0
    nothing = evaluate(Table(), source_of(logits, [-100] * 37))
    assert nothing == {"items": 37}


def test_modes_and_streams_are_as_before(logits):
    model = nn.Sequential(Table(), nn.BatchNorm1d(4).eval())
    model[0].train()
    before = torch.get_rng_state()
    evaluate(model, source_of(logits, [0] * 37), teacher=Table())
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in (model, model[0], model[1])] == [True, True, False]
    assert model[1].num_batches_tracked == 0


def test_every_batch_pauses(logits):
    calls = []
    evaluate(Table(), source_of(logits, [0] * 37), batch_size=10, pause=lambda: calls.append(1))
    assert len(calls) == 4
