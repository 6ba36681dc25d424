"""A program that reports to Sentry: no envelope of it holds a secret."""

from __future__ import annotations

import pathlib
from typing import Any, Dict, Iterator

import pytest

from ..test_disclosure import found_in, run_life

pytestmark = pytest.mark.full


@pytest.fixture
def life(tmp_path: pathlib.Path) -> Iterator[Dict[str, Any]]:
    pytest.importorskip("sentry_sdk")
    yield from run_life(tmp_path, "tests.support.reported_life")


def test_no_secret_is_in_an_envelope(life: Dict[str, Any]) -> None:
    """The events of failed handlers, refused logins and wrong options, with variables, breadcrumbs and stacks."""
    output = life["output"]
    envelopes = output[output.index("the envelopes:") :]
    for text in ("ZeroDivisionError", "AuthenticationError", "KeyboardInterrupt", "breadcrumbs", '"vars"'):
        assert text in envelopes
    assert found_in(output, life["secrets"]) == []
