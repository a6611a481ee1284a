"""The page as text: what is on it for one run, several, and broken ones; that it is small, and that it is inert."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from limbeck.core.errors import DamagedFileError, UsageError
from limbeck.report import Section, page, write_report
from limbeck.report.markup import Html
from tests.report.conftest import recipe, write_run

ALL = ["results", "curves", "pictures", "confusion", "time", "recipe", "origin"]
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'>&"


class Page(HTMLParser):
    """Ids of sections, tags with attributes, and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.tags if tag == "section"]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces).replace("\N{NO-BREAK SPACE}", " "))

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def test_one_run_has_every_panel(finished, tmp_path):
    path = write_report(finished[:1], tmp_path / "new" / "report.html", title="a <title>")
    shown = Page(path)
    assert path == tmp_path / "new" / "report.html"
    assert shown.sections == ALL
    assert path.stat().st_size < page.LARGEST / 4
    assert "a <title>" in shown.text
    assert "with one seed" in shown.text
    assert re.search(r"\d+\.\d % \[\d+\.\d–\d+\.\d\]", shown.text)  # an interval over items, not over seeds


def test_seeds_of_one_recipe_are_one_group(finished, tmp_path):
    shown = Page(write_report(finished, tmp_path / "report.html"))
    assert shown.sections == ALL
    assert "over 3 seeds (95 % interval" in shown.text
    assert re.search(r"\d ± \d", shown.text)
    assert "kd, 3 seeds" in shown.text


def test_other_recipes_are_compared(finished, tmp_path):
    other = write_run(tmp_path / "other", recipe(data={"name": "digits", "limit": 50}), results={"alone": {"x": 1}})
    shown = Page(write_report([*finished, other], tmp_path / "report.html"))
    assert shown.sections == ["results", "differences", *ALL[1:]]
    assert "data.limit" in shown.text
    assert "other: alone" in shown.text


