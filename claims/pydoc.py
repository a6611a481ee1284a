"""The common protocol of the language family: Python's documentation, a small GPT-2 teacher and a smaller student."""

from functools import cache
from typing import Any

from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TextSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.metrics.language import evaluate_language
from limbeck.models.build import build_model

BATCH = 16
TEACHER_STEPS, STUDENT_STEPS = 500, 500


def gpt2(layers: int, width: int) -> ModelSpec:
    """A GPT-2 of so many layers of so many units."""
    heads = max(2, width // 32)
    return ModelSpec(name="config:gpt2", arguments={"n_layer": layers, "n_embd": width, "n_head": heads})


@cache
def data() -> DataSplit:
    """Python's documentation in 320 kinds of tokens, 64 a sequence; nine tenths to train on."""
    return open_data(DataSpec(name="pydoc", validation=0.1, text=TextSpec(tokenizer="bpe:320", length=64)))


@cache
def held_out() -> Any:
    """A hundred sequences to measure on."""
    import torch

    validation = data().validation
    return validation.select(torch.arange(min(100, len(validation))))


@cache
def teacher(seed: int) -> LiveTeacher:
    """The seed's teacher: three layers of 96 units, trained on the text alone."""
    network = build_model(gpt2(3, 96), data().train.info(), 1000 + seed)
    train("next-token", network, None, seed, TEACHER_STEPS, 1.5e-3)
    return LiveTeacher(network)


def train(slug: str, student: Any, taught_by: Any, seed: int, steps: int, lr: float, **options: Any) -> Any:
    """Trains a student in place with one method, AdamW and a cosine, and returns it."""
    info = data().train.info()
    kind = method_class(slug)
    reseed(seed, "method", slug)
    method = kind(kind.Options(**options), student=student, teacher=taught_by, data=info)
    assert isinstance(method, Method)
    spec = TrainSpec(steps=steps, batch_size=BATCH, clip_norm=1.0, optimizer=OptimizerSpec(lr=lr))
    loader = Loader(data().train, BATCH, seed)
    Trainer(method, loader, spec, steps=steps, items=info.items, seed=seed, world=World()).fit()
    return method.result()


def figures(student: Any, taught_by: LiveTeacher) -> dict[str, float]:
    """What `evaluate_language` says of a student on the held-out text."""
    return dict(evaluate_language(student, held_out(), teacher=taught_by))
