"""Figures of language models, against plain formulas on whole logits."""

import math

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.teacher import LiveTeacher, TeacherSignal
from limbeck.data.text.source import TextSource
from limbeck.metrics.decoding import evaluate_decoding
from limbeck.metrics.language import evaluate_language
from limbeck.metrics.memory import PeakMemory
from limbeck.metrics.tasks import evaluate_for
from limbeck.objectives.fused_head import TopKTeacher
from limbeck.objectives.tokens import IGNORED_LABEL
from tests.models.test_adapters import disturbed
from tests.models.texts import model, text

FIGURES = ("cross_entropy", "token_accuracy", "agreement", "teacher_kl", "acceptance")


def by_hand(student: nn.Module, teacher: nn.Module, source: TextSource) -> dict[str, float]:
    batch = source.fetch(torch.arange(len(source)))
    shift = 0 if source.masking is not None else 1
    labels = batch.labels[:, shift:]
    kept = labels != IGNORED_LABEL
    with torch.no_grad():
        ours, theirs = (logits_of(call(one, batch))[:, : kept.shape[1]][kept].double() for one in (student, teacher))
    vocab = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (nn.functional.pad(one, (0, vocab - one.shape[-1]), value=-1e30) for one in (ours, theirs))
    q, p, target = ours.softmax(-1), theirs.softmax(-1), labels[kept]
    return {
        "tokens": len(target),
        "cross_entropy": float(-q.log()[torch.arange(len(target)), target].mean()),
        "token_accuracy": float((q.argmax(-1) == target).double().mean()),
        "agreement": float((q.argmax(-1) == p.argmax(-1)).double().mean()),
        "teacher_kl": float(
            torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0).sum(-1).mean()
        ),
        "acceptance": float(1 - 0.5 * (p - q).abs().sum(-1).mean()),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "gemma2"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_they_are_what_whole_logits_say(kind, batch_size):
    source = text(masked=kind == "bert")
    student, teacher = model(kind, source), model(kind, source, seed=1)
    expected = by_hand(student, teacher, source)
    for other in (teacher, LiveTeacher(teacher)):
        found = evaluate_language(student, source, teacher=other, batch_size=batch_size)
        assert (found["items"], found["tokens"]) == (24, expected["tokens"])
        for name in FIGURES:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))
        assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]


def test_vocabularies_may_be_padded_differently():
    source = text()
    student, teacher = model("llama"), model("llama", seed=1, vocab_size=64)
    found = evaluate_language(student, source, teacher=teacher)
    expected = by_hand(student, teacher, source)
    for name in ("cross_entropy", "token_accuracy", "agreement", "acceptance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    back = evaluate_language(teacher, source, teacher=student)
    assert back["teacher_kl"] == pytest.approx(by_hand(teacher, student, source)["teacher_kl"], rel=1e-4)


def test_a_model_agrees_with_itself():
    found = evaluate_language(model("llama"), text(), teacher=model("llama"))
    assert (found["agreement"], found["acceptance"]) == (1.0, pytest.approx(1.0))
    assert 0 <= found["teacher_kl"] < 1e-6


class Known:
    """A teacher of whom only the two most probable tokens are known."""

    fingerprint = "known"

    def __init__(self, one: nn.Module) -> None:
        self.live = LiveTeacher(one)

    def signal(self, batch: Batch, layers=()) -> TeacherSignal:
        return self.live.signal(batch, layers)

    def tokens(self, batch: Batch) -> TopKTeacher:
        signal = self.live.tokens(batch)
        logits = signal.hidden @ signal.weight.T
        top = logits.log_softmax(-1).topk(2, dim=-1)
        return TopKTeacher(top.indices.flip(-1), top.values.flip(-1))  # in no particular order

    def to(self, device: torch.device) -> None:
        self.live.to(device)


def test_a_teacher_known_by_its_top_tokens_gives_agreement_alone():
    student, teacher = model("llama"), disturbed(model("llama", adapter={"rank": 2}))
    found = evaluate_language(student, text(), teacher=Known(teacher))
    assert found["agreement"] == pytest.approx(by_hand(student, teacher, text())["agreement"])
    assert not {"teacher_kl", "acceptance"} & found.keys()


def test_text_without_targets_has_no_figures():
    source = TextSource(torch.randint(4, 60, (3, 8)), targets=torch.zeros(3, 8), vocab=60)
    assert evaluate_language(model("llama"), source, teacher=model("gpt2")) == {"items": 3, "tokens": 0}


def test_it_pauses_between_batches_and_restores_modes():
    student, calls = model("gpt2").train(), []
    evaluate_language(student, text(), batch_size=10, pause=lambda: calls.append(1))
    assert len(calls) == 3
    assert student.training


def test_full_logits_are_never_held():
    source = text(items=64, length=128, vocab=8000)
    student, teacher = (model("llama", source, num_hidden_layers=1, seed=seed) for seed in (0, 1))
    with PeakMemory() as memory:
        evaluate_language(student, source, teacher=teacher, batch_size=64)
    one_side = 64 * 128 * 8000 * 4
    assert memory.peak_bytes < one_side


def test_tasks_have_their_measurements():
    assert evaluate_for("language-modelling") is evaluate_language
    assert evaluate_for("classification") is not evaluate_language


def test_decoding_is_measured_against_the_target_alone():
    before = torch.get_rng_state()
    target = model("llama", num_hidden_layers=2)
    options = {"prompts": 3, "prompt_tokens": 4, "max_new_tokens": 10, "drafted": 4}
    same = evaluate_decoding(model("llama"), text(), LiveTeacher(target), **options)
    assert (same["block_efficiency"], same["drafts_accepted"]) == (5.0, 1.0)
    assert same["speedup"] == pytest.approx(same["tokens_per_second"] / same["plain_tokens_per_second"])
    other = evaluate_decoding(model("llama", seed=1), text(), target, **options)
    assert other["block_efficiency"] < 5
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_needs_two_live_causal_models():
    masked = text(masked=True)
    assert evaluate_decoding(model("bert", masked), masked, model("bert", masked)) == {}
    assert evaluate_decoding(model("llama"), text(), Known(model("llama"))) == {}
