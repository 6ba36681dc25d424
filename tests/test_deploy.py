"""What the deploy kit and the library must agree on. tests/full/test_deploy.py has the tools that read its files."""

from __future__ import annotations

import configparser
import http.client
import json
import re
from typing import Any, Dict, Iterator, List, Set

import pytest
import yaml

from sekuire.config import WorkerConfig

from .docs.markdown import ROOT, read
from .support.scripted import Scripted
from .support.waiting import GUARD

DEPLOY = ROOT / "deploy"
#: Seconds that the last reports and the last heartbeat may take after the drain.
AFTER_THE_DRAIN = 10.0


def documents(name: str) -> List[Dict[str, Any]]:
    return [one for one in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()) if one]


def pod_of(name: str) -> Dict[str, Any]:
    found: Dict[str, Any] = documents(name)[0]["spec"]["template"]["spec"]
    return found


def metrics_in(text: str) -> Set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsekuire_[a-z_]+", text)}


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_alerts_and_dashboard_ask_for_metrics_that_there_are(scripted: Scripted, worker_of: Any) -> None:
    """Each name in a query is a metric that a worker shows at /metrics."""
    worker = worker_of(scripted, health=("127.0.0.1", 0))
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.task("t1")
        scripted.completion("t1")
        connection = http.client.HTTPConnection(*worker.health_address, timeout=GUARD)
        connection.request("GET", "/metrics")
        shown = connection.getresponse().read().decode()
        connection.close()
    known = set(re.findall(r"^# TYPE (sekuire_\w+)", shown, re.M))
    asked = set().union(*map(metrics_in, expressions()))
    assert asked - known == set()
    assert len(asked) > 15


def test_the_alerts_are_documented() -> None:
    page = read("docs/deploying.md")
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in page] == []


def test_the_dashboards_panels_have_places_of_their_own() -> None:
    """No id twice, no two panels in one place."""
    panels = json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: Set[Any] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("name", ["deployment.yaml", "statefulset.yaml"])
def test_a_pod_has_what_a_worker_needs(name: str) -> None:
    """Time to drain, the right probe for each question, a directory for the files, a group that owns it."""
    pod = pod_of(name)
    (container,) = pod["containers"]
    drain = WorkerConfig(agent_id="a", runtime_token="rt").shutdown_timeout
    assert pod["terminationGracePeriodSeconds"] >= drain + AFTER_THE_DRAIN
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"] == 10001
    (mount,) = (one for one in container["volumeMounts"] if one["name"] == "state")
    image = (DEPLOY / "Dockerfile").read_text()
    for variable in ("SEKUIRE_CREDENTIALS_FILE", "SEKUIRE_OUTBOX"):
        assert f"{variable}={mount['mountPath']}/" in image
    assert "subPath" not in mount
    assert documents("secret.yaml")[0]["metadata"]["name"] == "my-agent"


def test_the_unit_waits_for_the_drain() -> None:
    """systemd gives it the time of shutdown_timeout and more, and lets it report by itself."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd/sekuire-worker@.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert float(service["TimeoutStopSec"]) >= 30.0 + AFTER_THE_DRAIN
    assert service["RestartPreventExitStatus"] == "2"


def test_compose_waits_for_the_drain() -> None:
    for name, service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items():
        if name != "platform":
            assert float(service["stop_grace_period"].rstrip("s")) >= 30.0 + AFTER_THE_DRAIN
