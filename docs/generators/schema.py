"""Tables of options from the JSON schemas of pydantic models: name, type and range, default, meaning."""

import json
from typing import Any

from .markdown import table

Schema = dict[str, Any]
_TYPES = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false", "object": "mapping"}


def option_table(schema: Schema) -> str:
    """One row a field, in the order of the class."""
    rows = [
        [f"`{name}`", _type(field, schema), _default(name, field, schema), field.get("description", "")]
        for name, field in schema.get("properties", {}).items()
    ]
    return table(["key", "value", "default", "meaning"], rows) if rows else "There are no options.\n"


def _type(field: Schema, root: Schema) -> str:
    if "$ref" in field:
        title = field["$ref"].rpartition("/")[2]
        return "any plain value" if title == "JsonValue" else f"[{title}](#{title.lower()})"
    for key in ("anyOf", "allOf", "oneOf"):
        if key in field:
            kinds = [_type(kind, root) for kind in field[key] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    return _plain_type(field, root)


def _plain_type(field: Schema, root: Schema) -> str:
    kind = field.get("type")
    if kind == "array":
        items = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return f"list of {_type(items, root)}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict) and field["additionalProperties"]:
        return f"mapping of names to {_type(field['additionalProperties'], root)}"
    return f"{_TYPES.get(str(kind), 'any plain value')}{_range(field)}"


def _range(field: Schema) -> str:
    """The allowed interval in the usual brackets: round ones leave the end out."""
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    left = "[" if "minimum" in field else "("
    right = "]" if "maximum" in field else ")"
    return f" in {left}{'−∞' if low is None else _number(low)}, {'∞' if high is None else _number(high)}{right}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _default(name: str, field: Schema, root: Schema) -> str:
    if name in root.get("required", ()):
        return "required"
    value = field.get("default")
    if value is None:
        return ""
    if isinstance(value, dict):
        return "see below" if value else ""
    return "" if value == [] else f"`{json.dumps(value)}`"
