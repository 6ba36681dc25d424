"""What the pages say about names and values is what the code says."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, Set

import attrs
import pytest

from sekuire import cli, config, errors
from sekuire.secret import Secret
from sekuire.wire import protocol

from . import diagrams
from .markdown import PAGES, ROOT, links, listed, read, table

OWNERS = {
    "Connection": config.ConnectionConfig,
    "Agent": config.AgentConfig,
    "Worker": config.WorkerConfig,
    "Beacon": config.BeaconConfig,
    "SDK": config.SDKConfig,
    "Client": config.ClientConfig,
    "Policy trust": config.PolicyTrust,
    "Policy client": config.PolicyClientConfig,
}


@pytest.mark.parametrize("heading", OWNERS)
def test_options_are_listed_with_their_defaults(heading: str) -> None:
    """Each section of docs/configuration.md lists the options that its class adds, in order, with the defaults."""
    owner = OWNERS[heading]
    inherited = {
        field.name: field.default for base in owner.__mro__[1:-1] if attrs.has(base) for field in attrs.fields(base)
    }
    own = [field for field in attrs.fields(owner) if inherited.get(field.name, owner) != field.default]
    found = [(name, default) for name, default, _ in listed("docs/configuration.md", heading)]
    assert found == [(field.name, default_of(field)) for field in own]


def default_of(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "(required)"
    if isinstance(field.default, int) and field.default >= config.MIB:
        return f"(default `{field.default // config.MIB} MiB`)"
    assert not isinstance(field.default, Secret)
    return f"(default `{field.default!r}`)"


def test_each_option_has_an_anchor() -> None:
    """``configuration.html#max-workers`` leads to ``max_workers``; an anchor of a later section names its section."""
    found = re.findall(r"^`(\w+)`\{#([\w-]+)\}", read("docs/configuration.md"), flags=re.MULTILINE)
    anchors = [anchor for _, anchor in found]
    assert len(found) > 50
    assert len(set(anchors)) == len(anchors)
    assert [name for name, anchor in found if not anchor.endswith(name.lower().replace("_", "-"))] == []
    assert ("max_workers", "max-workers") in found


def test_environment_variables_are_listed() -> None:
    """docs/configuration.md lists the variables that from_env() reads, and docs/protocol.md all of the contract's."""
    rows = listed("docs/configuration.md", "Environment variables")

    def option(name: str) -> str:
        return f"[`{name}`](#{name.replace('_', '-')})"

    wanted = {variable: f"{option(name)}." for name, variable in config.ENVIRONMENT.items()}
    wanted[config.CREDENTIALS_FILE_VARIABLE] = "The path of a `RuntimeCredentialsStore`."
    wanted[config.OUTBOX_VARIABLE] = f"{option('outbox')} of the SDK's workers."
    wanted[config.POLICY_KEYS_VARIABLE] = f"{option('trusted_policy_keys')}, separated by commas."
    wanted[config.HEALTH_STATUS_VARIABLE] = (
        "Show [`/status`](observability.md#who-sees-what) to other machines too; a boolean variable."
    )
    booleans = config.BOOLEAN_ENVIRONMENT.items()
    wanted.update({variable: f"{option(name)}; a boolean variable." for name, variable in booleans})
    assert {name: text for name, _, text in rows} == wanted
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


#: The mark that says where something of the contract is from.
_PROVENANCE = re.compile(r"\b(doc|sdk|ours|our reading)\b", re.IGNORECASE)


def sections(page: str) -> Dict[str, str]:
    """The text below each heading of a page, up to the next one, without code blocks."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def without_provenance(text: str) -> Iterator[str]:
    """What does not say where it is from. A list or a table may say it as a whole, in the sentence before it."""
    is_introduced = False
    for block in filter(None, re.split(r"\n{2,}", text.strip())):
        found = [block]
        if block.startswith("|"):
            head, _, *rows = block.splitlines()
            found = [] if is_introduced or _PROVENANCE.search(head) else rows
        elif block.startswith("- "):
            found = [] if is_introduced else re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        yield from (one for one in found if not _PROVENANCE.search(one))
        is_introduced = bool(_PROVENANCE.search(block)) and block.endswith(":")


def test_the_contract_says_where_it_is_from() -> None:
    """Each paragraph, list and table of docs/protocol.md carries its provenance: doc, sdk or ours."""
    named = sections("docs/protocol.md")
    del named["Protocol"], named["What is implemented"]
    found = {heading: list(without_provenance(text)) for heading, text in named.items()}
    assert {heading: blocks for heading, blocks in found.items() if blocks} == {}


def test_what_is_not_implemented_is_not_there() -> None:
    """What docs/protocol.md lists as missing is missing: no path, no variable and no failure code of it exists."""
    missing = set(re.findall(r"`([^`]+)`", sections("docs/protocol.md")["Not implemented yet"]))
    paths = {name.rpartition(" ")[2] for name in missing if "/" in name} - {"/tasks"}
    assert missing
    assert not {protocol.API_PREFIX + path for path in paths} & set(protocol.DEFAULT_ENDPOINTS.values())
    assert not missing & set(config.KNOWN_VARIABLES)
    assert not missing & set(protocol.RETRYABLE)


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


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_whose_library_it_is(page: str) -> None:
    """The first lines say that this is not Sekuire's own library, and how to run it beside another ``sekuire``."""
    first = read(page).partition("\n## ")[0].partition("```")[0]
    assert len(first.splitlines()) < 20
    for words in ("community library", "not made by Sekuire", "not `sekuire-sdk`", "`python -m sekuire`"):
        assert words in " ".join(first.split())


def anchors(text: str) -> Set[str]:
    """Return what a link to a page may name: its headings as the builder writes them, and its own anchors."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"\{#([\w-]+)\}", text)) | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links name files that exist, and headings that they have."""
    broken: List[str] = []
    for link in links(page):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.is_file() or (heading and heading not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


def test_readme_has_the_commands_that_ci_runs() -> None:
    """README.md marks exactly the two commands that .ci/run takes from it."""
    assert re.findall(r"^<!-- ci: (\w+) -->\n```sh\n", read("README.md"), flags=re.MULTILINE) == ["main", "tests"]


def test_diagrams_are_drawn_from_their_sources() -> None:
    """Each picture was drawn from the present text of its diagram."""
    assert diagrams.outdated() == []
