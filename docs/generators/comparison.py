"""The page that sets all methods for classifiers side by side, from `claims/results/tables`."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from .claims import figure
from .markdown import NOTICE, table

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "claims" / "results" / "tables"

_INTRODUCTION = """# Methods for classifiers, side by side

Every method that trains a classifier on one protocol: the same teacher, student, items, steps and seeds. Methods run
with the defaults of their papers and students start from fresh weights; nothing is tuned for anybody. Defaults were
mostly chosen for long training on CIFAR-100 or ImageNet, so the tables say what a first try gives on little data, not
how good a method can be made. Searches and active learners have other budgets and are not in them.

`python -m claims.vision_table digits` and `python -m claims.vision_table cifar10 --data-dir DIR` make them again.
"""


def comparison_page() -> str:
    """The page with a table for each protocol that was run."""
    tables = [json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))]
    parts = [NOTICE, _INTRODUCTION, *(f"\n## {one['name']}\n\n{_section(one)}" for one in tables)]
    return "".join(parts) if tables else f"{NOTICE}{_INTRODUCTION}\nNo table was made yet.\n"


def _section(one: dict[str, Any]) -> str:
    ordered = sorted(one["accuracy"].items(), key=lambda row: -mean(row[1]))
    rows = [[_name(slug), figure(values), ", ".join(f"{value:.4f}" for value in values)] for slug, values in ordered]
    left_out = "".join(f"\n`{slug}` is left out: {why}.\n" for slug, why in one["left_out"].items())
    seconds = f"{one['seconds']:.0f} s in all, {one['date']}."
    return f"{one['budget']}.\n\n{table(['method', 'accuracy ± 95 %', 'every seed'], rows)}{left_out}\n{seconds}\n"


def _name(slug: str) -> str:
    return f"[`{slug}`](methods/{slug}.md)" if (ROOT / "docs" / "methods" / f"{slug}.md").is_file() else slug
