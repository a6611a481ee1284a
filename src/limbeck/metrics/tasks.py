"""Which measurement goes with which task."""

from typing import Any, Protocol

from torch import nn

from limbeck.data.text.source import TextSource
from limbeck.diffusion.denoiser import process_of
from limbeck.metrics.classification import evaluate
from limbeck.metrics.generation import evaluate_few_steps, evaluate_generation
from limbeck.metrics.language import evaluate_language
from limbeck.metrics.scene import evaluate_scene
from limbeck.metrics.synthetic import compare_synthetic, evaluate_synthetic


class Evaluate(Protocol):
    """Measures a model on a source, compared with a teacher where there is one; see `metrics.classification`."""

    def __call__(
        self, model: nn.Module, source: Any, *, teacher: Any = None, batch_size: Any = ..., pause: Any = None
    ) -> dict[str, int | float]:
        """The figures by name."""
        ...


def _by_data(
    model: nn.Module, source: Any, *, teacher: Any = None, batch_size: Any = None, pause: Any = None
) -> dict[str, int | float]:
    """Generation by denoisers; else classification where items have classes or are images, language modelling
    where they are running text.
    """
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    if process_of(model) is not None:
        return evaluate_generation(model, source, teacher=teacher, pause=pause, **sizes)
    measure = evaluate_language if isinstance(source, TextSource) and not source.info().classes else evaluate
    return measure(model, source, teacher=teacher, pause=pause, **sizes)


_MEASUREMENTS: dict[str, Evaluate] = {
    "any": _by_data,
    "classification": evaluate,
    "dataset": evaluate_synthetic,
    "generation": evaluate_generation,
    "language-modelling": evaluate_language,
    "scene": evaluate_scene,
}


def evaluate_for(task: str) -> Evaluate:
    """The measurement of a method card's task; tasks without one of their own are measured as classification."""
    return _MEASUREMENTS.get(task, evaluate)


def details_for(task: str, model: nn.Module, source: Any, pause: Any = None, train: Any = None) -> dict[str, Any]:
    """What is measured besides, once a stage is done, by name: generators at other numbers of steps; synthetic sets
    with networks of other kinds, and beside what they were distilled from, the source `train`.
    """
    if task == "dataset":
        return compare_synthetic(model, source, train, pause=pause)
    if task != "generation" and not (task == "any" and process_of(model) is not None):
        return {}
    found = evaluate_few_steps(model, source, pause)
    return {"by_steps": found} if found else {}
