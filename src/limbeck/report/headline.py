"""What came out, in two sentences: the page's heading and the last line of `limbeck demo`."""

from dataclasses import dataclass
from statistics import mean

from limbeck.metrics.intervals import paired_wins, t_interval
from limbeck.report.figures import count, counted, percent, points
from limbeck.report.story import Group, Series, Story


@dataclass(frozen=True)
class Headline:
    """The result and what stands behind it."""

    title: str
    detail: str


def headline(story: Story, group: Group) -> Headline:
    """The result of a group of runs, as far as there is one."""
    cast = group.cast
    student, teacher, alone = (story.one(group, stage) for stage in (cast.student, cast.teacher, cast.alone))
    assert student is not None
    accuracy = student.values("accuracy")
    if not accuracy:
        return (
            _by_perplexity(student, teacher, alone)
            or _by_distance(student, _first_teacher(story, group) or teacher)
            or _without_figures(group)
        )
    if student.values("images"):
        return _of_set(student, accuracy)
    if alone is None or not alone.values("accuracy"):
        title = f"The student is right on {percent(mean(accuracy))} of unseen items"
        return Headline(f"{title}{_of_teacher(teacher)}.", _size(student, teacher))
    title = (
        f"Taught, the student is right on {percent(mean(accuracy))} of unseen items; "
        f"alone, on {percent(mean(alone.values('accuracy')))}."
    )
    return Headline(title, f"{_gain(group, student, alone)} {_size(student, teacher, _right(teacher))}".strip())


def _of_set(student: Series, accuracy: list[float]) -> Headline:
    """The result of a synthetic set: what networks learn from it."""
    images = count(student.values("images")[0])
    title = f"Networks that saw only {images} distilled images are right on {percent(mean(accuracy))} of unseen items."
    others = {"as many real ones, drawn at random": student.values("random"), "all real ones": student.values("full")}
    said = [f"on {name}, on {percent(mean(values))}" for name, values in others.items() if values]
    return Headline(title, f"Trained {'; '.join(said)}." if said else "")


def _gain(group: Group, student: Series, alone: Series) -> str:
    names = (student.stage.name, alone.stage.name)
    pairs = [
        (view.results[names[0]].get("accuracy"), view.results[names[1]].get("accuracy"))
        for view in group.views
        if all(name in view.results for name in names)
    ]
    ours, theirs = zip(*((one, other) for one, other in pairs if one is not None and other is not None), strict=True)
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(gains) < 2:
        return f"That is {points(gains[0])} points, with one seed: a difference that another seed may turn round."
    centre, half = t_interval(gains)
    wins = paired_wins(ours, theirs)
    return (
        f"That is {points(centre)} points over {len(gains)} seeds (95\N{NO-BREAK SPACE}% interval "
        f"{points(centre - half)} to {points(centre + half)}), better on {wins} of them."
    )


def _size(student: Series, teacher: Series | None, more: str = "") -> str:
    """How large the student is, as a sentence; `more` follows where its teacher is larger."""
    ours = student.values("parameters")
    theirs = teacher.values("parameters") if teacher is not None else []
    if not ours:
        return ""
    said = f"The student has {count(ours[0])} parameters"
    if not theirs or theirs[0] <= ours[0]:
        return f"{said}."
    return f"{said}, {theirs[0] / ours[0]:.0f} times fewer than its teacher{more}."


def _right(teacher: Series | None) -> str:
    values = teacher.values("accuracy") if teacher is not None else []
    return f", which is right on {percent(mean(values))}" if values else ""


def _of_teacher(teacher: Series | None) -> str:
    values = teacher.values("accuracy") if teacher is not None else []
    return f"; its teacher, on {percent(mean(values))}" if values else ""


def _by_perplexity(student: Series, teacher: Series | None, alone: Series | None) -> Headline | None:
    """The result of language models."""
    ours, *others = (mean(one.values("perplexity") or [0.0]) if one else 0.0 for one in (student, alone, teacher))
    if not ours:
        return None
    said = [f"The student's perplexity is {ours:.2f}"]
    said += [
        f"{name} {value:.2f}" for name, value in zip(("alone it is", "its teacher's"), others, strict=True) if value
    ]
    return Headline(f"{'; '.join(said)}.", _size(student, teacher))


def _first_teacher(story: Story, group: Group) -> Series | None:
    """Where a chain of teachers begins: of students that taught the next, the one that none taught."""
    stages = {stage.name: stage for stage in group.recipe.stages}
    stage, found = group.cast.student, None
    while stage.teacher and stage.teacher[0].name.startswith("stage:"):
        stage = found = stages[stage.teacher[0].name.partition(":")[2]]
    return story.one(group, found)


def _by_distance(student: Series, teacher: Series | None) -> Headline | None:
    """The result of generators: how far their samples are from data, and what a sample costs."""
    ours, cost = student.values("frechet"), student.values("evaluations")
    if not ours or not cost:
        return None
    said = (
        f"The student's samples take {counted(cost[0], 'evaluation')} and lie {mean(ours):.2f} from the data (Fréchet)"
    )
    theirs, dear = (teacher.values("frechet"), teacher.values("evaluations")) if teacher is not None else ([], [])
    if not theirs or not dear:
        return Headline(f"{said}.", _size(student, teacher))
    return Headline(f"{said}; its teacher's {dear[0]:.0f}, and {mean(theirs):.2f}.", _faster(student, teacher))


def _faster(student: Series, teacher: Series | None) -> str:
    ours = student.values("seconds_per_sample")
    theirs = teacher.values("seconds_per_sample") if teacher is not None else []
    if not ours or not theirs or mean(theirs) < 1.1 * mean(ours):
        return _size(student, teacher)
    ratio = mean(theirs) / mean(ours)
    return f"A sample takes {ratio:.{0 if ratio >= 9.5 else 1}f} times less time."


def _without_figures(group: Group) -> Headline:
    finished = [stage.name for stage in group.recipe.stages if any(stage.name in v.results for v in group.views)]
    if not finished:
        return Headline("No stage is finished yet.", "Figures appear here once the first stage is done.")
    if all(view.done for view in group.views):
        return Headline("Done.", f"Finished: {', '.join(finished)}.")
    return Headline("Not finished yet.", f"Finished so far: {', '.join(finished)}.")
