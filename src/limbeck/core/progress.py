"""Progress of a run: a bar with remaining time and live figures on a terminal, otherwise a line every tenth."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from limbeck.core.trackers import Watch

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_FIGURES = ("loss", "cross_entropy", "accuracy")


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Watch]:
    """Within this context the yielded function shows each row of metrics; only the main process shows anything.

    Args:
        stream: where to show it; stderr if absent.
    """
    stream = stream or sys.stderr
    if not is_main():
        yield lambda stage, steps, row: None
    elif stream.isatty():
        bars = _Bars(stream)
        try:
            yield bars.show
        finally:
            bars.stop()
    else:
        yield _Lines(stream).show


def is_main() -> bool:
    """Whether this process is the first of those that a launcher started, as far as its environment says."""
    return os.environ.get("RANK", "0") == "0"


def figures(row: dict[str, Any]) -> str:
    """What is worth showing of a row: `loss 0.231  accuracy 0.942`.

    The player's name is left out where there is only one.
    """
    shown = {key: value for key, value in row.items() if key.rpartition("/")[2] in _FIGURES}
    if any(key.endswith("/loss") for key in shown):
        shown = {key: value for key, value in shown.items() if not key.endswith("/cross_entropy")}
    short = {key.rpartition("/")[2] for key in shown}
    names = {key: key.rpartition("/")[2] if len(short) == len(shown) else key for key in shown}
    return "  ".join(f"{names[key]} {value:.4g}" for key, value in shown.items())


class _Bars:
    """One bar a stage."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.display: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.shown = ""

    def show(self, stage: str, steps: int, row: dict[str, Any]) -> None:
        display = self.display = self.display or self._start()
        if stage not in self.tasks:
            # Steps before the first row (of a resumed run, many) say nothing about speed: they are there at the start.
            self.tasks[stage] = display.add_task(stage, total=steps or None, completed=row["step"], figures="")
        display.update(self.tasks[stage], completed=row["step"], figures=figures(row))

    def stop(self) -> None:
        if self.display is not None:
            self.display.stop()

    def _start(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", style="dim"),
        )
        display = Progress(*columns, console=Console(file=self.stream))
        display.start()
        return display


class _Lines:
    """A plain line for about every tenth of a stage's steps, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.begun: dict[str, tuple[float, int]] = {}
        self.tenth: dict[str, int] = {}

    def show(self, stage: str, steps: int, row: dict[str, Any]) -> None:
        step = row["step"]
        begun, first = self.begun.setdefault(stage, (time.monotonic(), step))
        tenth = 10 * step // steps if steps else step
        if self.tenth.get(stage) == tenth:
            return
        self.tenth[stage] = tenth
        left = (time.monotonic() - begun) / (step - first) * (steps - step) if step > first else None
        remaining = f"  {left:.0f} s left" if left and step < steps else ""
        total = f"/{steps}" if steps else ""
        print(f"{stage}  {step}{total}{remaining}  {figures(row)}", file=self.stream, flush=True)
