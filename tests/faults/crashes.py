"""Stops a process at any one of the calls that change a run's folder: before it, half-way, or as by a power cut.

The calls are `durable`'s `_write`, `_fsync` and `_rename`, and `shutil.rmtree`.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from limbeck.core import durable

How = Literal["before", "torn", "power cut"]
HOW: tuple[How, ...] = ("before", "torn", "power cut")
"""`before`: the call is not made. `torn`: of what it writes (or deletes) a half is there (or gone). `power cut`: the
call is not made, and of every file that was written but not synced yet the bytes are lost."""

CRASHED = 77
"""Exit code of a process that was stopped here."""


class Crash:
    """Once installed, the process ends at the `point`-th call, counted from 0; None counts only."""

    def __init__(self, point: int | None = None, how: How = "before") -> None:
        self.point, self.how = point, how
        self.calls: list[bool] = []  # whether each call could be made by half
        self.unsynced: set[Path] = set()

    def points(self) -> list[tuple[int, How]]:
        """Every way to crash at one of the calls that were counted."""
        return [(i, how) for i, halves in enumerate(self.calls) for how in HOW if halves or how != "torn"]

    def install(self, replace: Callable[[Any, str, Any], Any] = setattr) -> "Crash":
        """Puts itself between limbeck and the disk; `replace` is `monkeypatch.setattr` where it has to be undone."""
        write, fsync, rename, rmtree = durable._write, durable._fsync, durable._rename, shutil.rmtree

        def crashing_write(path: Path, writer: Callable[[Path], Any]) -> None:
            self._arrive(lambda: (write(path, writer), _halve(path)))
            write(path, writer)
            self.unsynced |= set(_files(path))

        def crashing_fsync(path: Path) -> None:
            self._arrive()
            fsync(path)
            self.unsynced.discard(path)

        def crashing_rename(source: Path, target: Path) -> None:
            self._arrive()
            rename(source, target)
            self.unsynced = {_moved(path, source, target) for path in self.unsynced}

        def crashing_rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
            self._arrive(lambda: [file.unlink() for file in _files(path)[::2]])
            rmtree(path, *args, **kwargs)

        replace(durable, "_write", crashing_write)
        replace(durable, "_fsync", crashing_fsync)
        replace(durable, "_rename", crashing_rename)
        replace(shutil, "rmtree", crashing_rmtree)
        return self

    def _arrive(self, half: Callable[[], object] | None = None) -> None:
        self.calls.append(half is not None)
        if len(self.calls) - 1 != self.point:
            return
        self.point = None  # what a half does may call in here again
        if self.how == "torn" and half is not None:
            half()
        elif self.how == "power cut":
            for path in self.unsynced:
                if path.exists():
                    os.truncate(path, 0)
        os._exit(CRASHED)


def _files(path: Path) -> list[Path]:
    inside = sorted(path.rglob("*"), key=lambda file: file.stat().st_mtime_ns) if path.is_dir() else [path]
    return [file for file in inside if file.is_file()]


def _halve(path: Path) -> None:
    """Leaves the first half of the bytes, over the files in the order in which they were written."""
    left = sum(file.stat().st_size for file in _files(path)) // 2
    for file in _files(path):
        size = file.stat().st_size
        os.truncate(file, min(size, left)) if left else file.unlink()
        left -= min(size, left)


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path
