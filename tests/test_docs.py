"""The documentation: nothing generated is stale, it builds without warnings, and its examples run."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from limbeck.core import catalogue
from limbeck.core.recipe import check_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import generate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts and path.parent.name != "methods"]
PAGES = sorted([*WRITTEN, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


WITH_PYTHON = [path for path in PAGES if blocks(path, "python")]
WITH_RECIPES = [path for path in PAGES if blocks(path, "yaml")]


def test_nothing_generated_is_stale():
    assert not [named(path) for path in generate.stale()], "run `make generate`"


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--nitpicky", "--quiet", "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "methods" / "kd.html").is_file()


@pytest.mark.parametrize("path", WITH_PYTHON, ids=named)
def test_its_python_runs(path, tmp_path):
    """All blocks of a page, one after the other, in a process of their own: pages may register methods."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.experiment", "limbeck.running", "limbeck.distilling"])
    process = context.Process(target=_run, args=("\n".join(blocks(path, "python")), tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors.txt").read_text()[-3000:]


def _run(code: str, folder: Path) -> None:
    os.chdir(folder)
    sys.stdout = sys.stderr = open("errors.txt", "w", buffering=1)  # noqa: SIM115  # open as long as the process lives
    catalogue.read = catalogue.build  # what `make generate` would have written for a method that the page adds
    exec(compile(code, "page.py", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("path", WITH_RECIPES, ids=named)
def test_its_recipes_are_valid(path):
    for block in blocks(path, "yaml"):
        check_recipe(yaml.safe_load(block))


def test_snippets_of_methods_are_valid():
    teacher = {"name": "teacher", "method": "supervised", "student": "convnet", "train": {"epochs": 1}}
    for path in DOCS.glob("methods/*.md"):
        for block in blocks(path, "yaml"):
            check_recipe({"stages": [teacher, *yaml.safe_load(block)]})


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_its_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if ":" not in link]
    mentioned = re.findall(r"`((?:tests|docs|claims|benchmarks|src)/[\w/.-]+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in mentioned if not (ROOT / name).exists()]
    assert not missing


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    asked = {target for path in PAGES for target in re.findall(r"`make ([a-z]+)", path.read_text(encoding="utf-8"))}
    assert asked <= targets
