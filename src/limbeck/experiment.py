"""Running a recipe: data, then each stage's models, method and training, then figures and the student in its format."""

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from limbeck.core import interrupt
from limbeck.core.distributed import World
from limbeck.core.durable import commit_folder, verify_folder
from limbeck.core.errors import DamagedFileError, IncompatibleError, Interrupted, LimbeckError
from limbeck.core.explain import explain
from limbeck.core.method import DataInfo, Method, Procedure, ProcedureContext
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.run import Run
from limbeck.core.specs import Recipe, StageSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Teacher
from limbeck.core.trainer import Trainer
from limbeck.data.cache.writer import fill_cache
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.metrics.tasks import details_for, evaluate_for
from limbeck.modality import (
    adaptation,
    begin_student,
    check_task,
    data_of_set,
    normalisation_of_data,
    normalise,
    note_inputs,
    preferred_normalisation,
)
from limbeck.models.build import build_model
from limbeck.models.describe import count_flops, count_parameters, latency
from limbeck.models.names import parse_model_name
from limbeck.models.normalisation import normalisation_of
from limbeck.models.saved import load_model, save_model
from limbeck.models.structure import share_frozen
from limbeck.search.space import with_arguments
from limbeck.teachers.cached import CachedTeacher
from limbeck.teachers.served import build_served
from limbeck.teachers.staged import micro_batch, open_cache, stages_used, views_for

Row = dict[str, Any]


