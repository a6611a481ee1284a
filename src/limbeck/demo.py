"""The demo: from nothing to a table and a report, on real data that come with the installation.

Each family of methods has one part: a function that runs its recipes, and the panels that it adds to the report.
Figures of a new kind join the table through `report.figures.FIGURES`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core import interrupt
from limbeck.core.errors import Interrupted, UsageError
from limbeck.core.progress import progress
from limbeck.core.recipe import load_recipe
from limbeck.core.run import Run
from limbeck.core.trackers import Watch
from limbeck.report.figures import FIGURES, shown_figures
from limbeck.report.headline import Headline, headline
from limbeck.report.page import write_story
from limbeck.report.panels import standard_panels
from limbeck.report.provenance import differences
from limbeck.report.story import Story

if TYPE_CHECKING:
    from limbeck.report.panels import Panel

Overrides = dict[str, Any]
MOST_SEEDS = 100


@dataclass(frozen=True)
class Part:
    """One family's part of the demo.

    Attributes:
        run: makes or continues the family's runs under a folder, for so many seeds, quickly or in full, telling a
            watcher of each row of metrics; returns the runs.
        panels: sections that the family adds to the report.
    """

    run: Callable[[Path, int, bool, Watch], list[Run]]
    panels: tuple["Panel", ...] = ()


@dataclass(frozen=True)
class Demonstration:
    """What the demo has to show.

    Attributes:
        story: the runs, read.
        report: the page that shows them.
    """

    story: Story
    report: Path

    @property
    def headlines(self) -> list[Headline]:
        """What came out, one for each family."""
        return [headline(self.story, group) for group in self.story.groups]

    def table(self, without: Sequence[str] = ("cross_entropy",)) -> tuple[list[str], list[list[str]]]:
        """The headline table as a heading and rows of text, one row a stage; `without` leaves out figures by key."""
        series = [one for one in self.story.series if one.figures]
        cells = {key: row for key, row in shown_figures(self.story, series).items() if key not in without}
        header = ["Stage", *(FIGURES[key].title for key in cells)]
        return header, [[one.label, *(row[n] for row in cells.values())] for n, one in enumerate(series)]


def demonstrate(out: Path | str, seeds: int = 3, *, quick: bool = False, quiet: bool = False) -> Demonstration:
    """Runs every part of the demo, or continues it where it stopped, and writes `report.html`.

    Args:
        out: folder of the demo; each run has a folder of its own in it.
        seeds: how often each recipe is run, from seed 0 on.
        quick: a few steps only: to see that everything works, not how well.
        quiet: show no progress.

    Raises:
        UsageError: `seeds` is out of range, or `out` holds a demo of the other length.
        Interrupted: a signal arrived; the same call continues.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds must be between 1 and {MOST_SEEDS}, not {seeds}", "three give an interval")
    folder = Path(out)
    try:
        with interrupt.interruptible(), ExitStack() as stack:
            watch: Watch = (lambda stage, steps, row: None) if quiet else stack.enter_context(progress())
            runs = [run for part in PARTS for run in part.run(folder, seeds, quick, watch)]
            interrupt.pause("the runs are done; the report is not written yet")
    except Interrupted as error:
        more = (f" --seeds {seeds}" if seeds != 3 else "") + (" --quick" if quick else "")
        raise Interrupted(error.message, f"continue with: limbeck demo --out {folder}{more}") from error
    # What sets the parts' recipes apart is everything: that panel is for recipes that are variations of one.
    panels = [panel for panel in standard_panels() if panel is not differences]
    panels += [panel for part in PARTS for panel in part.panels]
    story = Story.of(runs)
    return Demonstration(story, write_story(story, folder / "report.html", title="limbeck demo", panels=panels))


def classifier(out: Path, seeds: int, quick: bool, watch: Watch) -> list[Run]:
    """A small network learns digits alone, and from a larger one, which is trained anew for every seed."""
    overrides: Overrides = {}
    if quick:
        for stage, steps in {"teacher": 60, "alone": 100, "distilled": 100}.items():
            overrides |= {f"{stage}.train.steps": steps, f"{stage}.train.evaluate_every": 20}
    digits = out / "digits"
    return [
        run_seed("demo", digits / f"seed-{seed}", seed, overrides, watch, f"digits, seed {seed},")
        for seed in range(seeds)
    ]


def language_model(out: Path, seeds: int, quick: bool, watch: Watch) -> list[Run]:
    """A small language model learns Python's documentation alone, and from a larger one; a single seed."""
    if any(find_spec(package) is None for package in ("transformers", "tokenizers")):
        warnings.warn("the language part is left out: pip install 'limbeck[language]' brings it", stacklevel=2)
        return []
    overrides: Overrides = {}
    if quick:
        for stage in ("teacher", "alone", "distilled"):
            overrides |= {f"{stage}.train.steps": 8, f"{stage}.train.evaluate_every": 8}
        overrides["data.limit"] = 256
    return [run_seed("demo-language", out / "language", 0, overrides, watch, "language,")]


def generator(out: Path, seeds: int, quick: bool, watch: Watch) -> list[Run]:
    """A diffusion model of digits learns to draw in four steps, two and one what took fifty; a single seed."""
    overrides: Overrides = {}
    if quick:
        overrides = {f"{stage}.train.steps": 60 for stage in ("teacher", "four", "two", "one")}
    return [run_seed("demo-diffusion", out / "diffusion", 0, overrides, watch, "diffusion,")]


def data_set(out: Path, seeds: int, quick: bool, watch: Watch) -> list[Run]:
    """The digits themselves, distilled into ten images a class; a single seed."""
    overrides: Overrides = {"distil.train.steps": 10} if quick else {}
    return [run_seed("demo-dataset", out / "dataset", 0, overrides, watch, "data set,")]


def run_seed(recipe: str, folder: Path, seed: int, overrides: Overrides, watch: Watch, label: str) -> Run:
    """Runs a shipped recipe with one seed into a folder, or continues it there; `label` names it in the progress.

    Raises:
        UsageError: the folder holds a run of another recipe.
        Interrupted: a signal arrived; a checkpoint is on disk.
    """
    interrupt.pause(f"{label} has not begun")
    resolved = load_recipe(recipe, {**overrides, "seed": seed})
    try:
        run = Run.create(folder, resolved, resume=True)
    except UsageError as error:
        hint = "choose another folder with --out; a demo that was begun with or without --quick goes on in the same way"
        raise UsageError(error.message, hint) from error
    from limbeck.experiment import Experiment  # imports torch: only once it is known that there is something to do

    def labelled(stage: str, steps: int, row: dict[str, Any]) -> None:
        watch(f"{label} {stage}", steps, row)

    with _one_thread():
        return Experiment(resolved, run, watch=labelled).execute()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine lose minutes to its waiting."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


PARTS: list[Part] = [Part(classifier), Part(language_model), Part(generator), Part(data_set)]
"""The parts of the demo, in order."""
