"""What is done with a finished run: loading, measuring and exporting its student."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from limbeck.core.run import Run
    from limbeck.core.teacher import Teacher
    from limbeck.data.source import Source
    from limbeck.experiment import Prepared

Format = Literal["timm", "transformers", "diffusers", "peft", "onnx", "parquet", "quantized", "limbeck"]


_MARKS = (
    *("config.json", "adapter_config.json", "guidance_adapters.json"),
    *("model_index.json", "unet/config.json", "transformer/config.json"),
)
"""Files of which a model's folder holds one."""


def load(folder: "Path | str | Run", model: "nn.Module | None" = None) -> "nn.Module":
    """The student of a finished run, or an exported model, on the CPU and in eval mode.

    Args:
        folder: a run, its folder, or the folder of an exported model.
        model: an object of the student's class to fill, for classes of your own.

    Raises:
        UsageError: there is neither, or the run is not finished.
        DamagedFileError: a file is missing or altered.
    """
    from limbeck.core.run import Run
    from limbeck.models.saved import load_model

    path = _folder(folder)
    if (path / "recipe.yaml").is_file():
        path = Run.open(path).student
        if not path.is_dir():
            raise UsageError(f"the run in {path.parent} is not finished", f"limbeck run {path.parent} --resume")
    if path.is_dir() and not any((path / name).is_file() for name in _MARKS):
        raise UsageError(f"{path} holds neither a run nor a model", "give a run's folder, or that of an exported model")
    return load_model(path, model).eval()


def evaluate(
    run: "Path | str | Run",
    stage: str | None = None,
    *,
    model: "nn.Module | None" = None,
    data: "Source | None" = None,
    teacher: "Teacher | nn.Module | None" = None,
) -> dict[str, Any]:
    """Measures the result of a stage: accuracy with its 95 % interval, calibration, agreement with the teacher.

    Language models: perplexity with its interval, agreement, acceptance rate, and speculative decoding as it is
    measured with the teacher as target.

    Args:
        run: a run or its folder.
        stage: which stage's result; the last one's if absent.
        model: an object to fill with the result, for classes of your own.
        data: what to measure on; the validation data of the run's recipe if absent.
        teacher: whom to compare with; the stage's teacher if absent.

    Raises:
        UsageError: no such run or stage, or it is not finished.
    """
    from limbeck.core.registry import method_class
    from limbeck.core.run import Run
    from limbeck.metrics.tasks import evaluate_for
    from limbeck.models.saved import load_model

    opened = Run.open(_folder(run))
    recipe = opened.recipe()
    names = [one.name for one in recipe.stages]
    wanted = stage or names[-1]
    if wanted not in names:
        raise UsageError(f"the run has no stage '{wanted}'", did_you_mean(wanted, names))
    finished = opened.results()
    if wanted not in finished:
        raise UsageError(f"stage '{wanted}' is not finished", f"limbeck run {opened.folder} --resume")
    result = load_model(opened.stage_result(wanted), model)
    if data is None or teacher is None:
        prepared = prepare_again(opened, wanted)
        data, teacher = data or prepared.data.validation, teacher or prepared.teacher
    task = method_class(recipe.stages[names.index(wanted)].method).card.task
    figures = evaluate_for(task)(result, data, teacher=teacher)
    if task == "language-modelling" and teacher is not None:
        from limbeck.metrics.decoding import evaluate_decoding

        figures |= evaluate_decoding(result, data, teacher)
    return figures


def prepare_again(run: "Run", stage: str) -> "Prepared":
    """Data, teacher, fresh student and method of a stage, as they were before it was trained."""
    from limbeck.experiment import Experiment
    from limbeck.models.saved import load_model

    recipe = run.recipe()
    names = [one.name for one in recipe.stages]
    experiment = Experiment(recipe, run)
    experiment.results = {name: load_model(run.stage_result(name)) for name in names[: names.index(stage)]}
    return experiment.prepare(recipe.stages[names.index(stage)], cached=False)


def export(
    run: "Path | str | Run", to: Format, out: Path | str, model: "nn.Module | None" = None, *, merge: bool = False
) -> list[Path]:
    """Writes a finished run's student, alone, for use without limbeck, and returns the files.

    Args:
        run: a run, its folder, or the folder of an exported model.
        to: "timm", "transformers" or "diffusers" for students of these libraries; "peft" for adapters, which those of
            diffusers' networks need not be; "onnx" for classifiers and language models; "parquet" for synthetic sets;
            "limbeck" for shipped networks; "quantized" for quantised ones, in as few bits as they need.
        out: a folder that does not exist yet, or is empty.
        model: an object of the student's class to fill, for classes of your own.
        merge: add the student's adapter into its base model's weights first.

    Raises:
        UsageError: the student cannot be exported to this format, or `out` is taken; nothing was written.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already", "choose another folder with --out")
    from limbeck.models.export import export_model

    student = load(run, model)
    return export_model(student, target, to, _example(_folder(run)) if to == "onnx" else None, merge)


def _example(folder: Path) -> Any:
    """Two items of the run's data, from which an exporter reads shapes."""
    from limbeck.core.run import Run
    from limbeck.data.open import open_data

    recipe = Run.open(folder).recipe()
    return open_data(recipe.data).train.info().example


def _folder(run: "Path | str | Run") -> Path:
    return Path(run) if isinstance(run, str | Path) else run.folder
