"""Configuration of the documentation."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for mathml.py

project = "limbeck"
author = "the limbeck authors"
copyright = "the limbeck authors, Apache-2.0"
version = release = installed("limbeck")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "generators"]
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["formulas.css"]
html_title = f"limbeck {version}"

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "model_config, training"}
napoleon_use_ivar = True
# Signatures name classes of torch and others, whose documentation is elsewhere.
nitpick_ignore_regex = [("py:.*", ".*")]

# Docstrings are written to be read as they stand: `name` is code, and |x| an absolute value.
default_role = "code"


def _keep_signs(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Bars of magnitudes, and stars of shapes such as (items, *shape), are no markup."""
    lines[:] = [line if "\\" in line or ":math:" in line else line.replace("|", "\\|") for line in lines]
    lines[:] = [re.sub(r"(?<![\w`*\\])\*(?=[a-z_]+[ ,)\]](?![^(]*\*))", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _keep_signs)


# Shapes such as "*rays 3" in annotations of attributes would be read as markup.
napoleon_attr_annotations = False
