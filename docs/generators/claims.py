"""Claims as tables: what was measured, of whom, on how many seeds, and whether the paper's statement held."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.metrics.intervals import t_interval

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
    conditions = [claim["budget"], f"{claim['seconds']:.0f} s in all", claim["hardware"], claim["date"]]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(claim["versions"].items()))
    return (
        f"{claim['statement']}\n\nThe claim **{_verdict(claim)}**: {claim['claimed']} against {claim['baseline']} "
        f"{claim['difference']:+.4f} (margin asked for: {claim['margin']:g}), {_won(claim)} seeds won.\n\n"
        f"{_arms(claim)}\n{'; '.join(conditions)}. Versions: {versions}.\n"
        f"Run it again with `python -m claims {claim['slug']}{_seeds(claim)}`.\n"
    )


def measured_elsewhere(slug: str, claims: dict[str, Claim]) -> str:
    """What the claims of other methods, of which this one is an arm, say of it; empty where it is in none."""
    parts = []
    for other, claim in claims.items():
        arm = claim.get("methods", {}).get(slug)
        if arm is None:
            continue
        named = dict.fromkeys([claim["claimed"], arm, claim["baseline"]])
        rows = [[f"{name} (this method)" if name == arm else name, figure(claim["arms"][name])] for name in named]
        where = f"the claim of [`{other}`]({other}.md), on {len(claim['seeds'])} seeds: {claim['budget']}."
        header = ["arm", f"{claim['metric']} ± 95 % ({_direction(claim)})"]
        parts.append(f"Measured as the arm *{arm}* of {where}\n\n{table(header, rows)}")
    return "\n".join(parts)


def figure(values: Sequence[float]) -> str:
    """Mean over seeds, with the half-width of its 95 % interval."""
    centre, half = t_interval(values)
    return f"{centre:.4f} ± {half:.4f}" if math.isfinite(half) else f"{centre:.4f}"


def _arms(claim: Claim) -> str:
    rows = [
        [name, figure(values), ", ".join(f"{value:.4f}" for value in values)] for name, values in claim["arms"].items()
    ]
    return table(["arm", f"{claim['metric']} ± 95 % ({_direction(claim)})", "every seed"], rows)


def _overview(claims: dict[str, Claim], prefix: str) -> str:
    header = ["method", "claim", "metric", "baseline ± 95 %", "method ± 95 %", "seeds won", "verdict"]
    rows = []
    for slug, claim in claims.items():
        baseline, claimed = (figure(claim["arms"][claim[side]]) for side in ("baseline", "claimed"))
        link = f"[`{slug}`]({prefix}{slug}.md)"
        rows.append([link, claim["statement"], claim["metric"], baseline, claimed, _won(claim), _verdict(claim)])
    return table(header, rows)


def _direction(claim: Claim) -> str:
    return "higher is better" if claim["higher_is_better"] else "lower is better"


def _seeds(claim: Claim) -> str:
    """What names the seeds on the command line, where they are not the first ones."""
    return f" --first {claim['seeds'][0]}" if claim["seeds"][0] else ""


def _verdict(claim: Claim) -> str:
    return "holds" if claim["holds"] else "does not hold"


def _won(claim: Claim) -> str:
    return f"{claim['wins']}/{len(claim['seeds'])}"


_INTRODUCTION = """# Claims

Every method restates the central claim of its paper as an experiment small enough to run on two cores: named baselines,
the same budget for every arm, at least three seeds, one metric, a direction and a margin. A claim that does not hold
stays in the table and says so.

`make claims` runs all of them again; `python -m claims kd --seeds 5` runs one. The figures come from
`claims/results/*.json` and nowhere else.

"""
