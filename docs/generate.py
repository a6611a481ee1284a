"""Writes every file that is generated from the code: `python docs/generate.py`, or `make generate`.

With `--check` it writes nothing and says which files are stale.
"""

import json
import sys
from pathlib import Path

from generators import benchmarks, claims, commands, comparison, methods, reference
from generators.markdown import replace_between

from limbeck.core import catalogue
from limbeck.listing import claim_status

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CATALOGUE = Path(catalogue.__file__).parents[1] / "methods" / "catalogue.json"


def entries() -> dict[str, catalogue.Entry]:
    """The registered methods with their options and the standing of their claims."""
    return {slug: {**entry, "claim": claim_status(slug)} for slug, entry in catalogue.build().items()}


def catalogue_text() -> str:
    """The catalogue as it should be."""
    return json.dumps(entries(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_catalogue() -> Path:
    """Writes `limbeck/methods/catalogue.json`, from which recipes are checked without importing torch."""
    CATALOGUE.write_text(catalogue_text(), encoding="utf-8")
    return CATALOGUE


def generated() -> dict[Path, str]:
    """Every generated file with the content that it should have."""
    found, results = entries(), claims.read_claims()
    pages = {
        CATALOGUE: catalogue_text(),
        DOCS / "methods" / "index.md": methods.index_page(found),
        DOCS / "reference" / "recipe.md": reference.recipe_page(),
        DOCS / "reference" / "models-and-data.md": reference.models_page(),
        DOCS / "reference" / "command-line.md": commands.commands_page(),
        DOCS / "claims.md": claims.claims_page(results),
        DOCS / "comparison.md": comparison.comparison_page(),
        DOCS / "benchmarks.md": benchmarks.benchmarks_page(),
        **{DOCS / "images" / name: picture for name, picture in benchmarks.growth_charts().items()},
        ROOT / "README.md": _readme(found, results),
    }
    for name, page in reference.building_block_pages().items():
        pages[DOCS / "reference" / f"{name}.md"] = page
    for slug, entry in found.items():
        pages[DOCS / "methods" / f"{slug}.md"] = methods.method_page(slug, entry, results)
    return pages


def stale() -> list[Path]:
    """Generated files that differ from what the code would write now, and pages of methods that are gone."""
    pages = generated()
    changed = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    kept = [*(DOCS / "methods").glob("*.md"), *(DOCS / "images").glob("growth-*.svg")]
    return changed + [path for path in kept if path not in pages]


def _readme(found: dict[str, catalogue.Entry], results: dict[str, claims.Claim]) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = replace_between(text, "methods", methods.readme_table(found))
    return replace_between(text, "claims", claims.readme_table(results))


def main() -> int:
    """Writes all generated files and names those that changed; with `--check` only names them."""
    pages, changed = generated(), stale()
    for path in changed:
        print(path.relative_to(ROOT))
        if "--check" in sys.argv:
            continue
        if path in pages:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
        else:
            path.unlink()
    return 1 if changed and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
