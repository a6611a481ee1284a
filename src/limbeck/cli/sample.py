"""`limbeck sample`: images from a run's generator."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def sample(
    run: Path,
    /,
    *,
    steps: int | None = None,
    items: int = 64,
    guidance: float | None = None,
    label: Annotated[list[int] | None, Parameter(negative=(), consume_multiple=True)] = None,
    prompt: Annotated[list[str] | None, Parameter(negative=())] = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Draw images from a finished run's generator.

    Parameters
    ----------
    run
        Folder of the run.
    steps
        Solver steps; as many as the student was made for if absent.
    items
        How many images.
    guidance
        Guidance scale, 1 for none; the student's own if absent.
    label
        Classes to draw, in turn; all if absent.
    prompt
        Text to draw, for students of text-to-image pipelines; given several times, in turn. The captions of the run's
        data if absent.
    seed
        Seed of the noise.
    out
        PNG to write; samples.png in the run's folder if absent.
    """
    from limbeck.sampling import sample as draw

    path = out or run / "samples.png"
    draw(
        run,
        items,
        steps=steps,
        guidance=guidance,
        labels=label or [],
        prompts=prompt or [],
        seed=seed,
        out=path,
    )
    print(path)
