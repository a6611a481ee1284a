"""`limbeck export`: a student for use elsewhere."""

import sys
from pathlib import Path

from limbeck.core.errors import LimbeckError
from limbeck.finished import Format


def export(run: Path, /, *, to: Format, out: Path, merge: bool = False) -> None:
    """Write a run's student, alone, for use without limbeck; say how large and fast it is beside its teacher.

    Parameters
    ----------
    run
        Folder of a finished run, or of an exported model.
    to
        Format: timm, transformers and diffusers for students of these libraries, peft for adapters, onnx for
        classifiers and language models, parquet for synthetic sets, limbeck for shipped networks, quantized for
        quantised weights in their few bits. An adapter of a diffusion model becomes LoRA weights of the stock pipeline
        with diffusers.
    out
        Folder to write; it must not exist yet, or be empty.
    merge
        Add the student's adapter into its base model's weights first.
    """
    from limbeck.finished import export as write

    files = write(run, to, out, merge=merge)
    for path in files:
        print(path)
    if to == "parquet":  # pictures, which have nothing to be faster than
        return
    from limbeck.cli.tables import count, duration, show_table, size
    from limbeck.weighing import weigh_export

    try:
        weights = weigh_export(run, files)
    except LimbeckError as error:  # the student is written all the same
        print(f"\nnot compared with its teacher: {error.message}", file=sys.stderr)
        return
    rows = [
        [one.name, size(one.bytes), count(one.parameters), "–" if one.latency is None else duration(one.latency)]
        for one in weights
    ]
    print()
    show_table(("", "on disk", "parameters", "an item"), rows)
