"""Typed errors, each with a hint on what to do and the exit code that the command line returns."""

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """Base of every error limbeck raises on purpose; `hint` says what to do, `exit_code` what the command returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(LimbeckError):
    """The caller asked for something impossible; nothing was written."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe holds a key or value that cannot be used; `key` is its dotted path."""

    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message, hint)
        self.key, self.bare_message = key, message


class UnknownNameError(UsageError):
    """No method, model, data set or recipe has this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        super().__init__(f"unknown {kind} '{name}'", did_you_mean(name, known))


class IncompatibleError(UsageError):
    """Two things that are fine alone do not go together (a text teacher and images, a feature method and no layers)."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'", f"pip install 'limbeck[{extra}]'")


class RunBusyError(UsageError):
    """Another process is writing to this run folder."""


class DamagedFileError(LimbeckError):
    """A stored file is truncated, altered or missing; `path` names it."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}", "restore the file, or resume from an older whole checkpoint")
        self.path = str(path)


class DiskFullError(LimbeckError):
    """There is no room for a file; what was there before is whole."""

    def __init__(self, path: object, needed: int, free: int) -> None:
        wanted = f"about {needed:,} bytes are needed, " if needed else ""
        super().__init__(
            f"the disk is full: {path} could not be written ({wanted}{free:,} are free)",
            "free some space, then continue with: limbeck run FOLDER --resume",
        )
        self.path, self.needed, self.free = str(path), needed, free


class NonFiniteError(LimbeckError):
    """A loss or gradient is NaN or infinite; it did not reach the optimizer."""

    def __init__(self, step: int, player: str, where: str, items: list[int] | None) -> None:
        ids = f", batch items {items}" if items else ""
        super().__init__(
            f"{where} is not finite at step {step}, player '{player}'{ids}",
            "lower the learning rate, clip gradients (train.clip_norm), or choose train.non_finite: skip or rewind",
        )
        self.step, self.player, self.where, self.items = step, player, where, items


class Interrupted(LimbeckError):
    """SIGTERM or SIGINT arrived; a checkpoint is on disk and the run can be resumed."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing comes near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """One line that offers the nearest known name, or lists what there is."""
    known = list(known)
    match = nearest(name, known)
    if match:
        return f"did you mean '{match}'?"
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"known: {shown}" if known else "there are none"
