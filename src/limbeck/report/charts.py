"""Learning curves: what the page's script draws, as plain data, and the frames that it draws into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.story import Row, Series, Story

_MOST_NUMBERS = 40_000  # of all curves together: about half a megabyte
_MOST_SEEDS = 10


@dataclass(frozen=True)
class Chart:
    """A chart: which entry of the rows of metrics it shows, of the player that is taken home where players have it."""

    name: str
    title: str
    entry: str
    form: str
    note: str = ""


CHARTS = (
    Chart("accuracy", "Validation accuracy", "validation/accuracy", "percent"),
    Chart("cross-entropy", "Validation cross-entropy", "validation/cross_entropy", "number", "nats an item"),
    Chart("loss", "Training loss", "*/loss", "number", "each method's own: not to be compared between methods"),
    Chart("rate", "Learning rate", "*/lr", "number"),
)
"""The charts in order; validation cross-entropy is left out where there is accuracy to show."""


def curves(story: Story) -> Section | None:
    """Learning curves of every stage, thin lines for seeds and a bold one for their mean."""
    budget = max(20, _MOST_NUMBERS // max(1, len(CHARTS) * sum(len(s.group.views) for s in story.series)))
    drawn = {chart.name: _lines(chart, story.series, budget) for chart in CHARTS}
    if drawn["accuracy"]:
        drawn["cross-entropy"] = []
    shown = [chart for chart in CHARTS if drawn[chart.name]]
    if not shown:
        return None
    named = {line["series"] for chart in shown for line in drawn[chart.name]}
    legend = join(_switch(number, series) for number, series in enumerate(story.series) if number in named)
    lead = "Point at a chart, or use the arrow keys in it, to read values; a name switches its curves off and on."
    body = fill(
        "<div class='legend' role='group' aria-label='Stages shown in the charts'>{}</div>"
        "<div class='charts'>{}</div><noscript><p class='quiet'>The curves are drawn by a script, which is switched "
        "off; their numbers are in each run's metrics.jsonl.</p></noscript>",
        legend,
        join(map(_frame, shown)),
    )
    series = [{"label": series.label, "colour": series.colour} for series in story.series]
    charts = [{"name": c.name, "title": c.title, "form": c.form, "lines": drawn[c.name]} for c in shown]
    return Section("curves", "Learning curves", lead, body, {"series": series, "charts": charts})


def _switch(number: int, series: Series) -> Html:
    return fill(
        "<button type='button' class='c{}' data-series='{}' aria-pressed='true'><span class='key'>{}</span></button>",
        series.colour,
        number,
        series.label,
    )


def _frame(chart: Chart) -> Html:
    return fill(
        "<figure class='chart' data-chart='{name}'><figcaption><b>{title}</b> <small>{note}</small></figcaption>"
        "<output class='readout' aria-live='polite'></output><div class='plot'></div></figure>",
        name=chart.name,
        title=chart.title,
        note=chart.note,
    )


def _lines(chart: Chart, series: Sequence[Series], budget: int) -> list[dict[str, Any]]:
    """The lines of one chart: for each series the points of its seeds, and their mean where their steps agree."""
    lines = []
    for number, one in enumerate(series):
        seeds = [_points(chart.entry, one.rows(view)) for view in one.group.views[:_MOST_SEEDS]]
        seeds = [_thinned(points, budget) for points in seeds if points]
        if not seeds:
            continue
        steps = list(seeds[0])
        joint = len(seeds) > 1 and all(list(points) == steps for points in seeds)
        mean: list[float] = [sum(points[step] for points in seeds) / len(seeds) for step in steps] if joint else []
        lines.append(
            {
                "series": number,
                "seeds": [[list(points), [_short(value) for value in points.values()]] for points in seeds],
                "mean": [steps, [_short(value) for value in mean]] if mean else None,
            }
        )
    return lines


def _points(entry: str, rows: Sequence[Row]) -> dict[int, float]:
    """One entry of the rows by step."""
    key = _key(entry, rows)
    return {row["step"]: row[key] for row in rows if key and isinstance(row.get(key), int | float)}


def _key(entry: str, rows: Sequence[Row]) -> str | None:
    """The name that an entry has in these rows; with several players the student's, or else the first one's."""
    names: Mapping[str, None] = dict.fromkeys(name for row in rows for name in row)
    if not entry.startswith("*/"):
        return entry if entry in names else None
    wanted = f"student{entry[1:]}"
    return wanted if wanted in names else next((name for name in names if name.endswith(entry[1:])), None)


def _thinned(points: dict[int, float], most: int) -> dict[int, float]:
    """Evenly spaced points, the last one kept."""
    stride = -(-len(points) // most)
    items = list(points.items())
    return dict(items[::-1][::stride][::-1])


def _short(value: float) -> float:
    return float(f"{value:.5g}")
