"""The table of benchmark results: one row a measurement, with the machine it was made on."""

import csv
import platform
from datetime import date
from pathlib import Path

import torch

COLUMNS = ("benchmark", "case", "ours", "peer", "ratio", "unit", "hardware", "date")


def machine() -> str:
    """The accelerator's name, or the processor's kind and the threads used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in _processor_lines() if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {torch.get_num_threads()} threads"


def append_row(path: Path | None, benchmark: str, case: str, ours: float, peer: float, ratio: float, unit: str) -> None:
    """Replaces the row of the same benchmark, case, unit and hardware, or adds one; nothing without a path."""
    if path is None:
        return
    row = dict(zip(COLUMNS, (benchmark, case, f"{ours:.4g}", f"{peer:.4g}", f"{ratio:.3f}", unit, machine(),
                             date.today().isoformat()), strict=True))  # fmt: skip
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    same = ("benchmark", "case", "unit", "hardware")
    rows = [other for other in rows if any(other[key] != row[key] for key in same)] + [row]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _processor_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []
