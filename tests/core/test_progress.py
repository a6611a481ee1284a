"""Progress on a terminal and elsewhere."""

import io

import pytest

from limbeck.core.progress import figures, progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _row(step: int) -> dict[str, object]:
    return {"step": step, "student/loss": 1 / step, "student/cross_entropy": 2.0, "student/lr": 0.1, "seconds": {}}


def test_a_line_for_every_tenth() -> None:
    stream = io.StringIO()
    with progress(stream) as watch:
        for step in range(1, 201):
            watch("distil", 200, _row(step))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "distil  1/200  loss 1"
    assert lines[-1] == "distil  200/200  loss 0.005"
    assert all(" s left" in line for line in lines[1:-1])


def test_bars_on_a_terminal() -> None:
    stream = _Terminal()
    with progress(stream) as watch:
        watch("teacher", 20, _row(10))
        watch("teacher", 20, _row(20))
        watch("distil", 40, _row(40))
    shown = stream.getvalue()
    for text in ("teacher", "20/20", "distil", "40/40", "loss 0.025"):
        assert text in shown


def test_a_procedure_without_known_steps() -> None:
    stream = io.StringIO()
    with progress(stream) as watch:
        watch("search", 0, {"step": 3})
    assert stream.getvalue() == "search  3  \n"


def test_only_the_main_process_shows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    with progress(stream) as watch:
        watch("distil", 2, _row(2))
    assert stream.getvalue() == ""


def test_figures_are_named_as_briefly_as_they_can_be() -> None:
    assert figures({"step": 1, "student/loss": 0.5, "validation/accuracy": 0.75}) == "loss 0.5  accuracy 0.75"
    assert figures({"critic/loss": 2.0, "student/loss": 0.5}) == "critic/loss 2  student/loss 0.5"
    assert figures({"validation/accuracy": 0.5, "validation/cross_entropy": 1.25}) == "accuracy 0.5  cross_entropy 1.25"
