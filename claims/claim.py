"""What a claim is, how it is judged, and what is kept of it."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from limbeck.metrics.intervals import paired_wins, t_interval

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """One method's claim.

    Attributes:
        slug: the method's.
        statement: what should be seen, in one sentence.
        metric: name of the figure that `run` returns for each arm.
        budget: what every arm gets alike.
        claimed: name of the arm that should win.
        baseline: name of the arm that it should beat.
        margin: least difference of the means in favour of the claim, in units of the metric.
        run: one seed of all arms: seed -> figure by arm.
        also: further arms to beat, each with the least difference of the means.
        methods: arms that are other methods of the library, by slug: what their pages show.
        higher_is_better: direction of the metric.
        seeds: how many by default.
    """

    slug: str
    statement: str
    metric: str
    budget: str
    claimed: str
    baseline: str
    margin: float
    run: Callable[[int], Mapping[str, float]]
    also: Mapping[str, float] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    higher_is_better: bool = True
    seeds: int = 5


@dataclass(frozen=True)
class Result:
    """What was seen: every seed of every arm, and whether the claim holds.

    It holds when the mean difference reaches the margin, at least four seeds in five are won, and the further arms are
    beaten by their margins.
    """

    slug: str
    statement: str
    metric: str
    higher_is_better: bool
    budget: str
    claimed: str
    baseline: str
    margin: float
    also: dict[str, float]
    methods: dict[str, str]
    seeds: list[int]
    arms: dict[str, list[float]]
    difference: float
    wins: int
    holds: bool
    seconds: float
    versions: dict[str, str]
    hardware: str
    date: str

    def save(self, folder: Path = RESULTS) -> Path:
        """Writes the result as JSON and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.slug}.json"
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")
        return path

    def summary(self, arm: str) -> str:
        """Mean and half-width of the 95 % interval of one arm."""
        centre, half = t_interval(self.arms[arm])
        return f"{centre:.4f} ± {half:.4f}"


def judge(claim: Claim, seeds: Sequence[int], progress: Callable[[str], None] = lambda text: None) -> Result:
    """Runs every seed of a claim and judges it."""
    begun = time.perf_counter()
    arms: dict[str, list[float]] = {}
    for seed in seeds:
        figures = claim.run(seed)
        for arm, value in figures.items():
            arms.setdefault(arm, []).append(float(value))
        progress(f"{claim.slug}, seed {seed}: " + ", ".join(f"{arm} {value:.4f}" for arm, value in figures.items()))
    sign = 1 if claim.higher_is_better else -1
    gains = {arm: sign * (mean(arms[claim.claimed]) - mean(values)) for arm, values in arms.items()}
    wins = paired_wins(arms[claim.claimed], arms[claim.baseline], claim.higher_is_better)
    asked = {claim.baseline: claim.margin, **claim.also}
    about: dict[str, Any] = {
        name: getattr(claim, name)
        for name in ("slug", "statement", "metric", "higher_is_better", "budget", "claimed", "baseline", "margin")
    }
    return Result(
        **about,
        also=dict(claim.also),
        methods=dict(claim.methods),
        seeds=list(seeds),
        arms=arms,
        difference=gains[claim.baseline],
        wins=wins,
        holds=wins >= 0.8 * len(seeds) and all(gains[arm] >= margin for arm, margin in asked.items()),
        seconds=round(time.perf_counter() - begun, 1),
        versions={name: version(name) for name in ("limbeck", "torch")},
        hardware=f"{platform.machine()}, {os.cpu_count()} cores",
        date=date.today().isoformat(),
    )
