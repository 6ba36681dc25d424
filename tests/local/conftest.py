"""A local platform per test, and its client."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator

import pytest

from sekuire.local import LocalPlatform

from ..contract.client import Client, Installation


@pytest.fixture
def make() -> Iterator[Callable[..., LocalPlatform]]:
    """Started platforms with options of one's own, stopped at the end; no thread of theirs outlives them."""
    made = []

    def make(**options: Any) -> LocalPlatform:
        platform = LocalPlatform(**options)
        made.append(platform)
        platform.start()
        return platform

    yield make
    for platform in made:
        platform.stop()
    assert local_threads() == []


@pytest.fixture
def platform(make: Callable[..., LocalPlatform]) -> LocalPlatform:
    return make(redelivery_delay=0.2, retry_delay=0.05)


@pytest.fixture
def installation(platform: LocalPlatform) -> Installation:
    return client_of(platform).install()


def client_of(platform: LocalPlatform) -> Client:
    return Client(platform.url, platform.api_key)


def local_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sekuire-local")]
