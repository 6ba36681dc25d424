"""The platform under test: the local one, or any other that ``SEKUIRE_CONTRACT_URL`` and ``…_API_KEY`` name."""

from __future__ import annotations

import os
from typing import Iterator

import pytest

from .client import Client, Installation


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    url = os.environ.get("SEKUIRE_CONTRACT_URL")
    if url:
        yield Client(url, os.environ["SEKUIRE_CONTRACT_API_KEY"])
        return
    from sekuire.local import LocalPlatform

    # What the contract leaves open is set short, so that the tests are.
    with LocalPlatform(redelivery_delay=0.2, keepalive_interval=0.5) as platform:
        yield Client(platform.url, platform.api_key)


@pytest.fixture
def installation(client: Client) -> Installation:
    """An installation of an agent of its own."""
    return client.install()
