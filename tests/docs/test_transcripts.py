"""The documentation shows what the terminals show; `python -m tests.docs.transcripts --write` updates it."""

from __future__ import annotations

import os

import pytest

from . import transcripts
from .markdown import read


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
@pytest.mark.parametrize("name", transcripts.SCENES)
def test_a_scene(name: str) -> None:
    """What a person sees in a scene is on the page, line by line."""
    seen = transcripts.play(name)
    for page in transcripts.PAGES:
        for where, text in transcripts.shown(read(page), name).items():
            assert text == seen[where], f"{name}, {where}"


def test_every_scene_is_on_a_page() -> None:
    """And no page has a transcript that nothing writes."""
    found = set()
    for page in map(read, transcripts.PAGES):
        shown = {name: transcripts.shown(page, name) for name in transcripts.SCENES}
        found |= {name for name, terminals in shown.items() if terminals}
        assert page.count("<!-- transcript: ") == sum(map(len, shown.values()))
    assert found == set(transcripts.SCENES)
