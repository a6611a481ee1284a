"""The report: one self-contained HTML page that shows a run, or compares several."""

from limbeck.report.page import write_report
from limbeck.report.panels import Panel, Section, standard_panels
from limbeck.report.story import Story

__all__ = ["Panel", "Section", "Story", "standard_panels", "write_report"]
