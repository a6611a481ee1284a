"""Figures as the command line shows them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Figures = Mapping[str, Any]


def count(value: float) -> str:
    """A number with a thousands prefix: 1234567 as `1.23 M`."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes with a binary prefix: 1536 as `1.5 KiB`."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: `340 µs`, `12.5 s`, `1 h 05 min`."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def accuracy(figures: Figures) -> str:
    """Accuracy in percent with its 95 % interval."""
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    return f"{figures['accuracy']:.2%} [{low:.1%}, {high:.1%}]"


_COLUMNS: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "accuracy": ("accuracy [95 %]", accuracy),
    "agreement": ("agrees with teacher", lambda figures: f"{figures['agreement']:.2%}"),
    "cross_entropy": ("cross-entropy", lambda figures: f"{figures['cross_entropy']:.4f}"),
    "calibration_error": ("calibration error", lambda figures: f"{figures['calibration_error']:.3f}"),
    "parameters": ("parameters", lambda figures: count(figures["parameters"])),
    "flops": ("FLOPs an item", lambda figures: count(figures["flops"])),
    "latency": ("latency", lambda figures: duration(figures["latency"])),
    "seconds": ("training", lambda figures: duration(figures["seconds"])),
}


def show_results(results: Mapping[str, Figures]) -> None:
    """Prints the figures of a run's stages side by side."""
    columns = [key for key in _COLUMNS if any(key in figures for figures in results.values())]
    rows = [
        [stage, *(_COLUMNS[key][1](figures) if key in figures else "–" for key in columns)]
        for stage, figures in results.items()
    ]
    show_table(["stage", *(_COLUMNS[key][0] for key in columns)], rows)


def show_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, left: Sequence[str] = ()
) -> None:
    """Prints a table; its first column and those named in `left` are aligned left, all others right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, name in enumerate(header):
        justify: Literal["left", "right"] = "left" if position == 0 or name in left else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as text: square brackets are no markup here
    # What is piped is for programs and logs: no line of it is folded to a terminal's width.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
