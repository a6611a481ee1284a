"""How a cost grows with size: drawn from the rows of benchmarks whose cases end in a size, as `…, 4096 tokens`."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_CASE = re.compile(r"(?P<what>.+), (?P<size>[\d.]+)(?P<quantity> [a-z ]+| ?% [a-z ]+)")
_FEWEST = 3  # sizes that make a line

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Growth:
    """A measured cost against a size.

    Attributes:
        quantity: what is counted on the horizontal axis: tokens, pixels, steps.
        unit: of the cost.
        lines: (size, cost) in ascending order, by what was measured.
    """

    quantity: str
    unit: str
    lines: dict[str, Points]


def growth_in(rows: Sequence[dict[str, str]]) -> Growth | None:
    """What a benchmark's rows say of growth; None where they are not sizes of one thing.

    A case "ours against peer, 4096 tokens" gives a point to each of two lines, "ours, 4096 tokens" to one. Rows of
    another unit or quantity than the first such row are left to the table.
    """
    matched = [(row, match) for row in rows if (match := _CASE.fullmatch(row["case"]))]
    if not matched:
        return None
    unit, quantity = matched[0][0]["unit"], matched[0][1]["quantity"]
    lines: dict[str, Points] = {}
    for row, match in matched:
        if (row["unit"], match["quantity"]) != (unit, quantity):
            continue
        ours, against, peer = match["what"].partition(" against ")
        for name, cost in ((ours, row["ours"]), (peer, row["peer"])) if against else ((ours, row["ours"]),):
            lines.setdefault(name, []).append((float(match["size"]), float(cost)))
    drawn = {name: sorted(set(points)) for name, points in lines.items() if len(points) >= _FEWEST}
    return Growth(quantity.strip(), unit, drawn) if drawn else None


def draw(growth: Growth) -> str:
    """The lines on two logarithmic axes, as the text of an SVG file: the same text for the same figures."""
    import matplotlib  # for the documentation alone: whoever writes the catalogue does without
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limbeck", "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        shares = growth.quantity.startswith("%")
        for name, points in growth.lines.items():
            # A sum with 0.0 has no negative zero.
            power = "" if shares else f" (power {round(exponent(points), 1) + 0.0:.1f})"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{name}{power}")
        axes.set(
            xscale="linear" if shares else "log",
            yscale="log",
            xlabel=growth.quantity,
            ylabel=growth.unit.partition(", peer")[0],
        )
        sizes = sorted({size for points in growth.lines.values() for size, _ in points})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", content.getvalue(), flags=re.MULTILINE)


def exponent(points: Points) -> float:
    """The power of the size that the cost grows by: a line through the logarithms of the larger half of the sizes."""
    larger = points[-max(2, (len(points) + 1) // 2) :]
    x, y = zip(*((math.log(size), math.log(cost)) for size, cost in larger), strict=True)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    return sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / spread
