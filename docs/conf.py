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
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = f"sekuire {version}"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
