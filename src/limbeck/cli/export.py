"""`limbeck export`: a student for use elsewhere."""

from pathlib import Path

from limbeck.finished import Format


def export(run: Path, /, *, to: Format, out: Path, merge: bool = False) -> None:
    """Write a run's student, alone, for use without limbeck.

    Parameters
    ----------
    run
        Folder of a finished run, or of an exported model.
    to
        Format: timm, transformers and diffusers for students of these libraries, peft for adapters, onnx for
        classifiers and language models, parquet for synthetic sets, limbeck for shipped networks. An adapter of a
        diffusion model becomes LoRA weights of the stock pipeline with diffusers.
    out
        Folder to write; it must not exist yet, or be empty.
    merge
        Add the student's adapter into its base model's weights first.
    """
    from limbeck.finished import export as write

    for path in write(run, to, out, merge=merge):
        print(path)
