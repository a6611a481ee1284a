"""Where the time went: the phases of every stage's training, as bars on one scale."""

from collections.abc import Mapping
from statistics import mean

from limbeck.report.figures import duration, percent
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.story import Series, Story

_ORDER = ("data", "forward", "backward", "optimizer", "evaluate", "checkpoint")
_LEAST = 0.004  # a part below this share of the longest bar would not be seen


def phases(story: Story) -> Section | None:
    """A stacked bar for every stage, the mean over its runs."""
    spent = {number: _spent(series) for number, series in enumerate(story.series)}
    spent = {number: parts for number, parts in spent.items() if sum(parts.values()) > 0}
    if not spent:
        return None
    names = sorted({name for parts in spent.values() for name in parts}, key=_place)
    longest = max(sum(parts.values()) for parts in spent.values())
    legend = join(fill("<span class='key p{}'>{}</span>", _colour(name), name) for name in names)
    rows = join(_row(story.series[number], parts, names, longest) for number, parts in spent.items())
    body = fill(
        "<div class='legend plain'>{}</div><table class='phases'><caption class='hidden'>Seconds of every stage by "
        "phase</caption><thead class='hidden'><tr><th scope='col'>Stage</th><th scope='col'>Phases</th>"
        "<th scope='col'>In all</th></tr></thead><tbody>{}</tbody></table>",
        legend,
        rows,
    )
    lead = "Of training, the mean over runs. The teacher's answers are part of its student's forward phase."
    return Section("time", "Where the time went", lead, body)


def _spent(series: Series) -> dict[str, float]:
    """Mean seconds by phase."""
    runs = [figures.get("phases") for figures in series.figures]
    known = [phases for phases in runs if isinstance(phases, Mapping) and phases]
    names = dict.fromkeys(name for phases in known for name in phases)
    return {name: mean(float(phases.get(name, 0)) for phases in known) for name in names}


def _row(series: Series, parts: Mapping[str, float], names: list[str], longest: float) -> Html:
    total = sum(parts.values())
    bars = join(
        fill(
            "<span class='p{}' style='--w:{:.3f}' title='{}: {}, {}'></span>",
            _colour(name),
            100 * parts[name] / longest,
            name,
            duration(parts[name]),
            percent(parts[name] / total, 0),
        )
        for name in names
        if parts.get(name, 0) > _LEAST * longest
    )
    spoken = ", ".join(f"{name} {duration(parts[name])}" for name in names if name in parts)
    return fill(
        "<tr><th scope='row' class='c{}'><span class='key'>{}</span></th><td class='track'><span class='stacked' "
        "role='img' aria-label='{}'>{}</span></td><td class='number'>{}</td></tr>",
        series.colour,
        series.label,
        spoken,
        bars,
        duration(total),
    )


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _colour(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)
