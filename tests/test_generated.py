"""Generated files are what the code would generate now."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import generate


def test_the_catalogue_is_not_stale() -> None:
    written = generate.CATALOGUE.read_text(encoding="utf-8")
    assert written == generate.catalogue_text(), "methods changed: run `make generate`"
