"""How well `limbeck plan` predicts: time and memory of each stage of a recipe, against what they turn out to be.

    python benchmarks/plan.py [RECIPE …] [--csv FILE]

`ours` is predicted, `peer` measured: seconds of training as the run records them, and the most bytes alive in tensors
while the stage trains.
"""

import argparse
import csv
import datetime
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limbeck.core.run import Run
from limbeck.experiment import Experiment
from limbeck.metrics.memory import PeakMemory
from limbeck.planning import Plan, plan
from limbeck.running import resolve, run

COLUMNS = ("benchmark", "case", "ours", "peer", "ratio", "unit", "hardware", "date")
Row = dict[str, object]


def main() -> None:
    """Measures the recipes named on the command line, prints the rows and appends them to a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["digits-kd", "digits-feature"])
    parser.add_argument("--csv", type=Path, help="table to append to")
    arguments = parser.parse_args()
    rows = [row for recipe in arguments.recipes for row in measure(recipe)]
    for row in rows:
        print(f"{row['benchmark']:12} {row['case']:28} {row['ours']:>12} {row['peer']:>12} {row['ratio']} {row['unit']}")
    if arguments.csv is not None:
        append(arguments.csv, rows)


def measure(recipe: str) -> Iterator[Row]:
    """Predicted and actual figures of each stage."""
    predicted = plan(recipe)
    with tempfile.TemporaryDirectory() as folder:
        results = run(recipe, Path(folder) / "run", quiet=True).results()
    peaks = peak_bytes(recipe)
    for stage in predicted.stages:
        case = f"{recipe}/{stage.stage}"
        yield row("plan-time", case, stage.seconds, results[stage.stage]["seconds"], "s", predicted)
        yield row("plan-memory", case, stage.memory_bytes / 2**20, peaks[stage.stage] / 2**20, "MiB", predicted)


def peak_bytes(recipe: str) -> dict[str, int]:
    """The most bytes alive in tensors while each stage is built and trained; a run of its own, since it slows down."""
    resolved, peaks = resolve(recipe), {}
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(resolved, Run(Path(folder)))
        experiment.prepare(resolved.stages[0])  # opens the data, which no plan counts
        for stage in resolved.stages:
            with PeakMemory(experiment.world.device) as peak:
                prepared = experiment.prepare(stage)
                experiment.results[stage.name] = experiment.trainer(stage, prepared, lambda row: None).fit()
            peaks[stage.name] = peak.peak_bytes
            del prepared
    return peaks


def row(benchmark: str, case: str, ours: float, peer: float, unit: str, predicted: Plan) -> Row:
    """One line of the table."""
    values = (benchmark, case, f"{ours:.4g}", f"{peer:.4g}", f"{ours / peer:.3f}", unit)
    hardware = f"{platform.machine()}, {predicted.device}"
    return dict(zip(COLUMNS, (*values, hardware, datetime.date.today().isoformat()), strict=True))


def append(path: Path, rows: list[Row]) -> None:
    """Appends rows to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
