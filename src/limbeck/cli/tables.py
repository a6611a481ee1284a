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


def percent(share: float) -> str:
    """A share in percent: 0.9524 as `95.24 %`."""
    return f"{100 * share:.2f} %"


_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", percent),
    "random": ("on as many real", percent),
    "full": ("on all real", percent),
    "token_accuracy": ("token accuracy", percent),
    "perplexity": ("perplexity", "{:.4g}".format),
    "agreement": ("agrees with teacher", percent),
    "acceptance": ("accepted by teacher", percent),
    "teacher_kl": ("divergence of teacher", "{:.4f}".format),
    "frechet": ("Fréchet distance", "{:.3f}".format),
    "sliced_wasserstein": ("sliced Wasserstein", "{:.4f}".format),
    "judged": ("seen as asked", percent),
    "endpoint_error": ("error to teacher's", "{:.4f}".format),
    "evaluations": ("evaluations", "{:.0f}".format),
    "seconds_per_sample": ("a sample", duration),
    "cross_entropy": ("cross-entropy", "{:.4f}".format),
    "calibration_error": ("calibration error", "{:.4f}".format),
    "sparsity": ("zeros", percent),
    "bits_per_weight": ("bits a weight", "{:.2f}".format),
    "compact_bytes": ("compact file", size),
    "parameters": ("parameters", count),
    "flops": ("FLOPs an item", count),
    "latency": ("latency", duration),
    "seconds": ("training", duration),
}


def show_results(results: Mapping[str, Figures]) -> None:
    """Prints the figures of a run's stages side by side: a column a stage, so that a narrow terminal holds it."""
    rows: list[list[str]] = []
    for key, (title, write) in _FIGURES.items():
        if any(key in figures for figures in results.values()):
            rows.append([title, *(write(figures[key]) if key in figures else "–" for figures in results.values())])
            intervals = [_interval(figures, key, write) for figures in results.values()]
            if any(intervals):
                rows.append(["  95 % interval", *(interval or "–" for interval in intervals)])
    show_table(["", *results], rows)


def _interval(figures: Figures, key: str, write: Callable[[float], str]) -> str:
    """The ends of a figure's interval, with the unit once; nothing where it has none."""
    if f"{key}_low" not in figures:
        return ""
    low, high = write(figures[f"{key}_low"]), write(figures[f"{key}_high"])
    return f"{low.removesuffix(' %')}–{high}"


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
