"""Claims as tables: what was measured, of whom, on how many seeds, and whether the paper's statement held."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import NOTICE, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "claims" / "results"
Claim = dict[str, Any]


def read_claims() -> dict[str, Claim]:
    """The results of all claims that were run, by slug."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def claims_page(claims: dict[str, Claim]) -> str:
    """The page of all claims."""
    parts = [NOTICE, _INTRODUCTION, _overview(claims, prefix="methods/") if claims else "No claim has been run yet.\n"]
    parts += [f"\n## {slug}\n\n{claim_section(claim)}" for slug, claim in claims.items()]
    return "".join(parts)


def readme_table(claims: dict[str, Claim]) -> str:
    """The table for README.md."""
    return _overview(claims, prefix="docs/methods/") if claims else "No claim has been run yet.\n"


def claim_section(claim: Claim) -> str:
    """One claim: statement, figures of every arm, verdict, and under which conditions."""
    standing = "**holds**" if claim["holds"] else "**does not hold**"
    better = "higher is better" if claim["higher_is_better"] else "lower is better"
    conditions = [f"{len(claim['seeds'])} seeds", claim["budget"], f"{claim['seconds']:.0f} s in all"]
    conditions += [claim["hardware"], claim["date"][:10]]
    return (
        f"{claim['statement']}\n\nThe claim {standing} (margin asked for: {claim['margin']:g}).\n\n"
        f"{_arms(claim, better)}\n{'; '.join(conditions)}. Versions: {_versions(claim)}.\n"
        f"Run it again with `python -m claims {claim['slug']}`.\n"
    )


def figure(values: Sequence[float]) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _arms(claim: Claim, better: str) -> str:
    rows = [[name, figure(values), ", ".join(f"{value:.4f}" for value in values)] for name, values in _of(claim)]
    return table(["arm", f"{claim['metric']} ({better})", "every seed"], rows)


def _overview(claims: dict[str, Claim], prefix: str) -> str:
    rows = []
    for slug, claim in claims.items():
        figures = "; ".join(f"{name} {figure(values)}" for name, values in _of(claim))
        verdict = "holds" if claim["holds"] else "does not hold"
        rows.append([f"[`{slug}`]({prefix}{slug}.md)", claim["statement"], claim["metric"], figures, verdict])
    return table(["method", "claim", "metric", "mean ± deviation over seeds", "verdict"], rows)


def _of(claim: Claim) -> list[tuple[str, list[float]]]:
    return list(claim["arms"].items())


def _versions(claim: Claim) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(claim["versions"].items()))


_INTRODUCTION = """# Claims

Every method restates the central claim of its paper as an experiment small enough to run on two cores: named baselines,
the same budget for every arm, at least three seeds, one metric, a direction and a margin. A claim that does not hold
stays in the table and says so.

`make claims` runs all of them again; `python -m claims kd --seeds 5` runs one. The figures come from
`claims/results/*.json` and nowhere else.

"""
