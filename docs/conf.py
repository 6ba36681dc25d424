"""Sphinx: `tox -e docs`."""

from __future__ import annotations

import os
import re
import sys

sys.path.insert(0, os.path.abspath(".."))

with open(os.path.join(os.path.dirname(__file__), "..", "sekuire", "version.py"), encoding="utf-8") as file:
    version = release = re.findall(r'__version__ = "(.+)"', file.read())[0]

project = "sekuire"
author = "the sekuire developers"
copyright = "the sekuire developers; license Apache-2.0"
extensions = [
    "myst_parser",
    "notfound.extension",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_llms_txt",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = f"sekuire {version}"
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_search_scorer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "search-scores.js")
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = True
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f766e", "color-brand-content": "#0f766e"},
    "dark_css_variables": {"color-brand-primary": "#2dd4bf", "color-brand-content": "#2dd4bf"},
}

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
# A signature that is longer than this has a line for each parameter.
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

# The names of Python's own documentation that the docstrings use, kept here: a build needs no network.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "python.inv")}

copybutton_exclude = ".linenos, .gp, .go"
# Only what a reader would run: no output, no prompt.
copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-yaml pre, div.highlight-ini pre"

notfound_urls_prefix = None
ogp_site_url = ""
ogp_enable_meta_description = True
ogp_social_cards = {"enable": False}
llms_txt_full_max_size = None
