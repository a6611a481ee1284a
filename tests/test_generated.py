"""Generated files are what the code would generate now."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import generate
from generators.growth import draw, exponent, growth_in


def test_the_catalogue_is_not_stale() -> None:
    written = generate.CATALOGUE.read_text(encoding="utf-8")
    assert written == generate.catalogue_text(), "methods changed: run `make generate`"


def rows(form: str, sizes: list[int], unit: str = "ms") -> list[dict[str, str]]:
    return [
        {"case": form.format(size), "ours": f"{size * 0.01:.4g}", "peer": f"{size**2 * 1e-5:.4g}", "unit": unit}
        for size in sizes
    ]


def test_sizes_of_one_thing_become_lines_whose_powers_are_found() -> None:
    measured = rows("a scan against attention, {} tokens", [4096, 256, 1024, 2048])
    growth = growth_in([*measured, *rows("a step, {} tokens", [1, 2, 3], "bytes"), *rows("one case", [1])])
    assert growth is not None
    assert (growth.quantity, growth.unit, list(growth.lines)) == ("tokens", "ms", ["a scan", "attention"])
    assert [size for size, _ in growth.lines["a scan"]] == [256, 1024, 2048, 4096]
    assert exponent(growth.lines["a scan"]) == pytest.approx(1, abs=0.01)
    assert exponent(growth.lines["attention"]) == pytest.approx(2, abs=0.01)
    assert draw(growth) == draw(growth)
    assert "attention (power 2.0)" in draw(growth)


def test_two_sizes_are_no_line_and_other_cases_no_growth() -> None:
    assert growth_in(rows("a scan, {} tokens", [256, 512])) is None
    assert growth_in(rows("jsd beta=0.5, 512 tokens (50% masked)", [1, 2, 3])) is None
