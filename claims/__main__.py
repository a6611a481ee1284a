"""`python -m claims [slug…] [--seeds N] [--json]`: runs claims, prints a table, keeps each result as JSON."""

import importlib
import json
import pkgutil
import sys
from dataclasses import asdict
from typing import Annotated

import cyclopts
from rich.console import Console
from rich.table import Table

import claims
from claims.claim import Claim, Result, judge

_NOT_CLAIMS = {"claim", "digits", "pydoc", "points", "families", "quantization", "synthetic_digits", "vision_table"}


def all_claims() -> dict[str, Claim]:
    """Every claim by slug: the `claim` of each module here."""
    names = [module.name for module in pkgutil.iter_modules(claims.__path__)]
    modules = [importlib.import_module(f"claims.{name}") for name in names if name not in {*_NOT_CLAIMS, "__main__"}]
    return {module.claim.slug: module.claim for module in modules if hasattr(module, "claim")}


def table(results: list[Result]) -> Table:
    """Every arm of every claim, and the verdict."""
    made = Table("method", "arm", "mean ± 95 %", "difference", "margin", "seeds won", "holds", title="Claims")
    for result in results:
        for arm in result.arms:
            made.add_row(*_row(result, arm))
        made.add_section()
    return made


def _row(result: Result, arm: str) -> list[str]:
    if arm != result.claimed:
        return ["", arm, result.summary(arm), "", "", "", ""]
    won = f"{result.wins}/{len(result.seeds)}"
    verdict = [f"{result.difference:+.4f}", f"{result.margin:.4f}", won, "yes" if result.holds else "no"]
    return [result.slug, arm, result.summary(arm), *verdict]


def main(
    *slugs: str,
    seeds: Annotated[int | None, cyclopts.Parameter(help="seeds a claim; each claim's own number if absent")] = None,
    first: Annotated[int, cyclopts.Parameter(help="first seed")] = 0,
    as_json: Annotated[bool, cyclopts.Parameter(name="--json", help="print JSON in place of the table")] = False,
    save: Annotated[bool, cyclopts.Parameter(help="keep the results under claims/results")] = True,
) -> None:
    """Runs claims and prints what was seen."""
    known = all_claims()
    unknown = [slug for slug in slugs if slug not in known]
    if unknown:
        print(f"error: no claim '{unknown[0]}'; known: {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    console = Console(stderr=as_json)
    results = []
    for slug in slugs or known:
        claim = known[slug]
        count = seeds or claim.seeds
        results.append(judge(claim, range(first, first + count), console.print))
        if save:
            results[-1].save()
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        console.print(table(results))


if __name__ == "__main__":
    cyclopts.run(main)
