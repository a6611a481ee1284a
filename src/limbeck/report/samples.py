"""What the generators of a run draw from the same noise, side by side, with what a sample costs; and its scenes, seen
from all sides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import LimbeckError
from limbeck.core.registry import method_class
from limbeck.report.figures import NONE, counted, duration
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.pictures import data_uri, grid
from limbeck.report.story import RunView, Story

if TYPE_CHECKING:
    from torch import Tensor

_EACH = 40
_COLUMNS = 10
_MOST_PARAMETERS = 200_000_000


@dataclass(frozen=True)
class Gallery:
    """One generator at one number of steps.

    Attributes:
        title: whose samples, and in how many steps.
        images: (items, channels, height, width) in [0, 1].
        figures: what was measured at this number of steps.
    """

    title: str
    images: "Tensor"
    figures: dict[str, Any]


def samples(story: Story) -> Section | None:
    """Samples of every stage of the first run that makes images or scenes; None where no run does."""
    for view in story.views:
        made = {s.name: _task(s.method, view.results[s.name]) for s in view.recipe.stages if s.name in view.results}
        stages = [name for name, task in made.items() if task in ("generation", "scene")]
        if not stages:
            continue
        try:
            looks = {"generation": _galleries, "scene": _views}
            galleries = [one for name in stages for one in looks[made[name]](view, name)]
        except (LimbeckError, OSError, RuntimeError, ValueError) as error:
            reason = error.message if isinstance(error, LimbeckError) else str(error).partition("\n")[0]
            return Section("samples", "What they draw", "", fill("<p class='quiet'>No samples: {}.</p>", reason))
        lead = (
            f"Run {view.run.folder.name}, seed {view.recipe.seed}. All start from the same noise, one class a column "
            "where there are classes. Distances are to the validation data; evaluations are of the network, for each "
            "sample. Scenes are shown once around."
        )
        body = fill("<div class='samples'>{}</div>", join(map(_shown, galleries)))
        return Section("samples", "What they draw", lead, body)
    return None


def _task(method: str, figures: Mapping[str, Any]) -> str:
    """What a stage's result does; of a method for any task its figures tell."""
    try:
        task = method_class(method).card.task
    except LimbeckError:
        return ""
    return "generation" if task == "any" and "seconds_per_sample" in figures else task


def _views(view: RunView, stage: str) -> list[Gallery]:
    """A stage's scene from evenly spaced directions."""
    from limbeck.models.saved import load_model
    from limbeck.rendering.scene import Scene
    from limbeck.showing import show_scene

    scene = load_model(view.run.stage_result(stage))
    if not isinstance(scene, Scene):
        raise ValueError("the result is no scene")
    return [Gallery(f"{stage}, once around", show_scene(scene, _COLUMNS), dict(view.results[stage]))]


def _galleries(view: RunView, stage: str) -> list[Gallery]:
    """A stage's samples at its own number of steps, and at the others that were measured."""
    from limbeck.core.run import Run
    from limbeck.models.saved import load_model
    from limbeck.sampling import draw

    figures = dict(view.results[stage])
    if figures.get("parameters", 0) > _MOST_PARAMETERS:
        raise ValueError("the models are too large to be run for a report")
    by_steps = figures.get("by_steps") or {}
    model = load_model(view.run.stage_result(stage)).eval()
    asked: list[int | None] = [int(steps) for steps in by_steps]
    if _steps_of(model) not in asked:
        asked.append(None)
    made = []
    for steps in asked:
        images = draw(model, Run.open(view.run.folder), _EACH, steps=steps)
        own = figures if steps is None else by_steps[str(steps)]
        number = steps or _steps_of(model)
        made.append(Gallery(f"{stage}, {counted(number, 'step')}", images, own))
    return made


def _steps_of(model: Any) -> int:
    from limbeck.diffusion.denoiser import process_of

    process = process_of(model)
    return process.sampling.steps if process is not None else 1


def _shown(gallery: Gallery) -> Html:
    known = gallery.figures
    said = [
        f"Fréchet distance {known['frechet']:.2f}" if "frechet" in known else "",
        f"sliced Wasserstein {known['sliced_wasserstein']:.3f}" if "sliced_wasserstein" in known else "",
        f"{100 * known['judged']:.0f}\N{NO-BREAK SPACE}% seen as asked" if "judged" in known else "",
        counted(known["evaluations"], "evaluation") if "evaluations" in known else "",
        f"{duration(known['seconds_per_sample'])} a sample" if "seconds_per_sample" in known else "",
    ]
    picture = grid(gallery.images, _COLUMNS)
    return fill(
        "<figure><img src='{}' alt='{}'><figcaption><b>{}</b>: {}</figcaption></figure>",
        data_uri(picture, longest=None),
        f"samples of {gallery.title}",
        gallery.title,
        ", ".join(filter(None, said)) or NONE,
    )
