"""What a Beacon and its Workers share: checked stores, an end."""

from __future__ import annotations

import pathlib
import time
from typing import Any, Iterator, List

import pytest

from sekuire._internal.scrub import scrub
from sekuire.config import AgentConfig
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.credentials.store import Renewed
from sekuire.errors import ConfigurationError
from sekuire.session.installation import Installation
from sekuire.wire.models import Grant, RuntimeCredentials


class OtherStore:
    current = generation = update = None


@pytest.fixture
def made() -> Iterator[List[Installation]]:
    made: List[Installation] = []
    yield made
    for one in made:
        one.close()


def install(made: List[Installation], api_key: Any = None, **options: Any) -> Installation:
    made.append(Installation(AgentConfig(agent_id="a", **options), pool_size=1, api_key=api_key))
    return made[-1]


def test_a_store_of_another_make(made: List[Installation]) -> None:
    """Only the library's own store keeps tokens in step; another one is refused by name."""
    with pytest.raises(ConfigurationError, match="got OtherStore") as caught:
        install(made, credentials_store=OtherStore())
    assert caught.value.option == "credentials_store"


def test_nothing_to_authenticate_with(made: List[Installation]) -> None:
    """Without credentials and without a store there is nothing to begin with; a store may be filled later."""
    with pytest.raises(ConfigurationError, match="no credentials"):
        install(made)
    install(made, credentials_store=RuntimeCredentialsStore())


def test_replaced_tokens_are_remembered(tmp_path: pathlib.Path) -> None:
    """A token that was renewed since a handler read it may still be taken by the platform: it is looked for too."""
    path = tmp_path / "credentials.json"
    store = RuntimeCredentialsStore(path=path)
    store.update(RuntimeCredentials(installation_id="i", runtime_token="skr_first_1", refresh_token="skf_first_1"))
    now = time.monotonic(), time.time()
    grant = Grant(credentials=RuntimeCredentials(runtime_token="skr_second_2"))
    assert store.offer(store.generation, Renewed(grant=grant, sent_at=now[0], sent_wall=now[1]))
    RuntimeCredentialsStore(path=path).update(
        RuntimeCredentials(runtime_token="skr_third_3", refresh_token="skf_third_3")
    )
    assert store.reload()
    assert scrub("skr_first_1 skf_first_1 skr_second_2 skr_third_3 skf_third_3") == "*** *** *** *** ***"


def test_only_so_many_replaced_tokens_are_kept() -> None:
    """However often a token is renewed, the memory for those that were is bounded, and the newest are in it."""
    store = RuntimeCredentialsStore()
    for number in range(1000, 2000):
        store.update(RuntimeCredentials(runtime_token=f"skr_old_{number}", refresh_token="skf_same"))
    assert [scrub(f"skr_old_{number}") for number in (1999, 1998, 1950)] == ["***"] * 3
    assert len(store.secrets) < 200


def test_capabilities_are_united(made: List[Installation]) -> None:
    """What is declared later is added, each name once."""
    one = install(made, install_token="skt", capabilities=["x"])
    one.declare("y", "x")
    assert one._names == ("x", "y")


def test_closing_ends_every_wait(made: List[Installation]) -> None:
    """close() sets the event on which logins wait, and may be called twice."""
    one = install(made, install_token="skt")
    for _ in range(2):
        one.close()
    assert one.stop.is_set()
