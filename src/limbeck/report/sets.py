"""The images of the synthetic sets of a run, and what networks learn from them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import LimbeckError
from limbeck.core.registry import method_class
from limbeck.report.figures import percent
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.pictures import data_uri, grid
from limbeck.report.story import RunView, Story

if TYPE_CHECKING:
    from limbeck.synthesis.synthetic_set import SyntheticSet

_COLUMNS = 10
"""Classes, and images of each, at most."""

_LEAD = (
    "Run {}, seed {}. One row a class, of at most ten. Accuracies are means over fresh networks that were all trained "
    "in the same way, on these images or on what is named."
)


def sets(story: Story) -> Section | None:
    """Every synthetic set of the first run that made some; None where no run did."""
    for view in story.views:
        stages = [
            stage.name for stage in view.recipe.stages if _makes_data(stage.method) and stage.name in view.results
        ]
        if not stages:
            continue
        try:
            body = fill("<div class='samples'>{}</div>", join(_shown(view, stage) for stage in stages))
        except (LimbeckError, OSError, RuntimeError, ValueError) as error:
            reason = error.message if isinstance(error, LimbeckError) else str(error).partition("\n")[0]
            return Section("sets", "What was distilled", "", fill("<p class='quiet'>No images: {}.</p>", reason))
        lead = _LEAD.format(view.run.folder.name, view.recipe.seed)
        return Section("sets", "What was distilled", lead, body)
    return None


def _makes_data(method: str) -> bool:
    try:
        return method_class(method).card.task == "dataset"
    except LimbeckError:
        return False


def _shown(view: RunView, stage: str) -> Html:
    from limbeck.core.run import Run
    from limbeck.models.saved import load_model
    from limbeck.showing import chosen_images

    model: Any = load_model(Run.open(view.run.folder).stage_result(stage))
    return fill(
        "<figure><img src='{}' alt='{}'><figcaption><b>{}</b>: {}</figcaption></figure>",
        data_uri(grid(chosen_images(model, _COLUMNS, _COLUMNS), _columns(model)), longest=None),
        f"synthetic images of {stage}",
        stage,
        ", ".join(_said(view.results[stage])),
    )


def _columns(model: "SyntheticSet") -> int:
    return min(_COLUMNS, int(model.hard_labels.bincount().max()))


def _said(figures: Mapping[str, Any]) -> list[str]:
    named = {
        "accuracy": "accuracy",
        "accuracy_plain": "without augmentation",
        "accuracy_hard": "with hard labels",
        "random": "as many real images",
        "full": "all real images",
    }
    said = [f"{title} {percent(figures[key])}" for key, title in named.items() if key in figures]
    by_network = figures.get("by_network", {})
    return said + [f"{name} {percent(value)}" for name, value in list(by_network.items())[1:]]
