"""SIGTERM and SIGINT become a request that the work answers at its next safe point."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from limbeck.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[str] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context a first signal asks the work to stop at the next `pause`; a second one stops it at once.

    Nested contexts share one request. Outside the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _on_signal:
        yield
        return
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, _on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether a signal asked the work to stop."""
    return bool(_received)


def pause(message: str = "stopped between two steps") -> None:
    """A safe point: raises `Interrupted` if the work was asked to stop."""
    if _received:
        raise interruption(message)


def interruption(message: str) -> Interrupted:
    """The exception that ends the work; the signal may have reached another process that works on it too."""
    received = f"{_received[0]} received" if _received else "another process was told to stop"
    return Interrupted(f"{received}; {message}", "resume with: limbeck run FOLDER --resume")


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _received:
        raise KeyboardInterrupt
    _received.append(signal.Signals(number).name)
