"""Values that an option's JSON schema forbids, derived from the schema itself."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

WRONG_TYPE: dict[str, Any] = {
    "number": "warm", "integer": 2.5, "boolean": "perhaps", "string": 7, "array": 7, "object": 7, "null": "none"
}  # fmt: skip


def properties(schema: Schema) -> dict[str, Schema]:
    """The options of a method by name, with references to shared definitions followed."""
    shared = schema.get("$defs", {})
    return {name: _followed(entry, shared) for name, entry in schema.get("properties", {}).items()}


def bad_values(entry: Schema) -> Iterator[Any]:
    """Values that no branch of one option's schema allows: out of its range, off its list, of another type."""
    branches = entry.get("anyOf", [entry])
    wrong = [value for branch in branches for value in _bad_for(branch)]
    yield from (value for value in wrong if not any(_allows(branch, value) for branch in branches))


def numeric(entry: Schema) -> list[Schema]:
    """The branches of an option that are numbers."""
    return [branch for branch in entry.get("anyOf", [entry]) if branch.get("type") in ("number", "integer")]


def bounded(branch: Schema) -> bool:
    """Whether a number has a least and a greatest value."""
    return bool({"minimum", "exclusiveMinimum"} & branch.keys() and {"maximum", "exclusiveMaximum"} & branch.keys())


def _bad_for(branch: Schema) -> Iterator[Any]:
    if "enum" in branch or "const" in branch:
        yield "no such choice"
    if "minimum" in branch:
        yield branch["minimum"] - 1
    if "exclusiveMinimum" in branch:
        yield branch["exclusiveMinimum"]
    if "maximum" in branch:
        yield branch["maximum"] + max(1, abs(branch["maximum"]))
    if "exclusiveMaximum" in branch:
        yield branch["exclusiveMaximum"]
    if "type" in branch:
        yield WRONG_TYPE[branch["type"]]
    if branch.get("type") == "array":
        yield from ([value] for value in bad_values(branch.get("items", {})))


def _allows(branch: Schema, value: Any) -> bool:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(branch).is_valid(value)


def _followed(entry: Schema, shared: dict[str, Schema]) -> Schema:
    reference = entry.get("$ref")
    return {**shared[reference.rpartition("/")[2]], **entry} if reference else entry
