"""The report in a real browser: it runs without an error or a request, draws, answers, and fits phones and dark rooms.

Screenshots go to `artifacts/`, or to the folder that LIMBECK_ARTIFACTS names.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.report import write_report
from limbeck.report.pictures import data_uri
from tests.report.conftest import recipe, write_run
from tests.report.test_page import EVIL
from tests.report.visit import PHONE, Visit

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)

# A busy machine may take long to start a browser.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium")
    if found is None and os.environ.get("CI"):
        pytest.fail("chromium is missing; .ci/run installs it")
    if found is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api") if not os.environ.get("CI") else _playwright()
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=list(ARGUMENTS), timeout=120_000)
        yield started
        started.close()


def _playwright() -> Any:
    import playwright.sync_api

    return playwright.sync_api


@pytest.fixture(scope="module")
def report(finished: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(finished, tmp_path_factory.mktemp("page") / "report.html", title="a tiny run")


def points(page: Any, chart: str) -> list[int]:
    """How many points each path of a chart has."""
    paths = page.eval_on_selector_all(f"[data-chart={chart}] path", "all => all.map(one => one.getAttribute('d'))")
    return [len(re.findall("[ML]", path)) for path in paths]


def readout(page: Any, chart: str) -> str:
    return page.inner_text(f"[data-chart={chart}] .readout")


def test_nothing_goes_wrong_and_nothing_is_fetched(browser, report):
    with Visit(browser, report) as visit:
        visit.page.wait_for_selector("[data-chart=loss] path")
        visit.picture("report-desktop")
        assert visit.complaints == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]


def test_charts_are_drawn_with_a_line_for_each_seed_and_the_mean(browser, report):
    with Visit(browser, report) as visit:
        for chart in ("accuracy", "loss", "rate"):
            visit.page.wait_for_selector(f"[data-chart={chart}] path")
            assert points(visit.page, chart) == [3] * 12  # three stages of three seeds and their mean, three rows each
        pictures = visit.page.eval_on_selector_all(".gallery img", "all => all.map(one => one.naturalWidth)")
        assert set(pictures) == {8}


def test_pointing_reads_values(browser, report):
    with Visit(browser, report) as visit:
        chart = visit.page.wait_for_selector("[data-chart=accuracy] svg")
        assert readout(visit.page, "accuracy").startswith("at the end")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        visit.page.mouse.move(box["x"] + 60, box["y"] + 80)
        assert readout(visit.page, "accuracy").startswith("step 2")
        assert len(re.findall(r"[\d.]+ %", readout(visit.page, "accuracy"))) == 3
        visit.page.mouse.move(5, 5)
        assert readout(visit.page, "accuracy").startswith("at the end")


def test_arrow_keys_read_values(browser, report):
    with Visit(browser, report) as visit:
        visit.page.wait_for_selector("[data-chart=loss] svg")
        visit.page.focus("[data-chart=loss] svg")
        for key, expected in (("Home", "step 2"), ("ArrowRight", "step 4"), ("End", "step 6"), ("ArrowLeft", "step 4")):
            visit.page.keyboard.press(key)
            assert readout(visit.page, "loss").startswith(expected)


def test_names_switch_their_curves(browser, report):
    with Visit(browser, report) as visit:
        visit.page.wait_for_selector("[data-chart=loss] path")
        button = visit.page.locator("button[data-series='1']")
        button.focus()
        visit.page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "false"
        assert len(points(visit.page, "loss")) == 8
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert len(points(visit.page, "loss")) == 12


def test_all_curves_can_be_switched_off(browser, report):
    with Visit(browser, report) as visit:
        visit.page.wait_for_selector("[data-chart=loss] path")
        for number in range(3):
            visit.page.click(f"button[data-series='{number}']")
        assert points(visit.page, "loss") == []
        assert visit.complaints == []


def test_dark_rooms_and_the_switch(browser, report):
    with Visit(browser, report, color_scheme="dark") as visit:
        visit.page.wait_for_selector("[data-chart=loss] path")
        dark = visit.style("body", "backgroundColor")
        visit.picture("report-dark")
        visit.page.click("#theme")
        light = visit.style("body", "backgroundColor")
        assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 120
        assert sum(map(int, re.findall(r"\d+", light)[:3])) > 700
        visit.page.reload()
        assert visit.style("body", "backgroundColor") == light  # it was remembered
        assert visit.complaints == []


def test_a_phone_needs_no_sideways_scrolling(browser, report):
    with Visit(browser, report, viewport=PHONE, device_scale_factor=2) as visit:
        visit.page.wait_for_selector("[data-chart=loss] path")
        visit.picture("report-phone")
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        inside = "all => all.every(one => one.scrollWidth <= one.clientWidth + 1)"
        assert visit.page.eval_on_selector_all(".scroll", inside)
        small = "all => Math.min(...all.map(one => parseFloat(getComputedStyle(one).fontSize)))"
        assert visit.page.eval_on_selector_all("main *", small) >= 12


def test_long_names_fit_a_phone_too(browser, tmp_path):
    figures = {"accuracy": 0.5, "items": 10, "phases": {"forward": 1.0, "y" * 60: 1.0}}
    results = dict.fromkeys(("teacher", "alone", "distilled"), figures)
    status = {"status": "failed", "error": "x" * 300, "hardware": "h" * 100}
    runs = [
        write_run(
            tmp_path / (name * 90), recipe(data={"name": "digits", "limit": limit}), results=results, status=status
        )
        for name, limit in (("ab", 40), ("cd", 50))
    ]
    with Visit(browser, write_report(runs, tmp_path / "report.html"), viewport=PHONE) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, report, scheme):
    with Visit(browser, report, color_scheme=scheme) as visit:
        visit.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        faint = visit.page.evaluate((Path(__file__).parent / "contrast.js").read_text())
        assert faint == []


def test_the_recipe_is_copied(browser, report):
    with Visit(browser, report, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.page.click("details.recipe summary")
        visit.page.click(".copy")
        visit.page.wait_for_function("document.querySelector('.copy').textContent === 'Copied'")
        copied = visit.page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith("seed: 0\ndata:\n  name: digits\n")


def test_hostile_text_does_nothing(browser, tmp_path):
    folder = write_run(
        tmp_path / EVIL.replace("/", "∕"),
        recipe(data={"name": f"object:{EVIL}"}),
        check=False,
        results={"alone": {"accuracy": 0.5, "items": 10, "phases": {EVIL: 1.0}}},
        rows=[{"stage": "alone", "step": step, "student/loss": 1 / step, EVIL: 2.0} for step in (1, 2)],
        status={"status": EVIL, "error": EVIL, "versions": {EVIL: EVIL}, "hardware": EVIL},
    )
    twin = write_run(tmp_path / "twin", recipe(), results={})
    alerts: list[str] = []
    with Visit(browser, write_report([folder, twin], tmp_path / "report.html", title=EVIL)) as visit:
        visit.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        visit.page.reload()
        visit.page.wait_for_selector("[data-chart=loss] path")
        assert alerts == []
        assert visit.complaints == []
        assert visit.page.locator("img").count() == 0


def test_script_within_the_page_is_refused(browser, report, tmp_path):
    """The second line of defence: even HTML that got in unescaped could not run anything."""
    holed = tmp_path / "holed.html"
    holed.write_text(report.read_text().replace("</main>", "<img src='data:,' onerror='document.title = 1'></main>"))
    with Visit(browser, holed) as visit:
        visit.page.wait_for_timeout(200)
        assert visit.page.title() != "1"
        assert any("Content Security Policy" in complaint for complaint in visit.complaints)


def test_pictures_are_read_as_they_were_written(browser, tmp_path):
    image = torch.tensor([[[1.0, 0.0]], [[0.0, 0.5]], [[0.2, 1.0]]])
    page = tmp_path / "page.html"
    page.write_text(f"<img src='{data_uri(image)}'>")
    with Visit(browser, page) as visit:
        read = visit.page.evaluate(
            "() => { const image = document.querySelector('img'); const canvas = document.createElement('canvas');"
            " const brush = canvas.getContext('2d'); brush.drawImage(image, 0, 0);"
            " return [...brush.getImageData(0, 0, 2, 1).data]; }"
        )
        assert read == [255, 0, 51, 255, 0, 128, 255, 255]
