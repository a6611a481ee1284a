"""How well `limbeck plan` predicts: time and memory of each stage of a recipe, against what they turn out to be.

    python benchmarks/plan.py [RECIPE …] [--csv FILE]

`ours` is predicted, `peer` measured: seconds of training as the run records them, and the most bytes alive in tensors
while the stage trains.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limbeck.core.run import Run
from limbeck.experiment import Experiment
from limbeck.metrics.memory import PeakMemory
from limbeck.planning import plan
from limbeck.running import resolve, run
from results import append_row

Figure = tuple[str, str, float, float, str]


def main() -> None:
    """Measures the recipes named on the command line, prints the figures and adds them to a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["digits-kd", "digits-feature"])
    parser.add_argument("--csv", type=Path, help="table to add to")
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        for benchmark, case, predicted, actual, unit in measure(recipe):
            ratio = predicted / actual
            print(f"{benchmark:12} {case:28} {predicted:10.4g} {actual:10.4g} {unit:4} {ratio:.3f}", flush=True)
            append_row(arguments.csv, benchmark, case, predicted, actual, ratio, unit)


def measure(recipe: str) -> Iterator[Figure]:
    """Predicted and actual figures of each stage."""
    predicted = plan(recipe)
    with tempfile.TemporaryDirectory() as folder:
        results = run(recipe, Path(folder) / "run", quiet=True).results()
    peaks = peak_bytes(recipe)
    for stage in predicted.stages:
        case, name = f"{recipe}/{stage.stage}", stage.stage
        yield "plan-time", case, stage.seconds, results[name]["seconds"], "s"
        yield "plan-memory", case, stage.memory_bytes / 2**20, peaks[name] / 2**20, "MiB"


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


if __name__ == "__main__":
    main()
