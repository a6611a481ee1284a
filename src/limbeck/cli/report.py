"""`limbeck report`: one page that shows or compares runs."""

from pathlib import Path


def report(run: Path, /, *others: Path, out: Path | None = None) -> None:
    """Write one page that shows a run, or compares several side by side.

    Parameters
    ----------
    run
        Folder of a run.
    others
        Folders of runs to compare with.
    out
        File to write; report.html in the first run's folder if absent.
    """
    from limbeck.core.run import Run

    runs = [Run.open(folder) for folder in (run, *others)]
    path = out or run / "report.html"

    from limbeck.report import write_report

    write_report(runs, path)
    print(path)
