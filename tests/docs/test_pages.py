"""What the pages say about names and values is what the code says."""

from __future__ import annotations

import re
from typing import Any, List

import attrs
import pytest

from sekuire import cli, config, errors
from sekuire.secret import Secret
from sekuire.wire import protocol

from .markdown import PAGES, ROOT, links, read, table

OWNERS = {
    "Connection": config.ConnectionConfig,
    "Agent": config.AgentConfig,
    "Worker": config.WorkerConfig,
    "Beacon": config.BeaconConfig,
    "SDK": config.SDKConfig,
    "Policy client": config.PolicyClientConfig,
}


@pytest.mark.parametrize("heading", OWNERS)
def test_options_are_listed_with_their_defaults(heading: str) -> None:
    """Each table of docs/configuration.md lists the options that its class adds, in their order, with the defaults."""
    owner = OWNERS[heading]
    inherited = {field.name: field.default for base in owner.__mro__[1:-1] for field in attrs.fields(base)}
    own = [field for field in attrs.fields(owner) if inherited.get(field.name, owner) != field.default]
    rows = table("docs/configuration.md", heading)
    assert [row[0] for row in rows] == [f"`{field.name}`" for field in own]
    assert [row[1] for row in rows] == [default_of(field) for field in own]


def default_of(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    if isinstance(field.default, int) and field.default >= config.MIB:
        return f"`{field.default // config.MIB} MiB`"
    assert not isinstance(field.default, Secret)
    return f"`{field.default!r}`"


def test_environment_variables_are_listed() -> None:
    """docs/configuration.md lists the variables that from_env() reads, and docs/protocol.md all of the contract's."""
    rows = table("docs/configuration.md", "Environment variables")
    wanted = {variable: f"`{option}`" for option, variable in config.ENVIRONMENT.items()}
    wanted[config.CREDENTIALS_FILE_VARIABLE] = "the path of a `RuntimeCredentialsStore`"
    wanted[config.OUTBOX_VARIABLE] = "`outbox` of the SDK's workers"
    wanted[config.POLICY_KEYS_VARIABLE] = "`trusted_policy_keys`, separated by commas"
    assert {row[0].strip("`"): row[1] for row in rows} == wanted
    assert set(wanted) <= set(re.findall(r"SEKUIRE_[A-Z_]+", read("docs/protocol.md")))


def test_failure_codes_are_listed() -> None:
    """docs/protocol.md lists the library's failure codes and whether they are retryable."""
    text = read("docs/protocol.md")
    found = dict(re.findall(r"^\| `([a-z_]+)` \| (yes|no) \|", text, flags=re.MULTILINE))
    assert found == {code: "yes" if retryable else "no" for code, retryable in protocol.RETRYABLE.items()}


def test_endpoints_are_listed() -> None:
    """docs/protocol.md names every endpoint that `endpoints` can override, and every path is on the page."""
    text = read("docs/protocol.md")
    for name, path in protocol.DEFAULT_ENDPOINTS.items():
        assert f"`{name}`" in text
        assert path[len(protocol.API_PREFIX) :] in text


def test_errors_are_listed() -> None:
    """docs/concepts.md explains every error."""
    rows = table("docs/concepts.md", "Errors")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == set(errors.__all__) - {"SekuireError"}


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/cli.md has a section for every command of ``sekuire --help``."""
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    named = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, flags=re.MULTILINE)
    sections = re.findall(r"^## `sekuire (\w+)", read("docs/cli.md"), flags=re.MULTILINE)
    assert sections == named != []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links name files that exist, and headings that they have."""
    broken: List[str] = []
    for link in links(page):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.is_file():
            broken.append(link)
        elif heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            if heading not in [title.lower().replace(" ", "-") for title in titles]:
                broken.append(link)
    assert broken == []


def test_readme_has_the_commands_that_ci_runs() -> None:
    """README.md marks exactly the two commands that .ci/run takes from it."""
    assert re.findall(r"^<!-- ci: (\w+) -->\n```sh\n", read("README.md"), flags=re.MULTILINE) == ["main", "tests"]
