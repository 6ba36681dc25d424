"""The pytest plugin: fixtures over sekuire.testing. It imports nothing of sekuire before a fixture is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterator

import pytest

if TYPE_CHECKING:
    from sekuire.local import LocalPlatform
    from sekuire.testing import Workbench


@pytest.fixture
def sekuire_platform_options() -> Dict[str, Any]:
    """Options of the ``LocalPlatform``; override it in a module, a class or a conftest."""
    return {}


@pytest.fixture
def sekuire_workbench(sekuire_platform_options: Dict[str, Any]) -> Iterator[Workbench]:
    """A ``sekuire.testing.Workbench``, closed at the end of the test."""
    from sekuire.testing import Workbench

    with Workbench(**sekuire_platform_options) as bench:
        yield bench


@pytest.fixture
def sekuire_platform(sekuire_workbench: Workbench) -> LocalPlatform:
    """A started ``LocalPlatform``, for this test alone."""
    return sekuire_workbench.platform


@pytest.fixture
def sekuire_worker(sekuire_workbench: Workbench) -> Any:
    """Makes workers of ``sekuire_platform``: ``sekuire_worker(tasks)``, stopped at the end of the test."""
    return sekuire_workbench.worker


@pytest.fixture
def sekuire_environment(sekuire_workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Dict[str, str]:
    """The variables with which ``SekuireSDK.from_env()`` finds ``sekuire_platform``, set for this test."""
    variables = sekuire_workbench.environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables
