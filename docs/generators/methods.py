"""One page a method, and the tables of all methods, from the catalogue and the results of claims."""

from typing import Any

import yaml

from limbeck.core.registry import method_class

from .claims import Claim, claim_section, measured_elsewhere
from .markdown import NOTICE, table
from .schema import option_table

Entry = dict[str, Any]
FAMILIES = {
    "classic": "Classifiers: logits, features, relations",
    "vision": "Vision systems",
    "language": "Language, speech and embedding models",
    "trajectory": "Few-step generators along a trajectory",
    "distribution": "One-step generators by distribution matching",
    "scenes": "Scenes and materials",
    "datasets": "Data-set distillation",
    "conversion": "Structure: quantisation, pruning, conversion",
}
_MODELS: dict[str, tuple[Any, str]] = {
    "classification": ({"name": "convnet", "arguments": {"width": 8}}, "stage:teacher"),
    "language-modelling": ("hf:organisation/student", "hf:organisation/teacher"),
}


def index_page(entries: dict[str, Entry]) -> str:
    """The table of all methods, by family."""
    parts = [NOTICE, "# Methods\n\nOne page a method, generated from its class.\n\n"]
    for family, title in FAMILIES.items():
        own = {slug: entry for slug, entry in entries.items() if entry["card"]["family"] == family}
        if own:
            parts.append(f"## {title}\n\n{_rows(own, '')}\n")
    hidden = "".join(f"{slug} <{slug}>\n" for slug in entries)
    return "".join(parts) + f"```{{toctree}}\n:hidden:\n\n{hidden}```\n"


def readme_table(entries: dict[str, Entry]) -> str:
    """The table for README.md."""
    return _rows(entries, "docs/methods/")


def method_page(slug: str, entry: Entry, claims: dict[str, Claim]) -> str:
    """A method's page."""
    card = entry["card"]
    facts = [f"`{slug}`", card["family"], str(card["year"])]
    if card["arxiv"]:
        facts.append(f"[arXiv:{card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})")
    own = claim_section(claims[slug]) if slug in claims else ""
    measured = "\n".join(filter(None, [own, measured_elsewhere(slug, claims)])) or "Not measured yet."
    parts = [
        f"{NOTICE}# {card['title']}\n\n{' · '.join(facts)}\n\n{card['use']}\n\n",
        f"```{{eval-rst}}\n{_as_rst(entry['description'])}\n```\n\n",
        f"It needs: {', '.join(card['needs'])}. {_batch_note(card)}\n\n",
        f"## Options\n\n{option_table(entry['options'])}\n",
        f"## In a recipe\n\n```yaml\n{_snippet(slug, entry)}```\n\n",
        f"## Claim\n\n{measured}\n",
        f"\n## Source\n\n`{_source(slug)}`\n",
    ]
    return "".join(parts).rstrip() + "\n"


def _rows(entries: dict[str, Entry], prefix: str) -> str:
    rows = []
    for slug, entry in entries.items():
        card = entry["card"]
        paper = f"[{card['title']}](https://arxiv.org/abs/{card['arxiv']})" if card["arxiv"] else card["title"]
        claim = entry.get("claim", "not measured")
        rows.append([f"[`{slug}`]({prefix}{slug}.md)", paper, str(card["year"]), card["use"], claim])
    return table(["method", "paper", "year", "when to reach for it", "claim"], rows)


def _batch_note(card: dict[str, Any]) -> str:
    if card["couples_batch"] and "prompts" in card["needs"]:
        return (
            "Whose text a batch is trained on is drawn for the batch as a whole: gradient accumulation and ranks "
            "change that, since each micro-batch draws and writes for itself."
        )
    if card["couples_batch"]:
        return (
            "Its loss couples the items of a batch: ranks gather their items, and gradient accumulation changes the "
            "loss, since each micro-batch is coupled by itself."
        )
    return "Its loss is a mean over items: accumulation and ranks do not change it."


def _snippet(slug: str, entry: Entry) -> str:
    """A stage that uses the method, with the first options at their defaults."""
    stage: dict[str, Any] = {"name": "distil", "method": slug}
    fields = entry["options"].get("properties", {})
    chosen = {name: field["default"] for name, field in fields.items() if field.get("default") not in (None, {}, [])}
    if chosen:
        stage["options"] = dict(list(chosen.items())[:4])
    student, teacher = _MODELS.get(entry["card"]["task"], _MODELS["classification"])
    stage["student"] = student
    if "teacher" in entry["card"]["needs"]:
        stage["teacher"] = teacher
    if entry["trains"]:
        stage["train"] = {"epochs": 20, "batch_size": 64}
    return yaml.safe_dump([stage], sort_keys=False, allow_unicode=True)


def _as_rst(docstring: str) -> str:
    """A docstring with its sections (Attributes, Raises…) as reStructuredText."""
    from sphinx.ext.napoleon import Config, GoogleDocstring

    return str(GoogleDocstring(docstring, Config(napoleon_use_ivar=True)))


def _source(slug: str) -> str:
    return f"src/{method_class(slug).__module__.replace('.', '/')}.py"
