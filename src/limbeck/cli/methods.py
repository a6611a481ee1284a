"""`limbeck methods`: what there is, and one method's card."""

import json
import re
from typing import Any, get_args

from limbeck.cli.parameters import Json
from limbeck.core import catalogue
from limbeck.core.card import Family
from limbeck.core.errors import UsageError, did_you_mean
from limbeck.listing import claim_status, list_methods


def list_or_show(
    slug: str | None = None,
    /,
    *,
    family: str | None = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one with its options.

    Parameters
    ----------
    slug
        Name of a method to show.
    family
        Only this family: classic, vision, language, trajectory, distribution, scenes, datasets, conversion.
    as_json
        Print JSON.
    """
    if family is not None and family not in get_args(Family):
        raise UsageError(f"unknown family '{family}'", did_you_mean(family, get_args(Family)))
    if slug is None:
        rows = list_methods(family)
        _print_json(rows) if as_json else _list(rows)
        return
    entry = catalogue.entry(slug)
    _print_json({**entry, "claim": claim_status(slug, entry)}) if as_json else _show(slug, entry)


def _list(rows: list[dict[str, Any]]) -> None:
    from limbeck.cli.tables import show_table

    keys = ("slug", "family", "year", "arxiv", "needs", "claim", "title")
    cells = [[", ".join(row[key]) if key == "needs" else str(row[key]) for key in keys] for row in rows]
    show_table(keys, cells, left=keys)


def _show(slug: str, entry: dict[str, Any]) -> None:
    from limbeck.cli.tables import show_table

    card = entry["card"]
    source = f", arXiv {card['arxiv']}" if card["arxiv"] else ""
    print(f"{slug}: {card['title']} ({card['year']}{source})\n")
    print(f"{card['use']}\n\n{_plain(entry['description'])}\n")
    print(f"family {card['family']}; needs {', '.join(card['needs'])}; claim: {claim_status(slug, entry)}\n")
    schema = entry["options"]
    rows = [option_row(name, option, schema) for name, option in schema.get("properties", {}).items()]
    if rows:
        show_table(("option", "type", "range", "default", "meaning"), rows, left=("option", "type", "range", "meaning"))
    else:
        print("no options")


def option_row(name: str, option: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """An option as name, type, range, default and meaning."""
    default = json.dumps(option["default"]) if "default" in option else "required"
    return [name, _type(option, schema), _range(option), default, option.get("description", "")]


def _type(option: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in option:
        return _type(schema["$defs"][option["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in option:
        return " or ".join(_type(one, schema) for one in option["anyOf"])
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    if option.get("type") == "array" and isinstance(option.get("items"), dict):
        return f"list of {_type(option['items'], schema)}"
    return str(option.get("const", option.get("type", "any")))


def _range(option: dict[str, Any]) -> str:
    """The values allowed, as an interval: `[0, 1)`."""
    known = next((one for one in option.get("anyOf", ()) if _bounds(one) != ("(-inf", "inf)")), option)
    low, high = _bounds(known)
    return "" if (low, high) == ("(-inf", "inf)") else f"{low}, {high}"


def _bounds(option: dict[str, Any]) -> tuple[str, str]:
    low = f"[{option['minimum']:g}" if "minimum" in option else f"({option.get('exclusiveMinimum', '-inf')}"
    high = f"{option['maximum']:g}]" if "maximum" in option else f"{option.get('exclusiveMaximum', 'inf')})"
    return low, high


def _plain(text: str) -> str:
    """A docstring without the marks of reStructuredText; formulas stay as LaTeX."""
    text = re.sub(r"^\.\. math::[ \t]*\n*[ \t]*", "    ", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text)
    return text.replace("``", "`")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
