"""Which classes the student takes for which others."""

from typing import TYPE_CHECKING

from limbeck.report.figures import percent
from limbeck.report.markup import Html, fill, join
from limbeck.report.panels import Section
from limbeck.report.predictions import NothingToShow
from limbeck.report.story import Series, Story

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CLASSES = 20
_MOST_GROUPS = 4
_PAIRS = 15


def confusion(story: Story) -> Section | None:
    """Confusion matrices of the student and, beside it, of the same network alone, summed over seeds.

    With many classes it is the pairs that are confused most.
    """
    parts = []
    for group in story.groups[:_MOST_GROUPS]:
        for series in (story.one(group, group.cast.alone), story.one(group, group.cast.student)):
            counted = _count(story, series) if series is not None else None
            if series is not None and counted is not None:
                parts.append(_shown(series, *counted))
    if not parts:
        return None
    lead = "Rows are what an item is, columns what it is taken for; counts over all seeds."
    body = fill("<div class='matrices'>{}</div>", join(parts))
    return Section("confusion", "What the student confuses", lead, body)


def _count(story: Story, series: Series) -> "tuple[Tensor, tuple[str, ...]] | None":
    import torch

    total: Tensor | None = None
    names: tuple[str, ...] = ()
    for view in series.group.views[:20]:
        try:
            said = story.predictions(view)
        except NothingToShow:
            continue
        if series.stage.name not in said.probabilities:
            continue
        known, classes = said.labels >= 0, len(said.names)
        cells = said.labels[known] * classes + said.best(series.stage.name)[known]
        matrix = torch.bincount(cells, minlength=classes * classes).view(classes, classes)
        total, names = matrix if total is None else total + matrix, said.names
    return None if total is None or not int(total.sum()) else (total, names)


def _shown(series: Series, matrix: "Tensor", names: tuple[str, ...]) -> Html:
    show = _matrix if len(names) <= _MOST_CLASSES else _pairs
    return fill("<div><h3 class='c{} key'>{}</h3>{}</div>", series.colour, series.label, show(series, matrix, names))


def _matrix(series: Series, matrix: "Tensor", names: tuple[str, ...]) -> Html:
    head = join(fill("<th scope='col'><span>{}</span></th>", name) for name in names)
    rows = join(
        fill("<tr><th scope='row'><span>{}</span></th>{}<td class='recall'>{}</td></tr>", name, *_cells(matrix, row))
        for row, name in enumerate(names)
    )
    return fill(
        "<div class='scroll' tabindex='0' role='region' aria-label='Confusion matrix of {0}'>"
        "<table class='confusion c{1}'>"
        "<caption class='hidden'>Confusion matrix of {0}: rows are true classes, columns predicted ones</caption>"
        "<thead><tr><td></td>{2}<th scope='col' class='recall'>right</th></tr></thead><tbody>{3}</tbody></table></div>",
        series.label,
        series.colour,
        head,
        rows,
    )


def _cells(matrix: "Tensor", row: int) -> tuple[Html, str]:
    counts = matrix[row].tolist()
    total = sum(counts)
    cells = []
    for column, number in enumerate(counts):
        share = number / total if total else 0.0
        kind = "right" if column == row else "wrong"
        strong = " strong" if column == row and share > 0.5 else ""
        cells.append(fill("<td class='{}{}' style='--p:{:.3f}'>{}</td>", kind, strong, share, number or ""))
    return join(cells), percent(counts[row] / total, 0) if total else ""


def _pairs(series: Series, matrix: "Tensor", names: tuple[str, ...]) -> Html:
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    top = [cell for cell in wrong.argsort(descending=True, stable=True)[:_PAIRS].tolist() if int(wrong[cell])]
    rows = join(
        fill(
            "<tr><td>{}</td><td>{}</td><td class='number'>{}</td></tr>",
            names[cell // len(names)],
            names[cell % len(names)],
            int(wrong[cell]),
        )
        for cell in top
    )
    return fill(
        "<table class='pairs'><caption class='hidden'>The pairs that {} confuses most</caption>"
        "<thead><tr><th scope='col'>is</th>"
        "<th scope='col'>taken for</th><th scope='col' class='number'>items</th></tr></thead><tbody>{}</tbody></table>",
        series.label,
        rows,
    )
