"""Provide fixtures over sekuire.testing to pytest. The plugin imports sekuire only when a fixture is used."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Dict, Iterator, List

import pytest

if TYPE_CHECKING:
    from sekuire.local import LocalPlatform
    from sekuire.testing import SubmittedTask, Workbench


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import the library before the first test if a test uses a fixture of it.

    It must see the clocks and HTTP classes that freezegun, responses or VCR.py replace while a test runs.
    """
    for item in session.items:
        if any(name.startswith("sekuire_") for name in getattr(item, "fixturenames", ())):
            # The fixture itself says what is missing.
            with contextlib.suppress(ImportError):
                import sekuire.local.platform
                import sekuire.testing  # noqa: F401
            return


@pytest.fixture
def sekuire_platform_options() -> Dict[str, Any]:
    """Return options of the ``LocalPlatform``. Override it in a module, a class or a conftest."""
    return {}


@pytest.fixture
def sekuire_workbench(sekuire_platform_options: Dict[str, Any]) -> Iterator[Workbench]:
    """Provide a ``sekuire.testing.Workbench``, closed at the end of the test."""
    from sekuire.testing import Workbench

    with Workbench(**sekuire_platform_options) as bench:
        yield bench


@pytest.fixture
def sekuire_platform(sekuire_workbench: Workbench) -> LocalPlatform:
    """Return a started ``LocalPlatform`` for this test alone."""
    return sekuire_workbench.platform


@pytest.fixture
def sekuire_worker(sekuire_workbench: Workbench) -> Any:
    """Return a function that makes workers, stopped at the end of the test: ``sekuire_worker(tasks)``."""
    return sekuire_workbench.worker


@pytest.fixture
def sekuire_environment(sekuire_workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Dict[str, str]:
    """Set and return the variables with which ``SekuireSDK.from_env()`` finds ``sekuire_platform``."""
    variables = sekuire_workbench.environment()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def sekuire_run() -> Any:
    """Return what runs the tasks of ``sekuire_submitted``, None for nothing. Override it in a module or a conftest."""
    return None


@pytest.fixture
def sekuire_submitted(sekuire_run: Any) -> Iterator[List[SubmittedTask]]:
    """Provide the list of what is submitted during the test, by ``sekuire.testing.submitted``."""
    from sekuire.testing import submitted

    with submitted(sekuire_run) as tasks:
        yield tasks
