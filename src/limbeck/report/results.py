"""The first panel: a plot of accuracies with every seed, and the headline table."""

import math
from collections.abc import Sequence

from limbeck.report.figures import FIGURES, NONE, accuracy_interval, percent, shown_figures
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.story import Series, Story


def results(story: Story) -> Section:
    """Every stage of every group with its figures."""
    known = [series for series in story.series if series.figures]
    lead = "Every row is one stage, measured on validation items: none was trained on them."
    if not known:
        return Section("results", "Results", "", fill("<p class='quiet'>No stage is finished yet.</p>"))
    return Section("results", "Results", lead, join([_accuracies(known), _table(story, known)]))


def _accuracies(known: Sequence[Series]) -> Html:
    """A dot for every seed, a tick for the mean and a bar for the interval, on one axis of accuracy."""
    shown = [series for series in known if series.values("accuracy")]
    if not shown:
        return Html("")
    low, high = _axis(shown)
    ticks = [low + part * (high - low) / 4 for part in range(5)]
    axis = join(fill("<span style='--x:{:.2f}'>{}</span>", 25.0 * n, percent(t, 0)) for n, t in enumerate(ticks))
    wide = " wide" if max(len(series.label) for series in shown) > 12 else ""
    return fill(
        "<figure class='dots{}'><figcaption>Accuracy: each dot is one seed, the tick their mean, "
        "the bar its 95 % interval</figcaption>{}<div class='dots-axis' aria-hidden='true'>{}</div></figure>",
        wide,
        join(_dots(series, low, high) for series in shown),
        axis,
    )


def _dots(series: Series, low: float, high: float) -> Html:
    interval = accuracy_interval(series)
    assert interval is not None

    def place(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    centre, *ends = interval
    dots = join(fill("<i style='--x:{:.2f}'></i>", place(value)) for value in series.values("accuracy"))
    spoken = f"{series.label}: {percent(centre)}, from {percent(ends[0])} to {percent(ends[1])}"
    return fill(
        "<div class='dots-row c{colour}'><span class='key'>{label}</span>"
        "<span class='dots-track' role='img' aria-label='{spoken}' title='{spoken}'>"
        "<u style='--x:{start:.2f};--w:{width:.2f}'></u>{dots}<b style='--x:{centre:.2f}'></b></span></div>",
        colour=series.colour,
        label=series.label,
        spoken=spoken,
        start=place(ends[0]),
        width=place(ends[1]) - place(ends[0]),
        dots=dots,
        centre=place(centre),
    )


def _axis(shown: Sequence[Series]) -> tuple[float, float]:
    """Ends of the axis: all dots and most of the intervals, at whole multiples of four percent."""
    values = [value for series in shown for value in series.values("accuracy")]
    reach = max(3 * (max(values) - min(values)), 0.1)
    ends = [end for series in shown for end in accuracy_interval(series) or ()]
    # An interval over two seeds can be wider than everything else: it may run off the axis.
    low = max(min(ends), min(values) - reach, 0.0)
    high = min(max(ends), max(values) + reach, 1.0)
    low, high = math.floor(low * 25) / 25, math.ceil(high * 25) / 25
    return (low, high) if high > low else (max(low - 0.04, 0.0), min(high + 0.04, 1.0))


def _table(story: Story, known: Sequence[Series]) -> Html:
    cells = shown_figures(story, known)
    head = join(fill("<th scope='col' title='{}'>{}</th>", FIGURES[key].note, FIGURES[key].title) for key in cells)
    notes = join(fill("<li><b>{}</b>: {}</li>", FIGURES[key].title, FIGURES[key].note) for key in cells)
    return fill(
        "<div class='scroll' tabindex='0' role='region' aria-label='Figures of every stage'>"
        "<table class='figures stack'><caption class='hidden'>Figures of every stage</caption>"
        "<thead><tr><th scope='col'>Stage</th>{}</tr></thead><tbody>{}</tbody></table></div>"
        "<details class='notes'><summary>What the columns mean</summary><ul>{}</ul></details>",
        head,
        join(_row(series, {key: cells[key][number] for key in cells}) for number, series in enumerate(known)),
        notes,
    )


def _row(series: Series, cells: dict[str, str]) -> Html:
    seeds = len(series.figures)
    method = series.stage.method + (f", {seeds} seeds" if seeds > 1 else "")
    return fill(
        "<tr class='c{}{}'><th scope='row'><span class='key'>{}</span><small>{}</small></th>{}</tr>",
        series.colour,
        " student" if series.stage == series.group.cast.student else "",
        series.label,
        method,
        join(
            fill("<td data-title='{}'{}>{}</td>", FIGURES[key].title, _empty(cell), cell) for key, cell in cells.items()
        ),
    )


def _empty(cell: str) -> Html:
    return Html(" class='none'") if cell == NONE else Html("")
