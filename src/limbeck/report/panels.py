"""Panels: the sections of the page. A family adds its own by giving `write_report` one more function."""

from dataclasses import dataclass
from typing import Protocol

from limbeck.report.markup import Html
from limbeck.report.story import Story


@dataclass(frozen=True)
class Section:
    """What a panel puts on the page.

    Attributes:
        name: the section's id, lower-case letters and hyphens.
        title: its heading.
        lead: one or two sentences under the heading: how to read what follows; "" for none.
        body: its content.
        data: plain data for the page's script, found there under the section's name.
    """

    name: str
    title: str
    lead: str
    body: Html
    data: object = None


class Panel(Protocol):
    """A function from what happened to a section of the page; None where it has nothing to show."""

    def __call__(self, story: Story) -> Section | None: ...


def standard_panels() -> tuple[Panel, ...]:
    """The panels of every report, in order."""
    from limbeck.report.charts import curves
    from limbeck.report.confusion import confusion
    from limbeck.report.phases import phases
    from limbeck.report.pictures import pictures
    from limbeck.report.provenance import differences, provenance, recipes
    from limbeck.report.results import results
    from limbeck.report.samples import samples
    from limbeck.report.sets import sets

    return results, differences, curves, samples, sets, pictures, confusion, phases, recipes, provenance
