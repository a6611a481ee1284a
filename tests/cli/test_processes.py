"""The command as a process of its own: what it imports, how it starts, and how it ends."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, write

_LIMBECK = [sys.executable, "-m", "limbeck"]
_TORCH_FREE = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"


def _python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "import limbeck",
        "import limbeck; limbeck.list_methods()",
        "from limbeck.cli import main; assert main(['--help']) == 0",
        "from limbeck.cli import main; assert main(['run', '--help']) == 0",
        "from limbeck.cli import main; assert main(['sweep', '--help']) == 0",
        "from limbeck.cli import main; assert main(['methods']) == 0",
        "from limbeck.cli import main; assert main(['methods', 'kd', '--json']) == 0",
        "from limbeck.cli import main; assert main(['run', 'digits-kd', '--dry-run']) == 0",
        "from limbeck.cli import main; assert main(['plan', 'digits-kd', '--seed', 'x']) == 2",
        "from limbeck.cli import main; assert main(['sweep', 'digits-kd', '--search', 'sed=1:3']) == 2",
        "from limbeck.core.recipe import load_recipe; load_recipe('digits-kd', {'seed': 3})",
    ],
)
def test_nothing_imports_torch(code: str) -> None:
    done = _python(f"{code}\n{_TORCH_FREE}")
    assert done.returncode == 0, done.stderr


def test_importing_limbeck_is_quick() -> None:
    done = _python("import limbeck", "-X", "importtime")
    lines = [line for line in done.stderr.splitlines() if line.rstrip().endswith("| limbeck")]
    seconds = int(lines[0].split("|")[1]) / 1e6
    print(f"\nimport limbeck: {1000 * seconds:.0f} ms")
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert not {"pydantic", "numpy", "yaml", "rich", "torch"} & set(modules)


@pytest.mark.parametrize("words", [["run", "digit-kd"], ["run", "digits-kd", "--seed", "x"], ["methods", "kdd"]])
def test_a_bad_command_is_refused_at_once(words: list[str], tmp_path: Path) -> None:
    # Processor time, which unlike the time on the clock does not depend on what else the machine does.
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*_LIMBECK, *words], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(f"\n{' '.join(words)}: {spent:.2f} s of processor time, {wall:.2f} s on the clock")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert spent < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)  # two processes that import torch, on a machine that may be busy
def test_a_signal_during_the_imports_ends_in_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.yaml", TINY)
    command = [*_LIMBECK, "run", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for_torch(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "SIGTERM received" in said
    assert f"limbeck run {tmp_path / 'run'} --resume" in said
    assert "Traceback" not in said
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_a_reader_that_leaves_is_no_failure_to_speak_of() -> None:
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run([*_LIMBECK, "methods"], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write_end)
    assert done.stderr == ""


def _wait_for_torch(process: subprocess.Popen[str]) -> None:
    """Returns while the process is importing torch: its libraries are mapped before its modules are ready."""
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 120
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
