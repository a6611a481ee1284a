"""The figures of the headline table: what they are called, how they are written, how they are joined over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from limbeck.metrics.intervals import t_interval, wilson
from limbeck.report.story import Series, Story

NONE = "–"


@dataclass(frozen=True)
class Figure:
    """A column of the headline table.

    Attributes:
        title: its heading.
        note: one sentence that explains it.
        show: its cell for a stage; `NONE` where there is nothing to say.
        best: the direction in which it is better, "high" or "low"; "" where neither is.
    """

    title: str
    note: str
    show: Callable[[Story, Series], str]
    best: str = ""


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage: 0.8749 as `87.5 %`, with a space that does not break."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign: `+1.9`, `−0.4`."""
    return f"{100 * share:+.1f}".replace("-", "−")


def count(value: float) -> str:
    """A number with a thousands prefix: 63123 as `63.1 k`."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}\N{NO-BREAK SPACE}{unit}"
    return f"{value:.3g}"


def counted(number: float, noun: str) -> str:
    """A whole number of things: `1 step`, `4 steps`."""
    return f"{number:.0f} {noun}{'s' if number != 1 else ''}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: `340 µs`, `12.5 s`, `4 min 05 s`, `1 h 05 min`."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours}\N{NO-BREAK SPACE}h {minutes:02d}\N{NO-BREAK SPACE}min"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}\N{NO-BREAK SPACE}min {rest:02d}\N{NO-BREAK SPACE}s"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{seconds / 1e-9:.3g}\N{NO-BREAK SPACE}ns" if seconds else "0\N{NO-BREAK SPACE}s"


def accuracy_interval(series: Series) -> tuple[float, float, float] | None:
    """Accuracy and the ends of its 95 % interval, None without any.

    Over several seeds it is Student's interval of their mean; for one run Wilson's, over the validation items.
    """
    values = series.values("accuracy")
    if not values:
        return None
    if len(values) > 1:
        centre, half = t_interval(values)
        return centre, max(0.0, centre - half), min(1.0, centre + half)
    items = series.values("items")
    low, high = wilson(values[0] * items[0], int(items[0])) if items else (values[0], values[0])
    return values[0], low, high


def _accuracy(story: Story, series: Series) -> str:
    values = series.values("accuracy")
    interval = accuracy_interval(series)
    if interval is None:
        return NONE
    centre, low, high = interval
    if len(values) > 1:
        half = t_interval(values)[1]
        return f"{100 * centre:.1f} ± {100 * half:.1f}\N{NO-BREAK SPACE}%"
    return f"{percent(centre)} [{100 * low:.1f}–{100 * high:.1f}]"


def _agreement(story: Story, series: Series) -> str:
    share = story.agreement(series)
    return NONE if share is None else percent(share)


def _plain(
    key: str, write: Callable[[float], str], join: Callable[[Sequence[float]], float]
) -> Callable[[Story, Series], str]:
    def show(story: Story, series: Series) -> str:
        values = [value for value in series.values(key) if math.isfinite(value)]
        return write(join(values)) if values else NONE

    return show


FIGURES: dict[str, Figure] = {
    "accuracy": Figure(
        "Accuracy",
        "share of validation items that are right, with its 95 % interval: over seeds (±), or for one run over items",
        _accuracy,
        "high",
    ),
    "random": Figure(
        "On as many real",
        "accuracy of networks trained on as many real items, drawn at random, as a synthetic set holds",
        _plain("random", percent, mean),
        "high",
    ),
    "full": Figure(
        "On all real",
        "accuracy of networks trained in the same way on all that a synthetic set was distilled from",
        _plain("full", percent, mean),
        "high",
    ),
    "agreement": Figure(
        "Agrees with teacher", "share of validation items on which student and teacher say the same", _agreement, "high"
    ),
    "cross_entropy": Figure(
        "Cross-entropy",
        "of the labels, in nats an item; lower is better",
        _plain("cross_entropy", "{:.3f}".format, mean),
        "low",
    ),
    "perplexity": Figure(
        "Perplexity",
        "of unseen tokens, the mean over runs; lower is better",
        _plain("perplexity", "{:.2f}".format, mean),
        "low",
    ),
    "frechet": Figure(
        "Fréchet distance",
        "between samples and validation data, of the Gaussians fitted to their pixels; lower is better",
        _plain("frechet", "{:.2f}".format, mean),
        "low",
    ),
    "judged": Figure(
        "Seen as asked",
        "share of samples in which a judge that knows the data alone sees the class that was asked for",
        _plain("judged", percent, mean),
        "high",
    ),
    "evaluations": Figure(
        "Evaluations", "of the network, for each sample", _plain("evaluations", "{:.0f}".format, mean), "low"
    ),
    "seconds_per_sample": Figure(
        "A sample",
        "time of one sample on this machine, the median over runs",
        _plain("seconds_per_sample", duration, median),
        "low",
    ),
    "parameters": Figure("Parameters", "numbers that the network holds", _plain("parameters", count, mean), "low"),
    "sparsity": Figure("Zeros", "share of zeros among the weights that were pruned", _plain("sparsity", percent, mean)),
    "bits_per_weight": Figure(
        "Bits a weight",
        "of quantised weights: indices in a Huffman code, with scales, signs and levels",
        _plain("bits_per_weight", "{:.2f}".format, mean),
        "low",
    ),
    "compact_bytes": Figure(
        "Compact file",
        "bytes of the quantised network as `limbeck export --to quantized` writes it",
        _plain("compact_bytes", lambda value: f"{count(value)}B", mean),
        "low",
    ),
    "flops": Figure(
        "FLOPs an item", "multiplications and additions of one answer", _plain("flops", count, mean), "low"
    ),
    "latency": Figure(
        "Latency",
        "time of one answer on this machine, the median over runs",
        _plain("latency", duration, median),
        "low",
    ),
    "seconds": Figure(
        "Training", "time the stage took to train, the mean over runs", _plain("seconds", duration, mean), "low"
    ),
}
"""The columns of the headline table by key, in order; a family adds its own figure of merit here."""


def shown_figures(story: Story, series: Sequence[Series]) -> dict[str, list[str]]:
    """Cells by figure, one a series; figures that none of them has are left out."""
    cells = {key: [figure.show(story, one) for one in series] for key, figure in FIGURES.items()}
    return {key: row for key, row in cells.items() if any(cell != NONE for cell in row)}
