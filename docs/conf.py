"""How Sphinx builds these pages: `sphinx-build -W docs OUT`, or `hatch run docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fastbn

project = "fastbn"
author = "The fastbn developers"
copyright = "The fastbn developers"
version = release = fastbn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]
root_doc = "index"
autodoc_typehints = "none"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# A block of code without a language is a shell command or a formula.
highlight_language = "none"

numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autosummary_generate = True

html_theme = "pydata_sphinx_theme"
html_title = "fastbn"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
