"""What the fault tests share: a fast folder, an undisturbed run to compare with, and totals at the session's end."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.faults import training

Tally = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Counts an attempt, and a success if the block ends without an error: `with tally("kills survived"): …`."""
    properties = request.node.user_properties  # these travel with the reports, also from pytest-xdist's workers

    @contextmanager
    def count(what: str) -> Iterator[None]:
        properties.append(("fault", [what, False]))
        attempt = properties[-1][1]
        yield
        attempt[1] = True

    return count


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the ordinary disk's fsync is what these tests would mostly wait for."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="limbeck-", dir=shared))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> training.Undisturbed:
    """The ordinary run without any disturbance; it also imports everything, so that forked children start at once."""
    return training.Undisturbed.of(training.RECIPE, tmp_path_factory.mktemp("undisturbed"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, value in getattr(report, "user_properties", ()) if report.when == "call" else ():
                if name == "fault":
                    totals[value[0]][0] += value[1]
                    totals[value[0]][1] += 1
    if totals:
        listed = ", ".join(f"{what} {good}/{tried}" for what, (good, tried) in sorted(totals.items()))
        terminalreporter.write_line(f"faults: {listed}")
