"""Fixtures of the bridges' tests: commands of other projects run as those of the library do."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from ..cli.conftest import run as run


@pytest.fixture
def platform(make_platform: Callable[..., Any]) -> Any:
    """A platform that soon redelivers a task which an ending worker has ignored."""
    return make_platform(redelivery_delay=0.2)
