"""Exporting a student for use elsewhere."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.compression.quantized import quantization_of
from limbeck.core.batch import Batch
from limbeck.core.call import logits_of
from limbeck.core.durable import write_bytes, write_json
from limbeck.core.errors import IncompatibleError, MissingExtraError
from limbeck.diffusion.ports import without_adapter
from limbeck.models.modes import evaluating
from limbeck.models.normalisation import normalisation_of
from limbeck.models.quantized_files import export_quantized
from limbeck.models.saved import ecosystem, save_model
from limbeck.synthesis.synthetic_set import SyntheticSet

Format = Literal["transformers", "timm", "diffusers", "peft", "onnx", "parquet", "quantized", "limbeck"]


def export_formats(model: nn.Module) -> list[str]:
    """The formats that a model can be exported to."""
    kind = ecosystem(model)
    if isinstance(model, SyntheticSet):
        return [kind, "parquet"]
    if kind == "peft":
        return [kind, "diffusers" if ecosystem(without_adapter(model)) == "diffusers" else "onnx"]
    formats = [kind] if kind == "diffusers" else [kind, "onnx"]
    return [*formats, "quantized"] if quantization_of(model) is not None else formats


def export_model(
    model: nn.Module, folder: Path, to: Format, example: Batch | None = None, merge: bool = False
) -> list[Path]:
    """Writes a student, alone and without limbeck's own files, into a folder; the folder is created if missing.

    Args:
        model: the student.
        folder: where to write.
        to: "transformers" or "timm" (weights and configuration as that library loads them), "diffusers" (a pipeline;
            of a network with an adapter what the stock pipeline's `load_lora_weights` takes), "peft" (an adapter),
            "limbeck" (shipped networks and own classes), "parquet" (`train.parquet`, a synthetic set's pictures and
            labels as `datasets` loads them), "onnx" (`model.onnx`, any number of items at a time), or "quantized" (a
            quantised model in its few bits, as `limbeck.load` loads it).
        example: a batch of at least one item, for "onnx".
        merge: add the student's adapter into its base model's weights first; the result is an ordinary model.

    Returns:
        The files in the folder.

    Raises:
        IncompatibleError: the model cannot be exported to this format; the message says which it can.
        MissingExtraError: a package that the format needs is not installed.
    """
    if merge:
        from limbeck.models.adapters.peft import merged

        model = merged(model)
    allowed = export_formats(model)
    if to not in allowed:
        raise IncompatibleError(
            f"a {type(model).__name__} cannot be exported to {to}",
            f"it can be exported to: {', '.join(allowed)}" + ("; or merge its adapter" if "peft" in allowed else ""),
        )
    folder.mkdir(parents=True, exist_ok=True)
    if to == "onnx":
        _export_onnx(model, folder, example)
    elif to == "parquet":
        from limbeck.models.adapters.image_table import write_table

        assert isinstance(model, SyntheticSet)
        write_table(model, folder / "train.parquet")
    elif to == "diffusers" and ecosystem(model) == "peft":
        from limbeck.models.adapters.diffusers_lora import save_lora

        save_lora(model, folder)
    elif to == "quantized":
        export_quantized(model, folder)
    else:
        save_model(model, folder, compact=False)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _export_onnx(model: nn.Module, folder: Path, example: Batch | None) -> None:
    if example is None:
        raise IncompatibleError("the onnx format needs an example batch")
    names = [name for name in ("image", "input_ids", "attention_mask") if name in example]
    # More than one item: a size of one would be taken for a constant.
    rows = torch.arange(3) % example.size
    inputs = {name: example[name][rows].cpu() for name in names}
    logits = _LogitsOnly(model, names).cpu()
    with evaluating(logits):
        content = _to_onnx(logits, inputs)
        _verify(content, logits, inputs)
    write_bytes(folder / "model.onnx", content)
    normalisation = normalisation_of(model)
    mean, std = normalisation or (None, None)
    write_json(folder / "preprocessing.json", {"inputs": names, "output": "logits", "mean": mean, "std": std})


class _LogitsOnly(nn.Module):
    """A model of any ecosystem as a function from tensors to logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.names == ["image"]:
            return logits_of(self.model(*inputs))
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True))))


def _to_onnx(model: nn.Module, inputs: dict[str, Tensor]) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx", "the onnx format") from error
    items = torch.export.Dim("items", min=1)
    try:
        program: Any = torch.onnx.export(
            model,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple({0: items} for _ in inputs),),
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompatibleError(f"the model cannot be written as onnx: {reason}") from error
    return program.model_proto.SerializeToString()


def _verify(content: bytes, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Runs the exported network on two numbers of items and compares, where onnxruntime is installed."""
    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for feed in (inputs, {name: tensor[:1] for name, tensor in inputs.items()}):
        try:
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise IncompatibleError(
                f"onnxruntime does not run the exported network: {error}",
                "a forward that fixes the number of items (by len, int or a loop) is a common cause",
            ) from error
        expected = model(*feed.values())
        worst = (torch.from_numpy(outputs[0]) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if not worst < 1e-3:
            raise IncompatibleError(f"the exported network differs from the model by {float(worst):.1e}")