def test_the_page_asks_for_nothing_elsewhere(finished, tmp_path):
    shown = Page(write_report(finished, tmp_path / "report.html"))
    assert all(source and source.startswith("data:") for source in shown.attributes("src"))
    assert all(link and link.startswith(("#", "data:")) for link in shown.attributes("href"))
    assert set(re.findall(r"https?://[^\"' ]+", shown.source)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "@import" not in shown.source
    assert "url(" not in shown.source


def test_headings_captions_and_labels(finished, tmp_path):
    shown = Page(write_report(finished, tmp_path / "report.html"))
    tags = [tag for tag, _ in shown.tags]
    assert tags.count("h1") == 1
    assert tags.count("h2") == len(ALL)
    assert tags.count("table") == tags.count("caption")
    assert all(attributes.get("alt") for tag, attributes in shown.tags if tag == "img")
    assert all(attributes.get("aria-label") for _, attributes in shown.tags if attributes.get("role") == "region")


def test_hostile_text_stays_text(tmp_path):
    tree = recipe(data={"name": f"object:{EVIL}", "image_column": EVIL})
    folder = write_run(
        tmp_path / EVIL.replace("/", "∕"),
        tree,
        check=False,
        results={"alone": {"accuracy": 0.5, "items": 10, "phases": {EVIL: 1.0}}},
        rows=[{"stage": "alone", "step": 1, "student/loss": 1.0, EVIL: 2.0, "validation/accuracy": float("nan")}],
        status={"status": EVIL, "error": EVIL, "versions": {EVIL: EVIL}, "hardware": EVIL, "changed": EVIL},
    )
    twin = write_run(tmp_path / "twin", recipe(), results={})
    shown = Page(write_report([folder, twin], tmp_path / "report.html", title=EVIL))
    assert "<img src=x" in shown.text
    assert not [tag for tag, attributes in shown.tags if any(name.startswith("on") for name in attributes)]
    assert [attributes.get("type") for tag, attributes in shown.tags if tag == "script"] == ["application/json", None]
    assert "img" not in [tag for tag, _ in shown.tags]


def test_only_the_pages_own_script_may_run(finished, tmp_path):
    shown = Page(write_report(finished[:1], tmp_path / "report.html"))
    (policy,) = (attributes["content"] for _, attributes in shown.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy


def test_no_teacher(tmp_path):
    only = {"name": "alone", "method": "supervised", "student": "mlp", "train": {"steps": 4}}
    rows = [{"stage": "alone", "step": 4, "student/loss": 0.5, "student/lr": 0.1}]
    done = write_run(tmp_path / "run", recipe(stages=[only]), results={"alone": {"accuracy": 0.8}}, rows=rows)
    shown = Page(write_report([done], tmp_path / "report.html"))
    assert "The student is right on 80.0 % of unseen items." in shown.text
    assert "Agrees with teacher" not in shown.text
    assert "Validation accuracy" not in shown.text  # no validation rows
    assert "Training loss" in shown.text


def test_an_interrupted_run(unfinished, tmp_path):
    shown = Page(write_report([unfinished], tmp_path / "report.html"))
    assert "Run stopped is interrupted, in stage alone at step 4 of 6." in shown.text
    assert "Not finished yet." in shown.text
    assert "No pictures: the data or models cannot be opened here" in shown.text
    assert "Training loss" in shown.text


def test_a_run_that_has_not_begun(tmp_path):
    begun = write_run(tmp_path / "run", recipe())
    shown = Page(write_report([begun], tmp_path / "report.html"))
    assert shown.sections == ["results", "recipe", "origin"]
    assert "No stage is finished yet." in shown.text


def test_text_has_no_pictures(tmp_path):
    tree = recipe(stages=[{"name": "one", "method": "supervised", "student": "mlp", "train": {"steps": 4}}])
    figures = {"cross_entropy": 2.5, "perplexity": 12.18, "parameters": 2000}
    done = write_run(tmp_path / "run", tree | {"data": "pydoc"}, results={"one": figures}, check=False)
    shown = Page(write_report([done], tmp_path / "report.html"))
    assert "No pictures: the data hold no images with classes." in shown.text
    assert "The student's perplexity is 12.18." in shown.text
    assert "2.500" in shown.text


def test_what_is_no_run_or_is_damaged_is_named(finished, tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        write_report([tmp_path], tmp_path / "report.html")
    broken = shutil.copytree(finished[0], tmp_path / "broken")
    (broken / "results.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"results\.json"):
        write_report([broken], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_many_long_runs_stay_below_two_megabytes(tmp_path):
    runs = []
    for number in range(30):
        rows = [
            {
                "stage": stage,
                "step": step,
                "student/loss": step**0.5,
                "student/lr": 1 / step,
                "validation/accuracy": 0.3,
            }
            for stage in ("teacher", "alone", "distilled")
            for step in range(1, 400)
        ]
        runs.append(
            write_run(tmp_path / f"r{number}", recipe(data={"name": "digits", "limit": 50 + number}), rows=rows)
        )
    path = write_report(runs, tmp_path / "report.html")
    assert path.stat().st_size < page.LARGEST
    assert "is left out" not in path.read_text()


def test_what_would_not_fit_is_left_out_and_named(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 60_000)
    path = write_report(finished, tmp_path / "report.html")
    shown = Page(path)
    assert path.stat().st_size <= 60_000
    assert "“What they see” is left out" in shown.text
    assert "results" in shown.sections


def test_a_family_adds_its_own_panel(finished, tmp_path):
    def panel(story: Any) -> Section:
        return Section("mine", "My panel", "", Html(f"<p>{len(story.views)} runs</p>"), {"some": "data"})

    shown = Page(write_report(finished, tmp_path / "report.html", panels=[panel]))
    assert shown.sections == ["mine"]
    assert "3 runs" in shown.text
    assert "mine-data" in shown.attributes("id")
