"""What a report tells of: runs, read once and never written, in groups that differ in their seeds alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from limbeck.core.run import Run
from limbeck.core.specs import Recipe, StageSpec
from limbeck.report.predictions import NothingToShow, Predictions, predict

Row = Mapping[str, Any]
_LONGEST_NAME = 40

TEACHER, ALONE, STUDENT, FIRST_OTHER, COLOURS = 0, 1, 2, 3, 8
"""Numbers of the page's colours: those of the three leading roles, the first of the others, and how many there are."""


@dataclass(frozen=True)
class RunView:
    """A run as it lay on disk when the report was made."""

    run: Run
    recipe: Recipe
    results: Mapping[str, Row]
    rows: Sequence[Row]
    status: Row

    @classmethod
    def read(cls, run: Run | Path) -> "RunView":
        """Reads a run.

        Raises:
            UsageError: there is none.
            DamagedFileError: its recipe or results cannot be read.
        """
        opened = run if isinstance(run, Run) else Run.open(run)
        return cls(opened, opened.recipe(), opened.results(), opened.metrics(), opened.status())

    @property
    def done(self) -> bool:
        """Whether every stage has its figures."""
        return all(stage.name in self.results for stage in self.recipe.stages)


@dataclass(frozen=True)
class Cast:
    """Who is who among the stages of a recipe.

    Attributes:
        student: the last stage that has a teacher; the last stage of a recipe without any.
        teacher: the stage whose result teaches it.
        alone: the stage that trains the same network for as long without a teacher.
    """

    student: StageSpec
    teacher: StageSpec | None
    alone: StageSpec | None

    @classmethod
    def of(cls, recipe: Recipe) -> "Cast":
        """Finds the roles of a recipe's stages."""
        taught = [stage for stage in recipe.stages if stage.teacher]
        student = taught[-1] if taught else recipe.stages[-1]
        teachers = {model.name.partition(":")[2] for model in student.teacher if model.name.startswith("stage:")}
        teacher = next((stage for stage in recipe.stages if stage.name in teachers), None)
        alike = (s for s in recipe.stages if s.student == student.student and s.train == student.train)
        alone = next((stage for stage in alike if not stage.teacher and stage not in (student, teacher)), None)
        return cls(student, teacher, alone)


@dataclass(frozen=True)
class Series:
    """One stage of one group of runs: a row of the tables, a colour of the charts."""

    group: "Group"
    stage: StageSpec
    colour: int
    label: str

    @property
    def figures(self) -> list[Row]:
        """The stage's figures in every run that finished it, by ascending seed."""
        return [view.results[self.stage.name] for view in self.group.views if self.stage.name in view.results]

    def values(self, key: str) -> list[float]:
        """One figure in every run that has it."""
        return [figures[key] for figures in self.figures if isinstance(figures.get(key), int | float)]

    def rows(self, view: RunView) -> list[Row]:
        """A run's rows of metrics of this stage."""
        return [row for row in view.rows if row["stage"] == self.stage.name]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in their seeds alone, by ascending seed."""

    name: str
    views: list[RunView]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the first run's seed."""
        return self.views[0].recipe

    @cached_property
    def cast(self) -> Cast:
        """The roles of its stages."""
        return Cast.of(self.recipe)


@dataclass
class Story:
    """All that the panels show.

    Args:
        groups: the runs.
        predictions: what stages said about validation items, by run folder; filled when first asked for.
    """

    groups: list[Group]
    _predictions: dict[Path, Predictions | str] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Run | Path]) -> "Story":
        """Reads runs and sorts them into groups.

        Raises:
            UsageError, DamagedFileError: see `RunView.read`.
        """
        groups: dict[str, list[RunView]] = {}
        for view in map(RunView.read, runs):
            groups.setdefault(view.recipe.model_copy(update={"seed": 0}).model_dump_json(), []).append(view)
        named: dict[str, Group] = {}
        for views in groups.values():
            name = _free(_name(views), named)
            named[name] = Group(name, sorted(views, key=lambda view: view.recipe.seed))
        return cls(list(named.values()))

    @property
    def views(self) -> list[RunView]:
        """All runs."""
        return [view for group in self.groups for view in group.views]

    @cached_property
    def series(self) -> list[Series]:
        """Every stage of every group, in order, each in its colour."""
        found: list[Series] = []
        for number, group in enumerate(self.groups):
            cast = group.cast
            roles = {cast.student.name: STUDENT}
            roles |= {cast.teacher.name: TEACHER} if cast.teacher else {}
            roles |= {cast.alone.name: ALONE} if cast.alone else {}
            for stage in group.recipe.stages:
                others = sum(series.colour >= FIRST_OTHER for series in found)
                colour = roles.get(stage.name) if number == 0 else None
                if colour is None:
                    colour = FIRST_OTHER + others % (COLOURS - FIRST_OTHER)
                label = stage.name if len(self.groups) == 1 else f"{group.name}: {stage.name}"
                found.append(Series(group, stage, colour, label))
        return found

    def one(self, group: Group, stage: StageSpec | None) -> Series | None:
        """The series of a stage of a group."""
        return next((series for series in self.series if series.group is group and series.stage == stage), None)

    def predictions(self, view: RunView) -> Predictions:
        """What a run's finished stages say about its validation items.

        Raises:
            NothingToShow: its data or models cannot be opened here, or are no classifiers of images.
        """
        key = view.run.folder
        if key not in self._predictions:
            try:
                self._predictions[key] = predict(view.run, view.recipe, view.results, Cast.of(view.recipe).student)
            except NothingToShow as reason:
                self._predictions[key] = str(reason)
        found = self._predictions[key]
        if isinstance(found, str):
            raise NothingToShow(found)
        return found

    def agreement(self, series: Series) -> float | None:
        """Share of validation items on which a stage and the group's teacher agree, the mean over runs.

        A stage's own figures know it only of the teacher that it was trained with.
        """
        teacher = series.group.cast.teacher
        if teacher is None or series.stage == teacher:
            return None
        recorded = series.values("agreement")
        if recorded:
            return mean(recorded)
        if len(series.group.views) > 20:
            return None  # loading so many models would take longer than the report is worth
        shares = []
        for view in series.group.views:
            try:
                found = self.predictions(view)
            except NothingToShow:
                continue
            if found.complete and {series.stage.name, teacher.name} <= found.probabilities.keys():
                same = found.best(series.stage.name) == found.best(teacher.name)
                shares.append(float(same.float().mean()))
        return mean(shares) if shares else None


def _name(views: Sequence[RunView]) -> str:
    """A group's name: its run's folder, or for runs side by side the folder around them."""
    folders = [view.run.folder.resolve() for view in views]
    beside = len({folder.parent for folder in folders}) == 1 and (
        len(folders) > 1 or folders[0].name.startswith("seed-")
    )
    name = (folders[0].parent.name if beside else "") or folders[0].name or "run"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 + 1 :]}"


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number, wanted = 1, name
    while wanted in taken:
        number += 1
        wanted = f"{name} ({number})"
    return wanted
