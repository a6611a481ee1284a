"""How the runs came about: what sets them apart, their recipes, the versions and the hardware."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from limbeck.report.markup import Html, escape, fill, join
from limbeck.report.panels import Section
from limbeck.report.story import Group, RunView, Story

_LONGEST_RECIPE = 60_000
_MOST_RECIPES = 12
_MOST_DIFFERENCES = 60


def differences(story: Story) -> Section | None:
    """The keys in which the recipes of several groups differ, seeds aside."""
    if len(story.groups) < 2:
        return None
    flat = [dict(_flat(group.recipe.model_dump(mode="json", exclude={"seed"}))) for group in story.groups]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    varied = [key for key in keys if len({tree.get(key, "–") for tree in flat}) > 1][:_MOST_DIFFERENCES]
    head = join(fill("<th scope='col'>{}</th>", group.name) for group in story.groups)
    rows = join(
        fill(
            "<tr><th scope='row'><code>{}</code></th>{}</tr>",
            key,
            join(fill("<td>{}</td>", tree.get(key, "–")) for tree in flat),
        )
        for key in varied
    )
    body = fill(
        "<div class='scroll' tabindex='0' role='region' aria-label='Differences of the recipes'><table class='plain'>"
        "<caption class='hidden'>Keys in which the recipes differ</caption>"
        "<thead><tr><th scope='col'>Key</th>{}</tr></thead><tbody>{}</tbody></table></div>",
        head,
        rows,
    )
    return Section("differences", "What sets them apart", "", body)


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of plain data as text, by its dotted path; stages under their names."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(entry, dict) for entry in tree):
        for number, entry in enumerate(tree):
            name = entry.get("name", number) if path == "stages" else number
            yield from _flat(entry, str(name) if path == "stages" else f"{path}.{name}")
    else:
        yield path, str(tree)


def recipes(story: Story) -> Section:
    """Every group's resolved recipe."""
    shown = story.groups[:_MOST_RECIPES]
    lead = "With every default filled in; saved as a file it runs again: limbeck run recipe.yaml"
    return Section("recipe", "Recipe" if len(shown) == 1 else "Recipes", lead, join(map(_recipe, shown)))


def _recipe(group: Group) -> Html:
    text = yaml.safe_dump(group.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if len(text) > _LONGEST_RECIPE:
        text = text[:_LONGEST_RECIPE] + "\n# … the rest is in recipe.yaml\n"
    seeds = ", ".join(str(view.recipe.seed) for view in group.views)
    return fill(
        "<details class='recipe'><summary><b>{}</b> <small>{} lines, seed {}</small></summary>"
        "<div class='code'><button type='button' class='copy'>Copy</button>"
        "<pre tabindex='0' aria-label='Recipe of {}'><code>{}</code></pre></div></details>",
        group.name,
        text.count("\n"),
        seeds,
        group.name,
        join(map(_line, text.splitlines(keepends=True))),
    )


def _line(line: str) -> Html:
    """A line of YAML with its key marked."""
    match = re.match(r"^([\s-]*)([\w.-]+)(:)(.*)$", line, re.DOTALL)
    if match is None:
        return Html(escape(line))
    return fill("{}<span class='yaml-key'>{}</span>{}{}", *match.groups())


def provenance(story: Story) -> Section:
    """Every run's folder, status, time, versions and hardware."""
    rows = join(_run_row(view) for view in story.views)
    body = fill(
        "<div class='scroll' tabindex='0' role='region' aria-label='Runs'><table class='plain runs stack'>"
        "<caption class='hidden'>The runs of this report</caption><thead><tr><th scope='col'>Run</th>"
        "<th scope='col' class='number'>Seed</th><th scope='col'>Status</th><th scope='col'>Last change</th>"
        "<th scope='col'>Versions</th><th scope='col'>Hardware</th></tr></thead><tbody>{}</tbody></table></div>",
        rows,
    )
    return Section("origin", "Where this comes from", "", body)


def _run_row(view: RunView) -> Html:
    versions = view.status.get("versions")
    known = versions if isinstance(versions, dict) else {}
    return fill(
        "<tr><th scope='row'>{}</th><td class='number' data-title='Seed'>{}</td><td data-title='Status'>{}</td>"
        "<td data-title='Last change'>{}</td><td data-title='Versions'>{}</td><td data-title='Hardware'>{}</td></tr>",
        view.run.folder.name,
        view.recipe.seed,
        view.status.get("status", "not begun"),
        str(view.status.get("changed", "–")).replace("T", " ").replace("+00:00", " UTC"),
        ", ".join(f"{name} {version}" for name, version in known.items()) or "–",
        view.status.get("hardware") or "–",
    )
