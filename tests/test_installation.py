"""What a Beacon and its Workers share: checked stores, scrubbed texts, an end."""

from __future__ import annotations

from typing import Any, Iterator, List

import pytest

from sekuire.config import AgentConfig
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.errors import ConfigurationError
from sekuire.installation import Installation
from sekuire.models import RuntimeCredentials
from sekuire.secret import Secret


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


def test_live_tokens_are_scrubbed(made: List[Installation]) -> None:
    """Every token that is live now is taken out of a text, those of a later renewal too."""
    store = RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr_1", refresh_token="skf_1"))
    one = install(made, api_key=Secret("sk_key"), install_token="skt_install", credentials_store=store)
    assert one.scrub("a skr_1 b skf_1 c skt_install d sk_key e skr_1") == "a *** b *** c *** d *** e ***"
    store.update(RuntimeCredentials(runtime_token="skr_2"))
    assert one.scrub("skr_2") == "***"


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
