"""What every race needs: threads that switch all the time."""

from __future__ import annotations

import sys
from typing import Iterator

import pytest


@pytest.fixture
def fast_switch() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
