"""All methods for classifiers on one protocol: the same teacher, student, items, steps and seeds for each.

Run: `python -m claims.vision_table digits` and `python -m claims.vision_table cifar10 --data-dir DIR`; each writes
`claims/results/tables/NAME.json`, from which the documentation's table is made. Methods run with the defaults of their
papers, students start from fresh weights, and nothing is tuned for anybody: the table says what a first try gives, not
how good a method can be made. Searches and active learners, whose budgets are others, are not in it.
"""

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import torch

from claims import digits
from claims.claim import RESULTS
from limbeck.core.errors import LimbeckError
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import MethodClass, all_methods, method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model

OPTIONS: dict[str, dict[str, Any]] = {"deit": {"token": False}}
"""Options without which a method does not apply: a convolutional network has no distillation token."""

Accuracy = Callable[[str, int], float]
TEACHER = "the teacher itself"


def main(
    name: Literal["digits", "cifar10"],
    *,
    data_dir: Annotated[Path | None, cyclopts.Parameter(help="folder that holds cifar10")] = None,
    seeds: Annotated[int, cyclopts.Parameter(help="how many, from 0")] = 3,
) -> None:
    """Runs every method for classifiers on every seed and writes the table."""
    torch.set_num_threads(1)
    protocol = _digits() if name == "digits" else _cifar(data_dir)
    budget, accuracy = protocol
    begun, rows, left_out = time.perf_counter(), {}, {}
    for slug in [TEACHER, *(slug for slug, kind in all_methods().items() if compared(kind))]:
        try:
            rows[slug] = [accuracy(slug, seed) for seed in range(seeds)]
            print(slug, " ".join(f"{value:.4f}" for value in rows[slug]), flush=True)
        except LimbeckError as error:  # a method that does not go with these networks is named, not hidden
            left_out[slug] = error.message
            print(slug, error.message, flush=True)
    table = {
        "name": name,
        "budget": budget,
        "seeds": list(range(seeds)),
        "accuracy": rows,
        "left_out": left_out,
        "seconds": round(time.perf_counter() - begun, 1),
        "date": date.today().isoformat(),
    }
    path = RESULTS / "tables" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n")


def compared(kind: MethodClass) -> bool:
    """Whether a method trains a classifier, on a batch at a time."""
    return issubclass(kind, Method) and kind.card.task == "classification"


def _digits() -> tuple[str, Accuracy]:
    def accuracy(slug: str, seed: int) -> float:
        if slug == TEACHER:
            return float(evaluate(digits.teacher(seed).model, digits.data().validation)["accuracy"])
        return digits.accuracy(slug, seed, **OPTIONS.get(slug, {}))

    return digits.BUDGET, accuracy


def _cifar(folder: Path | None) -> tuple[str, Accuracy]:
    if folder is None:
        raise SystemExit("give --data-dir, the folder that holds cifar10")
    data = open_data(DataSpec(name=f"parquet:{folder / 'cifar10'}", limit=2000, augment=["flip", "crop"]))
    data = DataSplit(data.train, data.validation.select(torch.arange(2000)))
    teachers: dict[int, LiveTeacher] = {}

    def trained(slug: str, seed: int, model: ModelSpec, steps: int, teacher: LiveTeacher | None) -> Any:
        info, kind = data.train.info(), method_class(slug)
        student = build_model(model, info, seed)
        reseed(seed, "method", slug)
        made = kind(kind.Options(**OPTIONS.get(slug, {})), student=student, teacher=teacher, data=info)
        assert isinstance(made, Method)
        spec = TrainSpec(steps=steps, batch_size=64, optimizer=OptimizerSpec(lr=3e-3, weight_decay=1e-4))
        return Trainer(made, Loader(data.train, 64, seed), spec, steps=steps, items=info.items, seed=seed).fit()

    def accuracy(slug: str, seed: int) -> float:
        if seed not in teachers:
            model = ModelSpec(name="convnet", arguments={"width": 24, "depth": 3})
            teachers[seed] = LiveTeacher(trained("supervised", 1000 + seed, model, 300, None))
        if slug == TEACHER:
            return float(evaluate(teachers[seed].model, data.validation)["accuracy"])
        small = ModelSpec(name="convnet", arguments={"width": 8, "depth": 3})
        teacher = teachers[seed] if "teacher" in method_class(slug).card.needs else None
        return float(evaluate(trained(slug, seed, small, 200, teacher), data.validation)["accuracy"])

    return (
        "200 steps of 64 of 2,000 images of CIFAR-10 with flips and crops, AdamW at 3e-3, cosine; ConvNet of width 8 "
        "from width 24 (300 steps); measured on 2,000 test images",
        accuracy,
    )


if __name__ == "__main__":
    cyclopts.run(main)
