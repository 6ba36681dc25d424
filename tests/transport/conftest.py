"""Certificates made once for the tests of this folder."""

from __future__ import annotations

import shutil

import pytest

from ..support.servers import Certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    return Certificates(str(tmp_path_factory.mktemp("tls")))
