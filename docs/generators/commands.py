"""The reference of the command line, from the functions behind the commands."""

import re

from limbeck.cli.app import COMMANDS, app

from .markdown import NOTICE

_INTRODUCTION = """# Command line

Everything here is one call in Python too, see the [API](api.md). Exit codes: 0 done, 1 failure, 2 bad usage or recipe,
3 interrupted and resumable. `--debug` shows the traceback of a failure.

"""


def commands_page() -> str:
    """The page of all commands with their arguments and options."""
    sections = [_section(name) for name in COMMANDS]
    return NOTICE + _INTRODUCTION + "\n".join(sections)


def _section(name: str) -> str:
    text = app[name].generate_docs(output_format="markdown", heading_level=2)
    text = re.sub(r", --(no|empty)-[\w-]+", "", text)  # negations, which the commands do not take
    return re.sub(rf"```console\n{name}\b", f"```console\n$ limbeck {name}", text).rstrip() + "\n"
