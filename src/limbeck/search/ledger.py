"""What a search has found out so far, kept on disk row by row, so that nothing is worked out twice."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.core.durable import needing_room, write_bytes

Row = dict[str, Any]


class Ledger:
    """Rows by key, one JSON object a line, each on disk before the next is worked out.

    A search that is a function of its seed and of these rows can be run again from the start after an interruption:
    it finds every row but the one that was being worked out.

    Args:
        path: the file; it is read if it is there, but for a last line that a crash cut short.
        write: whether this process writes it; of several that do the same work one does.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self.write = path, write
        self.rows: dict[str, Row] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if self._take(line)]
        if write and len(whole) < len(lines):
            write_bytes(path, b"".join(whole))  # a torn line would swallow the next row

    def get(self, key: Any, make: Callable[[], Row]) -> Row:
        """The row of a key (plain data), made and written when it is not there."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.rows:
            row = make()
            if self.write:
                self._append({"key": key, **row})
            self.rows[name] = row
        return self.rows[name]

    def _append(self, row: Row) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        with needing_room(self.path, len(line)), self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _take(self, line: bytes) -> bool:
        if not line.endswith(b"\n"):
            return False
        try:
            row = json.loads(line)
            self.rows[json.dumps(row.pop("key"), sort_keys=True)] = row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        return True
