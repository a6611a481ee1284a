"""HTML from templates in which every value is escaped, unless it is HTML made here."""

import html
import json
import math
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def fill(template: str, *values: Any, **named: Any) -> Html:
    """A template of `str.format` with its values escaped; `Html` goes in as it is, and numbers take format codes.

    Example::

        fill("<td title='{}'>{}</td>", "a < b", fill("<b>{}</b>", 3))
    """
    return Html(template.format(*map(_safe, values), **{name: _safe(value) for name, value in named.items()}))


def escape(value: Any) -> str:
    """Text that is safe between tags and within quoted attributes; `Html` as it is."""
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def join(parts: Iterable[str]) -> Html:
    """Pieces of HTML one after the other; a piece that is plain text is escaped."""
    return Html("".join(map(escape, parts)))


def data_block(name: str, value: Any) -> Html:
    """Plain data for the page's script, as JSON in which no text can end the element or start a comment."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _safe(value: Any) -> Any:
    return value if isinstance(value, int | float) else escape(value)


def _finite(value: Any) -> Any:
    """The same data with None for NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
