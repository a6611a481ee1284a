"""The page as a whole: panels in one file of HTML, style and script that asks nothing of any network."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template

from limbeck.core.durable import write_bytes
from limbeck.core.run import Run
from limbeck.report.headline import headline
from limbeck.report.markup import Html, data_block, escape, fill, join
from limbeck.report.panels import Panel, Section, standard_panels
from limbeck.report.story import RunView, Story

LARGEST = 2 * 1024 * 1024
"""Most bytes of a page; of one that would be larger the heaviest panels are left out, and it says so."""

_MOST_HEADLINES = 6


def write_report(
    runs: Sequence[Run | Path], path: Path | str, *, title: str = "", panels: Sequence[Panel] | None = None
) -> Path:
    """Writes one page that shows a run, or several side by side, and returns its path.

    Runs that differ in their seeds alone are shown as one, with intervals over the seeds. Runs may be unfinished: the
    page shows what there is.

    Args:
        runs: at least one, as objects or folders.
        path: file to write.
        title: the page's title; the names of the runs if absent.
        panels: its sections; `standard_panels()` if absent.

    Raises:
        UsageError: a folder holds no run.
        DamagedFileError: a run's recipe or results cannot be read.
    """
    return write_story(Story.of(runs), path, title=title, panels=panels)


def write_story(story: Story, path: Path | str, *, title: str = "", panels: Sequence[Panel] | None = None) -> Path:
    """`write_report` for runs that were read already."""
    chosen = standard_panels() if panels is None else panels
    sections = [section for section in (panel(story) for panel in chosen) if section is not None]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, _within_limit(story, title, sections).encode())
    return target


def _within_limit(story: Story, title: str, sections: list[Section]) -> str:
    dropped: list[str] = []
    while len((page := _page(story, title, sections, dropped)).encode()) > LARGEST and sections:
        heaviest = max(sections, key=lambda section: len(_section(section)))
        sections = [section for section in sections if section is not heaviest]
        dropped.append(heaviest.title)
    return page


def _page(story: Story, title: str, sections: Sequence[Section], dropped: Sequence[str]) -> str:
    script, style = _file("charts.js"), _file("style.css")
    names = title or ", ".join(group.name for group in story.groups)
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_file("page.html")).substitute(
        # Only the page's own script may run, whatever text got into the page, and nothing may be loaded.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{seal}'",
        title=escape(names),
        style=style,
        script=script,
        header=_header(story, names, dropped),
        contents=join(fill("<a href='#{}'>{}</a>", section.name, section.title) for section in sections),
        sections=join(map(_section, sections)),
        footer=fill("Written by limbeck on {}.", f"{datetime.now().astimezone():%d %B %Y, %H:%M}"),
    )


def _header(story: Story, names: str, dropped: Sequence[str]) -> Html:
    results = _result(story) if len(story.groups) == 1 else _comparison(story)
    notes = [note for note in map(_unfinished, story.views) if note]
    if len(notes) > 5:
        notes = [*notes[:5], f"{len(notes) - 5} more runs are not finished."]
    notes += [f"“{title}” is left out: the page would be larger than 2 MB." for title in dropped]
    warnings = join(fill("<p class='warning' role='note'>{}</p>", note) for note in notes)
    return join([fill("<p class='eyebrow'>{}</p>", names), results, warnings])


def _result(story: Story) -> Html:
    said = headline(story, story.groups[0])
    return fill("<h1>{}</h1><p class='detail'>{}</p>", said.title, said.detail)


def _comparison(story: Story) -> Html:
    said = [(group.name, headline(story, group)) for group in story.groups[:_MOST_HEADLINES]]
    rows = join(fill("<dt>{}</dt><dd>{} <small>{}</small></dd>", name, one.title, one.detail) for name, one in said)
    return fill("<h1>{} recipes, side by side</h1><dl class='sides'>{}</dl>", len(story.groups), rows)


def _unfinished(view: RunView) -> str:
    """What to say of a run that is not done; "" of one that is."""
    if view.done and view.status.get("status", "done") == "done":
        return ""
    missing = [stage for stage in view.recipe.stages if stage.name not in view.results]
    status = view.status.get("status", "not begun")
    if not missing:
        return f"Run {view.run.folder.name} is {status}."
    stage = missing[0]
    reached = max((row["step"] for row in view.rows if row["stage"] == stage.name), default=0)
    steps = f" of {stage.train.steps}" if stage.train and stage.train.steps else ""
    because = f": {view.status['error']}" if view.status.get("error") else ""
    return f"Run {view.run.folder.name} is {status}{because}, in stage {stage.name} at step {reached}{steps}."


def _section(section: Section) -> Html:
    lead = fill("<p class='lead'>{}</p>", section.lead) if section.lead else Html("")
    data = data_block(f"{section.name}-data", section.data) if section.data is not None else Html("")
    return fill(
        "<section id='{0}' aria-labelledby='{0}-title'><h2 id='{0}-title'>{1}</h2>{2}{3}{4}</section>\n",
        section.name,
        section.title,
        lead,
        section.body,
        data,
    )


def _file(name: str) -> str:
    return (resources.files("limbeck") / "report" / name).read_text(encoding="utf-8")
