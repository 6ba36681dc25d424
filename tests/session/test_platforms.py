"""Where a process runs: told by the environment and the file system."""

from __future__ import annotations

import json
import os
import pathlib
import socket
from typing import Any, Dict, Mapping

import pytest

from sekuire.session import platforms
from sekuire.session.platforms import detect, runtime_info

CONTAINER = "0123456789abcdef" * 4


def look(environ: Mapping[str, str], files: Mapping[str, str] = {}) -> Dict[str, Any]:
    return detect(environ, lambda path: files.get(path, ""), lambda path: path in files)


def test_a_plain_machine() -> None:
    """Without a sign of anything else it is a plain machine, with host name, system and process id."""
    found = look({})
    assert found["type"] == "bare_metal"
    assert found["hostname"] == socket.gethostname()
    assert found["pid"] == os.getpid()
    assert found["os"]


@pytest.mark.parametrize(
    ("environ", "files", "expected"),
    [
        (
            {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_REGION": "eu-west-1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            {},
            {"type": "aws_lambda", "function_name": "f", "region": "eu-west-1"},
        ),
        (
            {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_DEFAULT_REGION": "eu-north-1"},
            {},
            {"type": "aws_lambda", "function_name": "f", "region": "eu-north-1"},
        ),
        ({"AWS_LAMBDA_FUNCTION_NAME": "f"}, {}, {"type": "aws_lambda", "function_name": "f"}),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "p", "POD_NAMESPACE": "n", "NODE_NAME": "m"},
            {"/.dockerenv": ""},
            {"type": "kubernetes", "pod_name": "p", "namespace": "n", "node": "m"},
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "p-1"},
            {"/var/run/secrets/kubernetes.io/serviceaccount/namespace": "default\n"},
            {"type": "kubernetes", "pod_name": "p-1", "namespace": "default"},
        ),
        (
            {"DOCKER_IMAGE": "agent:1"},
            {"/.dockerenv": "", "/proc/self/cgroup": f"0::/docker/{CONTAINER}\n"},
            {"type": "docker", "container_id": CONTAINER, "image": "agent:1"},
        ),
        (
            {"CONTAINER_IMAGE": "agent:2"},
            {"/.dockerenv": "", "/proc/self/mountinfo": f"1 2 /var/lib/docker/containers/{CONTAINER}/hostname x\n"},
            {"type": "docker", "container_id": CONTAINER, "image": "agent:2"},
        ),
        ({"HOSTNAME": "0123456789ab"}, {"/.dockerenv": ""}, {"type": "docker", "container_id": "0123456789ab"}),
        ({"HOSTNAME": "h"}, {"/proc/1/cgroup": "1:cpu:/docker/x"}, {"type": "docker", "container_id": "h"}),
    ],
)
def test_known_platforms(environ: Dict[str, str], files: Dict[str, str], expected: Dict[str, str]) -> None:
    """Each platform is told by its own signs, with what the contract lists as far as it is known."""
    assert look(environ, files) == expected


def test_undecodable_environment_is_sent_nevertheless() -> None:
    """Bytes in the environment that are no UTF-8 do not make every heartbeat fail."""
    found = look({"AWS_LAMBDA_FUNCTION_NAME": "f\udcff"})
    assert json.dumps(found, ensure_ascii=False).encode()


def test_files_are_read_as_far_as_needed(tmp_path: pathlib.Path) -> None:
    """A missing or unreadable file is an empty one, and of a large one only the beginning is read."""
    large = tmp_path / "large"
    large.write_bytes(b"\xff" * 100_000)
    assert len(platforms._read(str(large))) == 65536
    assert platforms._read(str(tmp_path / "missing")) == ""
    assert platforms._read(str(tmp_path)) == ""


def test_what_a_bootstrap_tells() -> None:
    """The runtime info names host and process and where they run; nothing of it fails on this machine."""
    info = runtime_info()
    assert info["hostname"] == socket.gethostname()
    assert info["pid"] == os.getpid()
    assert info["platform"]["type"] in ("bare_metal", "docker", "kubernetes", "aws_lambda")
    assert json.dumps(info)
