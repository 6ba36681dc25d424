"""Fixtures of the bridges' tests: commands of other projects run as those of the library do."""

from ..cli.conftest import run as run
