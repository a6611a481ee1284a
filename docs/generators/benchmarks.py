"""The page of measured speed and memory, from benchmarks/results.csv."""

import csv
from pathlib import Path

from .growth import draw, growth_in
from .markdown import NOTICE, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results.csv"

_INTRODUCTION = """# Benchmarks

Each row compares limbeck with a peer (a hand-written loop, or another library) doing the same work in the same process,
taking turns, medians of each. The ratio says how many times better limbeck is: below 1 the peer is. Where the peer is a
bound, a limit or what was measured after a prediction, the case says so, and the ratio is the share reached. Where the
cases are sizes of one thing they are drawn too, each line with the power of the size that it grows by, fitted to its
larger half.
`make bench` measures all of them again and writes `benchmarks/results.csv`, from which this page is made.

"""


def benchmarks_page() -> str:
    """The page, with one table a benchmark."""
    rows = _read()
    if not rows:
        return f"{NOTICE}{_INTRODUCTION}No benchmark has been run yet.\n"
    parts = [NOTICE, _INTRODUCTION]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == name]
        cells = [[row["case"], row["ours"], row["peer"], row["unit"], row["ratio"], row["date"]] for row in own]
        hardware = "; ".join(dict.fromkeys(row["hardware"] for row in own))
        header = ["case", "limbeck", "peer", "unit", "ratio", "date"]
        parts.append(f"## {name}\n\n{_chart_of(name, own)}{table(header, cells)}\nMeasured on {hardware}.\n\n")
    return "".join(parts).rstrip() + "\n"


def growth_charts() -> dict[str, str]:
    """A drawing, by file name, of every benchmark whose cases are sizes of one thing."""
    rows = _read()
    names = dict.fromkeys(row["benchmark"] for row in rows)
    found = {name: growth_in([row for row in rows if row["benchmark"] == name]) for name in names}
    return {_file(name): draw(growth) for name, growth in found.items() if growth is not None}


def _chart_of(name: str, rows: list[dict[str, str]]) -> str:
    growth = growth_in(rows)
    if growth is None:
        return ""
    return (
        f"![{growth.unit} against {growth.quantity}, a line each: {', '.join(growth.lines)}](images/{_file(name)})\n\n"
    )


def _file(name: str) -> str:
    return f"growth-{name}.svg"


def _read() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