@dataclass
class Experiment:
    """A recipe on its way to results.

    Args:
        recipe: what to do.
        run: where it is written.
        data: training and validation data, in place of those that the recipe names.
        objects: models given as Python objects, by `stage.student` or `stage.teacher`, in place of the recipe's; of
            several teachers a list, with None for those that the recipe names.
        watch: receives (stage, steps in all, row) for each row of metrics; the progress bar.
    """

    recipe: Recipe
    run: Run
    data: DataSplit | None = None
    objects: Mapping[str, Any] = field(default_factory=dict)
    watch: Callable[[str, int, Row], None] = lambda stage, steps, row: None

    def __post_init__(self) -> None:
        self.options = {stage.name: parse_options(stage) for stage in self.recipe.stages}  # all, before any work
        self.world = World()
        self.results: dict[str, nn.Module] = {}

    def execute(self) -> Run:
        """Runs every stage that is not done yet, and leaves the last one's result in `student/`.

        Raises:
            Interrupted: a signal arrived; the run can be resumed.
        """
        with interrupt.interruptible(), self._writing():
            try:
                self._set_status("running")
                for stage in self.recipe.stages:
                    self._pause(f"stage '{stage.name}' has not begun")
                    finished = self._finished(stage)
                    self.results[stage.name] = self._run_stage(stage) if finished is None else finished
                self._save(self.results[self.recipe.stages[-1].name], self.run.student)
                self._set_status("done")
            except (Interrupted, KeyboardInterrupt):
                self._set_last_status("interrupted")
                raise
            except Exception as error:
                message = error.message if isinstance(error, LimbeckError) else repr(error)
                self._set_last_status("failed", error=message)
                raise
        return self.run

    def prepare(self, stage: StageSpec, *, trained: bool = False, cached: bool = True) -> "Prepared":
        """A stage's data, models and method, ready to train; earlier stages' results must be there.

        Args:
            stage: one of the recipe's.
            trained: whether these results are the real ones, and not rehearsed: a cache of theirs is for no other.
            cached: read the teacher from its cache where the stage has one.
        """
        data, info, student = self._inputs(stage)
        teacher = self._teacher_or_cache(stage, data, info, trained) if cached else self._teacher(stage, data, info)
        self._share_backbone(stage, student, teacher)
        reseed(self.recipe.seed, "method", stage.method)
        kind = method_class(stage.method)
        method = kind(self.options[stage.name], student=student, teacher=teacher, data=data.train.info())
        return Prepared(data, data.train.info(), student, teacher, method)

    def fill_cache(self, stage: StageSpec, report: Callable[[int, int], None]) -> None:
        """Stores what a stage's teacher says; earlier stages' results must be there.

        Args:
            stage: one of the recipe's, with a cache.
            report: receives (rows there, rows in all).

        Raises:
            UsageError: the folder holds another cache, or the teacher does not give what is to be stored.
        """
        assert stage.cache is not None
        data, info, _ = self._inputs(stage)
        teacher = self._teacher(stage, data, info)
        assert teacher is not None
        fill_cache(
            stage.cache.folder,
            teacher,
            views_for(stage, data.train, self.recipe.seed),
            stage.cache,
            batch_size=micro_batch(stage, self.world.size),
            device=self.world.device,
            report=report,
            pause=interrupt.pause,
        )

    def _inputs(self, stage: StageSpec) -> tuple[DataSplit, DataInfo, nn.Module]:
        """A stage's data, what is known of them, and its student, fitted to each other."""
        data = self._data()
        if stage.data is not None:
            data = data_of_set(self.results[stage.data.partition(":")[2]], data, f"{stage.name}.data")
        info = data.train.info()
        check_task(method_class(stage.method).card, info, stage.name)
        student = self.objects.get(f"{stage.name}.student") or self._model(stage, "student", 0, info)
        # Images are normalised for the student; teachers that want another normalisation convert from it.
        usual = preferred_normalisation(method_class(stage.method).card, student, self.normalisation)
        wanted = self.normalisation if self.recipe.data.mean else normalisation_of(student) or usual
        for source in (data.train, data.validation):
            normalise(source, wanted)
        begin_student(student, data.train, self.recipe.seed)
        return data, info, student

    def trainer(self, stage: StageSpec, prepared: "Prepared", record: Callable[[Row], None]) -> Trainer:
        """The trainer of a prepared stage."""
        assert stage.train is not None
        assert isinstance(prepared.method, Method)
        items, spec = prepared.info.items, stage.train
        loader = Loader(
            prepared.data.train,
            spec.batch_size,
            self.recipe.seed,
            rank=self.world.rank,
            world=self.world.size,
            accumulate=spec.accumulate,
            workers=self.recipe.data.workers,
        )
        return Trainer(
            prepared.method,
            loader,
            spec,
            steps=spec.total_steps(items),
            items=items,
            seed=self.recipe.seed,
            checkpoints=self.run.checkpoints(stage.name, spec.keep_checkpoints),
            record=record,
            evaluate=lambda model: evaluate_for(prepared.method.card.task)(
                model, prepared.data.validation, pause=self._pause_alone
            ),
            world=self.world,
        )

    def _data(self) -> DataSplit:
        if not hasattr(self, "normalisation"):
            self.data = self.data or open_data(self.recipe.data)
            self.normalisation = normalisation_of_data(self.data.train)
        assert self.data is not None
        return self.data

    def _run_stage(self, stage: StageSpec) -> nn.Module:
        prepared = self.prepare(stage, trained=True)
        begun = time.perf_counter()
        if isinstance(prepared.method, Procedure):
            result, seconds = self._run_procedure(stage, prepared), {}
        else:
            steps = stage.train.total_steps(prepared.info.items) if stage.train else 0
            trainer = self.trainer(stage, prepared, lambda row: self._record(stage.name, steps, row))
            result = trainer.fit()
            seconds = dict(trainer.seconds)
        self._pause("training is done; its result is not measured yet")
        figures = self._measure(result, prepared, self._judge(stage, prepared))
        figures["seconds"] = sum(seconds.values()) or time.perf_counter() - begun
        figures["phases"] = seconds
        figures |= prepared.method.figures()
        note_inputs(result, prepared.data.train)
        self._save(result, self.run.stage_result(stage.name))
        if self.world.main:
            self.run.add_result(stage.name, figures)
        self.world.barrier()
        return result

    def _run_procedure(self, stage: StageSpec, prepared: "Prepared") -> nn.Module:
        directory = self.run.folder / "checkpoints" / stage.name
        directory.mkdir(parents=True, exist_ok=True)
        context = ProcedureContext(
            source=prepared.data.train,
            directory=directory,
            seed=self.recipe.seed,
            log=lambda row: self._record(stage.name, 0, row),
            pause=interrupt.pause,
            build=lambda arguments, seed: self._variant(stage, prepared.info, arguments, seed),
        )
        assert isinstance(prepared.method, Procedure)
        return prepared.method.run(context)

    def _variant(self, stage: StageSpec, info: DataInfo, arguments: Mapping[str, Any], seed: int | None) -> nn.Module:
        """A stage's student with other arguments and fresh weights."""
        key = f"{stage.name}.student"
        if key in self.objects and not arguments:
            return copy.deepcopy(self.objects[key])
        if key in self.objects or (
            arguments and parse_model_name(stage.student.name).kind in ("stage", "run", "folder")
        ):
            raise IncompatibleError(f"{key} cannot be built with other arguments", "name a network, such as convnet")
        changes: Row = {"arguments": with_arguments(stage.student.arguments, arguments)}
        spec = stage.student.model_copy(update=changes if seed is None else {**changes, "seed": None})
        return build_model(spec, info, self.recipe.seed if seed is None else seed, stages=self.results, key=key)

    def _measure(self, result: nn.Module, prepared: "Prepared", teacher: Teacher | None) -> Row:
        example = prepared.info.example.to(self.world.device)
        measure = evaluate_for(prepared.method.card.task)
        figures: Row = dict(measure(result, prepared.data.validation, teacher=teacher, pause=self._pause_alone))
        figures |= details_for(
            prepared.method.card.task, result, prepared.data.validation, self._pause_alone, prepared.data.train
        )
        figures["parameters"] = count_parameters(result)
        figures["flops"] = count_flops(result, example.select(slice(0, 1)))
        figures["latency"] = latency(result, example.select(slice(0, 1)))
        return figures

    def _teacher(self, stage: StageSpec, data: DataSplit, info: DataInfo) -> Teacher | None:
        given = self.objects.get(f"{stage.name}.teacher") or [None] * len(stage.teacher)
        given = given if isinstance(given, list) else [given]
        models = (self._model(stage, "teacher", n, info) if one is None else one for n, one in enumerate(given))
        # What is no module is a teacher of the caller's own making, and taken as it is.
        teachers = [LiveTeacher(m, adaptation(m, data.train)) if isinstance(m, nn.Module) else m for m in models]
        if len(teachers) > 1:
            return Ensemble(teachers)
        return teachers[0] if teachers else None

    def _teacher_or_cache(self, stage: StageSpec, data: DataSplit, info: DataInfo, trained: bool) -> Teacher | None:
        if stage.cache is None or (not trained and stages_used(stage)):
            return self._teacher(stage, data, info)
        live = self._teacher(stage, data, info) if stage.cache.check_teacher else None
        return open_cache(stage, data.train, self.recipe.seed, live)

    def _judge(self, stage: StageSpec, prepared: "Prepared") -> Teacher | None:
        """Whom the result is compared with on the validation data, of which a cache knows nothing."""
        if not isinstance(prepared.teacher, CachedTeacher):
            return prepared.teacher
        if stage.cache is None or not stage.cache.check_teacher:
            return None
        return self._teacher(stage, prepared.data, prepared.info)

    def _share_backbone(self, stage: StageSpec, student: nn.Module, teacher: Teacher | None) -> None:
        """Holds what teacher and student have in common once: frozen weights under adapters, of the recipe's models."""
        if self.world.sharded or {f"{stage.name}.student", f"{stage.name}.teacher"} & self.objects.keys():
            return
        for one in teacher.teachers if isinstance(teacher, Ensemble) else [teacher]:
            if isinstance(one, LiveTeacher):
                share_frozen(student, one.model)

    def _model(self, stage: StageSpec, part: str, index: int, info: DataInfo) -> Any:
        spec = stage.student if part == "student" else stage.teacher[index]
        if part == "teacher" and parse_model_name(spec.name).kind == "served":
            return build_served(spec, info, f"{stage.name}.{part}")
        return build_model(spec, info, self.recipe.seed, stages=self.results, key=f"{stage.name}.{part}")

    def _finished(self, stage: StageSpec) -> nn.Module | None:
        """The stored result of a stage that an earlier execution finished."""
        if stage.name not in self.run.results():
            return None
        folder = self.run.stage_result(stage.name)
        try:
            verify_folder(folder)
        except DamagedFileError as error:
            if not self.run.checkpoints(stage.name, 1).steps():
                raise
            warnings.warn(f"{error.message}; making it again from the stage's last checkpoint", stacklevel=2)
            return None
        return load_model(folder, self.objects.get(f"{stage.name}.student"))

    def _save(self, model: nn.Module, folder: Path) -> None:
        if self.world.main:
            folder.parent.mkdir(parents=True, exist_ok=True)
            commit_folder(folder, lambda target: save_model(model, target))

    def _record(self, stage: str, steps: int, row: Row) -> None:
        self.run.record(stage, row)
        self.watch(stage, steps, row)

    def _pause(self, message: str) -> None:
        """A safe point that all processes reach: a signal to any of them stops them all."""
        if self.world.any(interrupt.requested()):
            raise interrupt.interruption(message)

    def _pause_alone(self) -> None:
        """A safe point that each process reaches in its own time: there one must not stop and let the others wait."""
        if self.world.size == 1:
            interrupt.pause("nothing after the last step is lost")

    def _set_status(self, status: str, **more: Any) -> None:
        if self.world.main:
            self.run.set_status(status, **more)

    def _set_last_status(self, status: str, **more: Any) -> None:
        with contextlib.suppress(OSError, LimbeckError):  # a full disk must not hide why the work ended
            self._set_status(status, **more)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self.run.writing() if self.world.main else contextlib.nullcontext():
            yield


@dataclass(frozen=True)
class Prepared:
    """What one stage works with."""

    data: DataSplit
    info: DataInfo
    student: nn.Module
    teacher: Teacher | None
    method: Method | Procedure


def parse_options(stage: StageSpec) -> OptionsBase:
    """A stage's options as its method's own type.

    Raises:
        RecipeError: an option is unknown, of the wrong type or out of range.
    """
    kind = method_class(stage.method)
    try:
        return kind.Options.model_validate(stage.options)
    except ValidationError as error:
        raise explain(error, kind.Options, f"{stage.name}.options") from None
