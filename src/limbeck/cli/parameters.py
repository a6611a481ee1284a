"""Kinds of parameters that commands share."""

from typing import Annotated

from cyclopts import Parameter

Flag = Annotated[bool, Parameter(show_default=False)]
"""A switch; that it is off by default goes without saying."""

Json = Annotated[bool, Parameter(name="--json", show_default=False)]
"""The switch `--json`, in Python `as_json`."""

Overrides = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
"""Words beyond the command's own options, for `parse_overrides`."""
