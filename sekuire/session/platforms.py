"""Find out where this process runs: docker, kubernetes, a Lambda function or a plain machine (docs/protocol.md)."""

from __future__ import annotations

import os
import re
import socket
from typing import Any, Callable, Dict, Mapping, Optional

_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


def _read(path: str) -> str:
    """Return the beginning of a small file, or an empty string if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(65536)
    except OSError:
        return ""


def detect(
    environ: Optional[Mapping[str, str]] = None,
    read: Callable[[str], str] = _read,
    exists: Callable[[str], bool] = os.path.exists,
) -> Dict[str, Any]:
    """Return the ``platform`` object of a heartbeat: ``type``, and what the contract lists for it and is known.

    The parameters are the environment and the file system to look at, by default this process's own.
    """
    env = os.environ if environ is None else environ
    known: Dict[str, Optional[str]]
    if env.get("AWS_LAMBDA_FUNCTION_NAME"):
        known = {
            "type": "aws_lambda",
            "function_name": env["AWS_LAMBDA_FUNCTION_NAME"],
            "region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
        }
    elif env.get("KUBERNETES_SERVICE_HOST"):
        known = {
            "type": "kubernetes",
            "pod_name": env.get("POD_NAME") or env.get("HOSTNAME"),
            "namespace": env.get("POD_NAMESPACE") or read(_NAMESPACE_FILE).strip() or None,
            "node": env.get("NODE_NAME"),
        }
    elif exists("/.dockerenv") or "docker" in read("/proc/1/cgroup"):
        found = _CONTAINER_ID.search(read("/proc/self/cgroup")) or _CONTAINER_ID.search(read("/proc/self/mountinfo"))
        known = {
            "type": "docker",
            "container_id": found.group() if found else env.get("HOSTNAME"),
            "image": env.get("DOCKER_IMAGE") or env.get("CONTAINER_IMAGE"),
        }
    else:
        import platform

        return {
            "type": "bare_metal",
            "hostname": socket.gethostname(),
            "os": f"{platform.system()} {platform.release()}".strip(),
            "pid": os.getpid(),
        }
    # The environment may hold bytes that are not UTF-8, which JSON cannot carry.
    return {name: value.encode("utf-8", "replace").decode() for name, value in known.items() if value}


def runtime_info() -> Dict[str, Any]:
    """Return the ``runtime_info`` of a bootstrap: host name, process id, platform."""
    return {"hostname": socket.gethostname(), "pid": os.getpid(), "platform": detect()}
