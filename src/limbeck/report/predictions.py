"""What the finished stages of a run say about validation items: for pictures, confusion and agreement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import LimbeckError
from limbeck.core.registry import method_class
from limbeck.core.run import Run
from limbeck.core.specs import Recipe, StageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.data.source import ImageSource

_MOST_ITEMS = 2000
_MOST_PARAMETERS = 200_000_000
_MOST_FLOPS = 5e11  # some ten seconds on two cores
EXTERNAL = "teacher (given)"
"""Name of a teacher that is no stage of the run; no stage can be called so."""


class NothingToShow(Exception):
    """A panel has nothing to show; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Predictions:
    """Class probabilities for validation items.

    Attributes:
        source: the validation data.
        rows: numbers of the items in it (items,).
        probabilities: by stage, in order (items, classes).
    """

    source: "ImageSource"
    rows: "Tensor"
    probabilities: Mapping[str, "Tensor"]

    @property
    def complete(self) -> bool:
        """Whether these are all validation items."""
        return len(self.rows) == len(self.source)

    @property
    def labels(self) -> "Tensor":
        """The items' classes (items,), -100 for none."""
        return self.source.labels[self.rows]

    @property
    def names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.source.class_names

    def image(self, item: int) -> "Tensor":
        """An item's image (channels, height, width), float32 in [0, 1]."""
        image = self.source.images(self.rows[item : item + 1])[0]
        return image.float() / 255 if not image.is_floating_point() else image.float().clamp(0, 1)

    def best(self, stage: str) -> "Tensor":
        """The most probable class of each item (items,)."""
        return self.probabilities[stage].argmax(-1)

    def wrong(self, stage: str) -> "Tensor":
        """Which labelled items a stage gets wrong (items,)."""
        return (self.best(stage) != self.labels) & (self.labels >= 0)


def predict(run: Run, recipe: Recipe, results: Mapping[str, Mapping[str, Any]], student: StageSpec) -> Predictions:
    """Runs the results of a run's stages, and a teacher from elsewhere, on up to 2,000 evenly spaced validation items.

    For costly models they are fewer.

    Raises:
        NothingToShow: the data or models cannot be opened here, are too large, or are no classifiers of images.
    """
    if not results:
        raise NothingToShow("no stage is finished")
    if sum(figures.get("parameters", 0) for figures in results.values()) > _MOST_PARAMETERS:
        raise NothingToShow("the models are too large to be run for a report")
    import torch

    try:
        source = _validation(recipe)
        cost = sum(figures.get("flops", 0) for figures in results.values())
        items = min(len(source), _MOST_ITEMS, max(10, int(_MOST_FLOPS / max(cost, 1))))
        rows = torch.linspace(0, len(source) - 1, items).round().long()
        models = _models(run, recipe, results, student, source)
        said = {name: _probabilities(model, source, rows) for name, model in models.items()}
        said = {name: found for name, found in said.items() if found.shape == (len(rows), source.classes)}
        if not said:
            raise NothingToShow("the models are no classifiers of these data")
        return Predictions(source, rows, said)
    except (LimbeckError, OSError, RuntimeError) as error:
        reason = error.message if isinstance(error, LimbeckError) else str(error).splitlines()[0]
        raise NothingToShow(f"the data or models cannot be opened here ({reason})") from error


def _validation(recipe: Recipe) -> "ImageSource":
    from limbeck.data.names import is_text
    from limbeck.data.open import open_data
    from limbeck.data.source import ImageSource

    source = None if is_text(recipe.data) else open_data(recipe.data).validation
    if not isinstance(source, ImageSource) or not source.classes:
        raise NothingToShow("the data hold no images with classes")
    return source


def _models(
    run: Run, recipe: Recipe, results: Mapping[str, Any], student: StageSpec, source: "ImageSource"
) -> "dict[str, nn.Module]":
    from limbeck.models.build import build_model
    from limbeck.models.saved import load_model

    names = [stage.name for stage in recipe.stages if stage.name in results and is_classifier(stage)]
    if not names:
        raise NothingToShow("the models are no classifiers of these data")
    models = {name: load_model(run.stage_result(name)) for name in names}
    elsewhere = [teacher for teacher in student.teacher if not teacher.name.startswith(("stage:", "object:"))]
    if len(student.teacher) == 1 and elsewhere:
        models = {EXTERNAL: build_model(elsewhere[0], source.info(), recipe.seed)} | models
    return models


def is_classifier(stage: StageSpec) -> bool:
    """Whether a stage's result tells classes apart, by its method."""
    """Whether a stage's result says classes."""
    return method_class(stage.method).card.task == "classification"


def _probabilities(model: "nn.Module", source: "ImageSource", rows: "Tensor") -> "Tensor":
    import torch

    from limbeck.core.call import call, logits_of
    from limbeck.models.modes import evaluating
    from limbeck.models.normalisation import normalisation_of

    wanted = normalisation_of(model)
    if wanted is not None:
        source.set_normalisation(*wanted)
    with evaluating(model):
        parts = [logits_of(call(model, source.fetch(part))).float().softmax(-1) for part in rows.split(256)]
    return torch.cat(parts)
