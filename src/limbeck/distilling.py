"""Distilling in one call, with models and data given by name or as Python objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from limbeck.core import catalogue
from limbeck.core.errors import IncompatibleError, RecipeError, UsageError
from limbeck.core.explain import explain
from limbeck.core.specs import Recipe, TrainSpec
from limbeck.running import execute, resolve

if TYPE_CHECKING:
    from torch import nn

    from limbeck.core.run import Run
    from limbeck.core.teacher import Teacher
    from limbeck.core.trackers import Watch
    from limbeck.data.open import DataSplit

STAGE = "distil"
"""Name of the one stage of such a run."""

Plain = Mapping[str, Any]


def distill(
    method: str,
    *,
    student: "nn.Module | str | Plain",
    teacher: "nn.Module | Teacher | str | Plain | Sequence[Any] | None" = None,
    data: Any,
    validation: Any = None,
    out: Path | str,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    options: Plain | None = None,
    track: Sequence[str] = (),
    resume: bool = False,
    quiet: bool = False,
    watch: "Watch | None" = None,
    **train: Any,
) -> "Run":
    """Distils a teacher into a student and returns the run; the student is `limbeck.load(run.folder)`.

    Args:
        method: slug of the method; see `limbeck.list_methods`.
        student: a name as in recipes, `{"name": …, "arguments": …}`, or a module, which is trained in place.
        teacher: the same, or any `Teacher`, or a list of several; modules are frozen and put into eval mode.
        data: a name as in recipes, the mapping of a recipe's `data`, (images, labels) arrays with images
            (items, channels, height, width) as uint8 or floats in [0, 1], a `Source`, or a `DataSplit`.
        validation: data to measure on, as arrays or `Source`; a fifth of `data` is held out if absent.
        out: folder of the run.
        steps: optimizer steps; give either steps or epochs, unless the method does not train.
        epochs: passes over the data.
        seed: seed of everything random.
        options: options of the method.
        track: trackers that receive the metrics too: tensorboard, trackio, wandb, mlflow.
        resume: continue the run in `out`, with the same arguments.
        quiet: show no progress.
        watch: receives (stage, steps in all, row) for each row of metrics.
        **train: any other key of a recipe's `train`, as `batch_size=128, optimizer={"lr": 3e-4}`.

    Raises:
        UsageError: something cannot be used; the message names it; nothing was written.
        Interrupted: a signal arrived; a checkpoint is on disk.

    Example::

        run = limbeck.distill("kd", teacher=big, student="convnet", data="digits", out="runs/a", steps=500)
    """
    given = {"steps": steps, "epochs": epochs, **train}
    training = {key: value for key, value in given.items() if value is not None}
    _check_training(method, training)
    teachers = _listed(teacher)
    stage: dict[str, Any] = {
        "name": STAGE,
        "method": method,
        "options": dict(options or {}),
        "student": _spec(student),
        "teacher": [_spec(one) for one in teachers],
        "train": training or None,
    }
    tree = {"seed": seed, "data": _data_spec(data), "track": list(track), "stages": [stage]}
    recipe = _checked(tree)
    objects = _objects(student, teachers)

    from limbeck.core.run import Run
    from limbeck.experiment import Experiment

    split = _split(data, validation, recipe)
    experiment = Experiment(recipe, Run(out), data=split, objects=objects)
    return execute(experiment, resume=resume, quiet=quiet, watch=watch)


def _check_training(method: str, training: Plain) -> None:
    """Refuses unknown training keys, and says so where an option of the method was meant."""
    options = catalogue.read().get(method, {}).get("options", {}).get("properties", {})
    for key in training:
        if key not in TrainSpec.model_fields and key in options:
            raise UsageError(f"'{key}' is an option of method '{method}'", f"give options={{{key!r}: …}}")
    try:
        if training:
            TrainSpec.model_validate(training)
    except ValidationError as error:
        raise explain(error, TrainSpec) from None


def _checked(tree: dict[str, Any]) -> Recipe:
    """The recipe, in which objects appear under the names of their classes."""
    stage = tree["stages"][0]
    # Names of objects say nothing that could be checked; names that can be, are.
    named = {"student": _stand_in(stage["student"]), "teacher": [_stand_in(one) for one in stage["teacher"]]}
    data = {"name": "digits"} if _is_object(tree["data"]) else tree["data"]
    resolve({**tree, "data": data, "stages": [{**stage, **named}]})
    return Recipe.model_validate(tree)


def _stand_in(spec: Plain) -> Plain:
    return {"name": "convnet"} if _is_object(spec) else spec


def _is_object(spec: Plain) -> bool:
    return str(spec.get("name", "")).startswith("object:")


def _spec(model: Any) -> dict[str, Any]:
    """A model or data as a recipe names it; an object by its class."""
    if isinstance(model, str):
        return {"name": model}
    return dict(model) if isinstance(model, Mapping) else {"name": f"object:{type(model).__name__}"}


def _data_spec(data: Any) -> dict[str, Any]:
    return {"name": "object:arrays"} if isinstance(data, tuple) else _spec(data)


def _listed(teacher: Any) -> list[Any]:
    if teacher is None:
        return []
    return list(teacher) if isinstance(teacher, list | tuple) else [teacher]


def _objects(student: Any, teachers: list[Any]) -> dict[str, Any]:
    """Models given as objects, as `Experiment` takes them; of several teachers those given by name stay None."""
    if any(student is one for one in teachers):
        raise IncompatibleError("student and teacher are one object", "give the student a copy of its own")
    found: dict[str, Any] = {}
    if not isinstance(student, str | Mapping):
        found[f"{STAGE}.student"] = student
    given = [None if isinstance(one, str | Mapping) else one for one in teachers]
    if any(one is not None for one in given):
        found[f"{STAGE}.teacher"] = given
    return found


def _split(data: Any, validation: Any, recipe: Recipe) -> "DataSplit | None":
    """Data given as objects, in two parts; None where the recipe names them."""
    from limbeck.data.open import DataSplit
    from limbeck.data.split import stratified_split
    from limbeck.modality import normalisation_of_data, normalise

    if isinstance(data, DataSplit):
        return data
    if isinstance(data, str | Mapping):
        if validation is None:
            return None
        raise UsageError("validation goes with data given as objects", "named data bring their own, or are split")
    train = _source(data, "data")
    if validation is not None:
        held = _source(validation, "validation", classes=train.classes)
        normalise(held, normalisation_of_data(train))
        return DataSplit(train, held)
    kept, rows = stratified_split(train.labels, recipe.data.validation, recipe.seed)
    return DataSplit(train.select(kept), train.select(rows))


def _source(data: Any, name: str, classes: int | None = None) -> Any:
    from limbeck.data.source import ArraySource, Source

    if isinstance(data, Source):
        return data
    if isinstance(data, tuple) and len(data) == 2:
        return ArraySource(data[0], data[1], classes=classes)
    raise RecipeError(name, f"a {type(data).__name__} is no data", "give (images, labels), a Source, or a name")
