"""`limbeck demo`: distillation on real data, out of the box."""

from pathlib import Path

from limbeck.cli.parameters import Flag


def demo(*, out: Path = Path("limbeck-demo"), seeds: int = 3, quick: Flag = False) -> None:
    """Distil on embedded real data, and write report.html.

    Started again with the same folder it goes on where it stopped.

    Parameters
    ----------
    out
        Folder to write.
    seeds
        How often each experiment is repeated, from seed 0 on.
    quick
        Take a few steps only: to see that everything works, not how well.
    """
    from limbeck.cli.tables import show_table
    from limbeck.demo import demonstrate

    shown = demonstrate(out, seeds, quick=quick)
    show_table(*shown.table())
    for said in shown.headlines:
        print(f"\n{said.title}\n{said.detail}")
    if quick:
        print("\nWith --quick nothing is trained to its end: these figures say that it works, not how well.")
    print(f"\n{shown.report}")
