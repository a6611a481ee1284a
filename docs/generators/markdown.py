"""Markdown tables, and the places in hand-written files that hold generated text."""

from collections.abc import Iterable, Sequence

NOTICE = "<!-- Written by docs/generate.py: run `make generate` after a change. -->\n\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, one line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def replace_between(text: str, marker: str, content: str) -> str:
    """The text with what stands between `<!-- marker:begin -->` and `<!-- marker:end -->` exchanged."""
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the markers of '{marker}' are missing")
    return f"{before}{begin}{content}{end}{after}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
