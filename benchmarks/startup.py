"""Seconds until something happens: importing limbeck, its help, refusing a bad recipe; each as a whole process.

Run: python benchmarks/startup.py [--csv benchmarks/results.csv]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from results import append_row, machine

RUNS = 9


def seconds(command: Sequence[str]) -> float:
    """Median wall time of a command over several runs, after one that warms the disk's cache."""
    spent = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def main() -> None:
    """Prints a line a case and appends it to the table; the peer of each is its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    csv = parser.parse_args().csv
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.yaml"
        bad.write_text("stages: [{name: a, method: kdd, student: convnet, train: {steps: 1}}]\n")
        bare = seconds([python, "-c", "pass"])
        cases = {
            "import limbeck, beyond Python's own start": (seconds([python, "-c", "import limbeck"]) - bare, 0.1),
            "limbeck --help": (seconds([python, "-m", "limbeck", "--help"]), 0.3),
            "a bad recipe refused": (seconds([python, "-m", "limbeck", "run", str(bad)]), 1.0),
        }
    for case, (spent, limit) in cases.items():
        print(f"{case}: {spent:.3f} s, limit {limit} s")
        append_row(csv, "startup", case, spent, limit, limit / spent, "s, against its limit")
    print(machine())


if __name__ == "__main__":
    main()
