"""Language runs from recipe to measured, exported student; with and without an adapter."""

import pytest
import torch

import limbeck
from limbeck.core.errors import IncompatibleError
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.experiment import Experiment
from limbeck.modality import check_task
from limbeck.models.tokenizers import tokenizer_of
from tests.models.texts import SIZES, text

DATA = {"name": "pydoc", "limit": 64, "validation": 0.02, "text": {"tokenizer": "bpe:300", "length": 32}}
TEACHER = {"name": "config:llama", "arguments": SIZES["llama"], "seed": 5}
TRAIN = {"steps": 4, "batch_size": 8, "accumulate": 2, "evaluate_every": 4}
RECIPE = {
    "data": DATA,
    "stages": [
        {
            "name": "distil",
            "method": "kl",
            "options": {"label_weight": 1.0},
            "teacher": TEACHER,
            "student": {"name": "config:gpt2", "arguments": SIZES["gpt2"]},
            "train": TRAIN,
        },
        {
            "name": "adapt",
            "method": "kl",
            "teacher": TEACHER,
            "student": {**TEACHER, "adapter": {"rank": 2}},
            "train": {"steps": 2, "batch_size": 8, "optimizer": {"lr": 0.05}},
        },
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return limbeck.run(RECIPE, tmp_path_factory.mktemp("runs") / "language", quiet=True)


def test_every_stage_is_measured_as_a_language_model(finished):
    for figures in finished.results().values():
        assert figures["perplexity_low"] < figures["perplexity"] < figures["perplexity_high"]
        assert 0 < figures["acceptance"] <= 1
        assert {"tokens", "token_accuracy", "agreement", "teacher_kl", "flops", "latency"} <= figures.keys()
    assert finished.results()["adapt"]["acceptance"] > finished.results()["distil"]["acceptance"]
    assert "validation/perplexity" in finished.metrics_path.read_text()


def test_evaluation_adds_measured_decoding(finished):
    figures = limbeck.evaluate(finished)
    stored = finished.results()["adapt"]
    for name in ("perplexity", "agreement", "teacher_kl"):
        assert figures[name] == pytest.approx(stored[name], rel=1e-5)
    assert 1 <= figures["block_efficiency"] <= 5
    assert figures["tokens_per_second"] > 0


def test_the_tokenizer_travels_with_the_student(finished):
    student = limbeck.load(finished)
    ids = tokenizer_of(student)("The statement", return_tensors="pt")
    assert student(**ids).logits.shape[-1] == 300


def test_an_adapter_is_exported_as_it_is_or_merged(finished, tmp_path):
    limbeck.export(finished, "peft", tmp_path / "adapter")
    limbeck.export(finished, "transformers", tmp_path / "merged", merge=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    ids = torch.randint(4, 300, (2, 9))
    with torch.no_grad():
        outputs = [limbeck.load(folder)(input_ids=ids).logits for folder in (tmp_path / "adapter", tmp_path / "merged")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_teacher_and_student_hold_their_common_backbone_once(finished):
    recipe = finished.recipe()
    prepared = Experiment(recipe, finished).prepare(recipe.stages[1])
    assert isinstance(prepared.teacher, LiveTeacher)
    frozen = {one.data_ptr() for one in prepared.student.parameters() if not one.requires_grad}
    assert {one.data_ptr() for one in prepared.teacher.model.parameters()} <= frozen


def test_text_can_be_given_as_a_source(tmp_path):
    source = text()
    run = limbeck.distill(
        "kl",
        student={"name": "config:gpt2", "arguments": SIZES["gpt2"]},
        teacher=TEACHER,
        data=source,
        out=tmp_path / "run",
        steps=2,
        batch_size=4,
        quiet=True,
    )
    assert run.results()["distil"]["tokens"] > 0


def test_encoders_learn_to_classify_text(tmp_path):
    run = limbeck.distill(
        "kd",
        student={"name": "config:bert", "arguments": SIZES["bert"]},
        teacher={"name": "config:bert", "arguments": SIZES["bert"], "seed": 3},
        data=text(classes=3),
        out=tmp_path / "run",
        steps=2,
        batch_size=4,
        quiet=True,
    )
    assert {"accuracy", "agreement"} <= run.results()["distil"].keys()


def test_data_that_a_method_cannot_use_are_refused():
    images = ArraySource(torch.rand(4, 1, 8, 8), [0, 1, 0, 1]).info()
    with pytest.raises(IncompatibleError, match="'kl' models language, and the data hold image"):
        check_task(method_class("kl").card, images, "distil")
    with pytest.raises(IncompatibleError, match="the text has none"):
        check_task(method_class("kd").card, text().info(), "distil")
    check_task(method_class("kl").card, text().info(), "distil")
    check_task(method_class("kd").card, text(classes=2).info(), "distil")
