"""Single values written as text: on the command line, and in a search."""

from typing import Any

import yaml

from limbeck.core.errors import UsageError


def parse_scalar(key: str, text: str) -> Any:
    """One value, read as YAML.

    Raises:
        UsageError: it is no YAML; `key` says where.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: '{text}' is no YAML value", "put the value in quotes") from error
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-3 for a string, since it wants 1.0e-3
            return float(value) if value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value
