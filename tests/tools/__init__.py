"""Checks of the source itself, for `tox -e lint`, and the measurements of its structure. Each is one command."""
