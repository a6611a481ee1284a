"""The command line: a thin layer over the Python API, one file a command."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from limbeck.core.errors import LimbeckError, UnknownNameError
from limbeck.core.interrupt import interruptible

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0 done, 1 failure, 2 bad usage or recipe, 3 interrupted.

    Args:
        arguments: the words after `limbeck`; those of this process if absent.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    # Signals are heeded from here on, before anything slow is imported: one that arrives meanwhile is not lost.
    with interruptible(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch([word for word in words if word != "--debug"])
        except BrokenPipeError:  # the reader of a pipe left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            return _explain(error)


def _dispatch(words: list[str]) -> int:
    from limbeck.cli.app import COMMANDS, app

    if words and not words[0].startswith("-") and words[0] not in COMMANDS:  # cyclopts would import every command here
        raise UnknownNameError("command", words[0], COMMANDS)
    result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    sys.stdout.flush()
    return result if isinstance(result, int) else DONE


def _explain(error: BaseException) -> int:
    """Says on stderr what went wrong and what to do, and returns the exit code."""
    from cyclopts import CycloptsError

    if isinstance(error, LimbeckError):
        _say("interrupted" if error.exit_code == INTERRUPTED else "error", error.message, error.hint)
        return error.exit_code
    if isinstance(error, CycloptsError):
        message, meant, suggestion = str(error).partition(" Did you mean ")
        _say("error", message, f"did you mean {suggestion}" if meant else "see limbeck --help")
        return BAD_USAGE
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted", "stopped at once; what was not saved is lost", "resume with: limbeck run FOLDER --resume")
        return INTERRUPTED
    _say("error", f"{type(error).__name__}: {error}", "run the command again with --debug for the traceback")
    return FAILED


def _say(kind: str, message: str, hint: str) -> None:
    print(f"{kind}: {message}", f"hint: {hint}" if hint else "", sep="\n", file=sys.stderr, flush=True)


def _show_warning(message: Any, *origin: Any, **more: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
