"""What an exported student costs beside its teacher: bytes on disk, parameters, measured time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from limbeck.core.batch import Batch
    from limbeck.core.run import Run


@dataclass(frozen=True)
class Weight:
    """What one model costs.

    Attributes:
        name: "teacher" or "student".
        bytes: of the student the files that were written; of the teacher the weights that it would be stored with.
        parameters: their number, shared ones once.
        latency: median seconds of a pass over one item on this machine; None where there is no item to try.
    """

    name: str
    bytes: int
    parameters: int
    latency: float | None


def weigh_export(run: "Path | str | Run", files: Sequence[Path], model: "nn.Module | None" = None) -> list[Weight]:
    """The student as it was just exported, and its teachers together, in the same process one after the other.

    Nominal figures say little: a student of 2-bit weights in float32 files is not smaller, and zeros are not faster by
    themselves. Hence files are counted as they are and passes are timed as they run; of an ONNX file in onnxruntime.

    Args:
        run: a run, its folder, or the folder of an exported model, of which there is no teacher.
        files: what `limbeck.export` returned.
        model: an object of the student's class to fill, for classes of your own.
    """
    from limbeck.core.run import Run
    from limbeck.core.teacher import Ensemble, LiveTeacher
    from limbeck.finished import load, prepare_again
    from limbeck.models.describe import count_parameters, latency

    student = load(run, model)
    folder = Path(run) if isinstance(run, str | Path) else run.folder
    written = sum(file.stat().st_size for file in files)
    if not (folder / "recipe.yaml").is_file():
        return [Weight("student", written, count_parameters(student), None)]
    opened = Run.open(folder)
    prepared = prepare_again(opened, opened.recipe().stages[-1].name)
    item = prepared.info.example.select(slice(0, 1))
    graph = next((file for file in files if file.suffix == ".onnx"), None)
    seconds = latency(student, item) if graph is None else _onnx_latency(graph, item)
    weights = [Weight("student", written, count_parameters(student), seconds)]
    teacher = prepared.teacher
    members = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
    models = [member.model for member in members if isinstance(member, LiveTeacher)]
    if models and len(models) == len(members):
        sizes = [sum(count_parameters(one) for one in models), sum(latency(one, item) for one in models)]
        weights.insert(0, Weight("teacher", sum(map(_stored_bytes, models)), int(sizes[0]), sizes[1]))
    return weights


def _stored_bytes(model: "nn.Module") -> int:
    """Bytes of a model's weights and buffers as safetensors hold them: shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _onnx_latency(file: Path, item: "Batch") -> float | None:
    """Median seconds of onnxruntime on one item; None where it is not installed."""
    from limbeck.models.describe import median_seconds

    try:
        import onnxruntime
    except ImportError:
        return None
    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feed = {entry.name: item[entry.name].numpy() for entry in session.get_inputs()}
    return median_seconds(lambda: session.run(None, feed))
