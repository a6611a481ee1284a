"""Asking a server: one POST an answer, a deadline each, and more attempts where a failure may pass."""

import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from limbeck.core.errors import LimbeckError, UsageError

Answer = TypeVar("Answer")

_LARGEST = 1 << 28  # bytes of an answer
_PIECE = 1 << 16
_LONGEST_WAIT = 60.0  # seconds between two attempts
_MAY_PASS = (408, 425, 429, *range(500, 600))


class ServedTeacherError(LimbeckError):
    """The server gave no answer that can be trained on, however often it was asked."""


class BadAnswerError(Exception):
    """One answer that cannot be used; `wait` is how long the server wants to be left alone, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.final = reason, wait, final


class Endpoint:
    """One address of a server.

    Args:
        url: http or https, whole.
        key_variable: environment variable that holds the key; None sends none.
        timeout: seconds in which an answer has to be there.
        retries: further attempts after one that failed.
        backoff: seconds before the second attempt; doubled with each, up to 60, and drawn from the upper half of that.

    Raises:
        UsageError: no such kind of address, or the variable is not set.
    """

    def __init__(
        self, url: str, key_variable: str | None = None, timeout: float = 60.0, retries: int = 5, backoff: float = 1.0
    ) -> None:
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self._parts = split_url(url)
        self._key_variable = key_variable
        self._key()  # whether it is there is seen now; it is read anew each time and kept nowhere
        self._draws = random.Random()  # its own: the process's stream belongs to training
        self.stopped = threading.Event()

    def ask(self, body: dict[str, Any], read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the answer to a request; it raises `BadAnswerError` for one that is wrong.

        Raises:
            ServedTeacherError: every attempt failed; the message says how the last one did.
        """
        attempts = self.retries + 1
        for attempt in range(attempts):
            try:
                return read(self._post(body))
            except BadAnswerError as error:
                if error.final or attempt + 1 == attempts or self.stopped.is_set():
                    raise self._given_up(error, attempt + 1) from error
                self.stopped.wait(max(self._pause(attempt), min(error.wait, _LONGEST_WAIT)))
        raise AssertionError("unreachable")

    def _pause(self, attempt: int) -> float:
        """Seconds before the next attempt; drawn, so that many clients do not come back at one moment."""
        return min(_LONGEST_WAIT, self.backoff * 2**attempt) * self._draws.uniform(0.5, 1.0)

    def _given_up(self, error: BadAnswerError, attempts: int) -> ServedTeacherError:
        times = "once" if attempts == 1 else f"{attempts} times"
        return ServedTeacherError(
            f"the teacher at {self.url} was asked {times} and gave no usable answer: {error.reason}",
            "see to the server, then continue with: limbeck run FOLDER --resume",
        )

    def _post(self, body: dict[str, Any]) -> Any:
        """The JSON of one answer."""
        deadline = time.monotonic() + self.timeout
        connection = self._connection()
        try:
            connection.request("POST", self._parts.path, json.dumps(body), self._headers())
            stream = connection.sock
            response = connection.getresponse()
            content = _read(response, stream, deadline)
        except TimeoutError:
            raise BadAnswerError(f"no whole answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise BadAnswerError(f"the connection failed ({type(error).__name__}: {error})") from error
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(response, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadAnswerError("the answer is no JSON; it may have been cut short") from error

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=self.timeout)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = self._key()
        return headers if key is None else {**headers, "Authorization": f"Bearer {key}"}

    def _key(self) -> str | None:
        if self._key_variable is None:
            return None
        key = os.environ.get(self._key_variable)
        if not key:
            raise UsageError(
                f"the environment variable {self._key_variable} is not set", "it holds the key of the teacher's server"
            )
        return key


def split_url(url: str) -> SplitResult:
    """An address in its parts.

    Raises:
        UsageError: it is not one of http or https, or holds a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_sound_port(parts):
        raise UsageError(f"'{url}' is no address of a server", "give one like http://localhost:8000/v1")
    if parts.username or parts.password:
        raise UsageError(
            "the server's address holds a name or password", "name an environment variable in key_variable"
        )
    return parts


def _has_sound_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _read(response: http.client.HTTPResponse, stream: socket.socket, deadline: float) -> bytes:
    """The body, all of it before the deadline: a server that sends a byte now and then does not hold us up."""
    pieces, size = [], 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if stream.fileno() >= 0:
            stream.settimeout(left)
        piece = response.read1(_PIECE)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
        if size > _LARGEST:
            raise BadAnswerError(f"more than {_LARGEST:,} bytes", final=True)
    if response.length:  # of what was announced something is missing
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _refusal(response: http.client.HTTPResponse, content: bytes) -> BadAnswerError:
    said = " ".join(content[:300].decode(errors="replace").split())[:200]
    try:
        wait = float(response.headers.get("Retry-After") or 0.0)
    except ValueError:  # a date
        wait = 0.0
    reason = f"status {response.status}" + (f" ({said})" if said else "")
    return BadAnswerError(reason, wait, final=response.status not in _MAY_PASS)
