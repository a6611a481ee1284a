"""What methods there are, read from the generated catalogue: torch is not imported."""

import contextlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from limbeck.core import catalogue

_CLAIMS = Path(__file__).resolve().parents[2] / "claims" / "results"
NO_CLAIM = "not measured"


def list_methods(family: str | None = None) -> list[dict[str, Any]]:
    """The methods in alphabetical order: `slug`, `title`, `arxiv`, `year`, `family`, `needs` and `claim` of each.

    Args:
        family: only the methods of this family; see `limbeck.core.card.Family`.
    """
    rows = []
    for slug, entry in sorted(catalogue.read().items()):
        card = entry["card"]
        if family in (None, card["family"]):
            shown = {key: card[key] for key in ("title", "arxiv", "year", "family", "needs")}
            rows.append({"slug": slug, **shown, "claim": claim_status(slug, entry)})
    return rows


def claim_status(slug: str, entry: dict[str, Any] | None = None) -> str:
    """How a method's claim stands: "holds", "does not hold", "arm of SLUG" of another method's, or "not measured".

    A checkout's `claims/results/SLUG.json` comes before what was noted in the catalogue when it was generated.
    """
    try:
        result = json.loads((_CLAIMS / f"{slug}.json").read_bytes())
    except (OSError, ValueError):
        return _arms(_CLAIMS).get(slug) or (entry or {}).get("claim", NO_CLAIM)
    if isinstance(result.get("status"), str):
        return result["status"]
    return "holds" if result.get("holds") else "does not hold"


@cache
def _arms(folder: Path) -> dict[str, str]:
    """In whose claim a method is an arm, by its slug."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(path.read_bytes())
            found |= dict.fromkeys(result.get("methods", {}), f"arm of {result['slug']}")
    return found
