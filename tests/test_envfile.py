"""A .env file: how its lines are read, and what may be combined with it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import traceback
from typing import Dict, List

import pytest

from sekuire import SekuireSDK, envfile
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform

from .support.users import give_to_another

POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
HERE = "http://127.0.0.1:9300"
ELSEWHERE = "https://platform.example"


@pytest.fixture(autouse=True)
def _own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for name in [name for name in os.environ if name.startswith("SEKUIRE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(*lines: str, name: str = ".env") -> pathlib.Path:
    path = pathlib.Path(name)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path.chmod(0o600)
    return path


# -- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("SEKUIRE_A=b", "b"),
        ("  export SEKUIRE_A=b  ", "b"),
        ("export\tSEKUIRE_A=b", "b"),
        ("SEKUIRE_A=b # a comment", "b"),
        ("SEKUIRE_A=b#c", "b#c"),
        ("SEKUIRE_A='it costs $5' # a comment", "it costs $5"),
        ("SEKUIRE_A='a\\b'", "a\\b"),
        ('SEKUIRE_A="it\'s \\"here\\" for \\$5 \\\\ \\n"', 'it\'s "here" for $5 \\ \\n'),
        ("SEKUIRE_A=b\r\n", "b"),
        ("SEKUIRE_A=https://host/path?a=b&c", "https://host/path?a=b&c"),
        ("SEKUIRE_A=ä", "ä"),
    ],
)
def test_a_value(text: str, wanted: str) -> None:
    """export, quotes and comments are as in a shell."""
    assert envfile.parse(text, ".env") == {"SEKUIRE_A": wanted}


@pytest.mark.parametrize("text", ["", "# SEKUIRE_A=b", "SEKUIRE_A=", "SEKUIRE_A= # nothing", "OTHER='", "FOO bar $(x)"])
def test_lines_without_a_value_for_us(text: str) -> None:
    """Lines of other programs are skipped, whatever they hold; an empty value counts as none."""
    assert envfile.parse(text, ".env") == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("SEKUIRE_A", "must be NAME=VALUE"),
        ("SEKUIRE_A =b", "remove the space before the ="),
        ("SEKUIRE_A= b", "SEKUIRE_A: remove the space after the ="),
        ("SEKUIRE_a=b", "'SEKUIRE_a' is not the name of a variable"),
        ("SEKUIRE_A=b c", "put a value with spaces in quotes"),
        ("SEKUIRE_A=b'c'", "put a value with a quote or a backslash in quotes"),
        ("SEKUIRE_A='b", "the ' is not closed on this line"),
        ('SEKUIRE_A="b\\"', 'the " is not closed on this line'),
        ("SEKUIRE_A='b'c", "there is text after the closing quote"),
        ("SEKUIRE_A='b'#c", "there is text after the closing quote"),
        ("SEKUIRE_A=$HOME", "a $ is not replaced here"),
        ('SEKUIRE_A="$(id)"', "a $ is not replaced here"),
        ("SEKUIRE_A='b\x07'", "the value holds a control character"),
        ("SEKUIRE_A=c\nSEKUIRE_A=secret", "SEKUIRE_A is set in line 2 already"),
        ("SEKUIRE_RELOADER=1", "is set by the library itself"),
    ],
)
def test_a_malformed_line(text: str, problem: str) -> None:
    """The error names file, line and what is wrong, and shows no value."""
    with pytest.raises(ConfigurationError) as caught:
        envfile.parse(f"# the first line\n{text}", "some/.env")
    assert f"some/.env, line {2 + text.count(chr(10))}: " in str(caught.value)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["plain", "two words", "it's", 'a"$`\\b', 'it\'s $5 `x` \\ "y"', "#", "a=b", "ä"])
def test_a_line_that_is_written(value: str) -> None:
    """format_line() writes what parse() reads, and a shell too."""
    line = envfile.format_line("SEKUIRE_A", value)
    assert envfile.parse(line, ".env") == {"SEKUIRE_A": value}
    if os.name == "posix":
        script = f'{line}\nprintf %s "$SEKUIRE_A"'
        assert subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout.decode() == value


# -- files ------------------------------------------------------------------------------------------------------------


def test_no_file_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library call reads a file only where it is named. Then the environment wins, and it is not changed."""
    write(f"SEKUIRE_API_URL={HERE}", "SEKUIRE_AGENT_ID=from-file", "SEKUIRE_INSTALL_TOKEN=skt_1")
    with pytest.raises(ConfigurationError, match="SEKUIRE_AGENT_ID"):
        SekuireSDK.from_env()
    sdk = SekuireSDK.from_env(".env")
    assert (sdk.config.agent_id, sdk.config.api_base_url) == ("from-file", HERE)
    assert [name for name in os.environ if name.startswith("SEKUIRE_")] == []
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "from-environment")
    assert SekuireSDK.from_env(env_file=pathlib.Path(".env")).config.agent_id == "from-environment"
    assert SekuireSDK.from_env(".env", agent_id="given").config.agent_id == "given"


def test_an_error_names_the_file() -> None:
    """A wrong value is said to be in the file, not in the environment."""
    write(f"SEKUIRE_API_URL={HERE}", "SEKUIRE_AGENT_ID=a", "SEKUIRE_INSTALL_TOKEN='has space'")
    with pytest.raises(ConfigurationError) as caught:
        SekuireSDK.from_env(".env")
    assert "SEKUIRE_INSTALL_TOKEN in .env" in str(caught.value)
    assert "has space" not in "".join(
        traceback.format_exception(ConfigurationError, caught.value, caught.value.__traceback__)
    )


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing", "there is no file 'missing'"),
        ("", "must be a path"),
        (5, "must be a path"),
        (".", "not a regular file"),
    ],
)
def test_a_named_file_that_is_not_there(path: object, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        SekuireSDK.from_env(path)  # type: ignore[arg-type]


@POSIX_ONLY
def test_a_file_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, whether it was named or found."""
    path = write("SEKUIRE_AGENT_ID=a")
    give_to_another(path, monkeypatch)
    for read in (envfile.find, lambda: envfile.read(".env")):
        with pytest.raises(ConfigurationError, match="belongs to another user"):
            read()


@POSIX_ONLY
def test_a_file_that_others_may_write() -> None:
    write("SEKUIRE_AGENT_ID=a").chmod(0o602)
    with pytest.raises(ConfigurationError, match="can be written by others; run: chmod 600"):
        envfile.find()


@POSIX_ONLY
def test_what_is_not_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file is named, a .env without our variables counts as none: a directory, a FIFO, another's file."""
    assert envfile.find() is None
    path = pathlib.Path(".env")
    path.mkdir()
    assert envfile.find() is None
    path.rmdir()
    os.mkfifo(path)
    assert envfile.find() is None
    path.unlink()
    path = write("OTHER='1")
    path.chmod(0o666)
    assert envfile.find() is None


@pytest.mark.parametrize("content", [b"SEKUIRE_A=\xff", b"SEKUIRE_A=1\n" + b"#" * 1024 * 1024])
def test_a_file_that_is_no_text(content: bytes) -> None:
    path = write()
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"is not UTF-8 text|is larger than 1 MiB"):
        envfile.find()


# -- what may be combined ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [HERE, "http://localhost:1", "http://[::1]:9300"])
def test_a_found_file_names_this_machine(url: str) -> None:
    write(f"SEKUIRE_API_URL={url}")
    found = envfile.find()
    assert found is not None
    assert found.values == {"SEKUIRE_API_URL": url}


@pytest.mark.parametrize(
    "url",
    [ELSEWHERE, "http://127.0.0.1@evil.example", "http://127.0.0.1.evil.example", "http://[::1", "evil.example", "//x"],
)
def test_a_found_file_names_another_machine(url: str) -> None:
    """It is refused, and named it is not."""
    write(f"SEKUIRE_API_URL={url}")
    with pytest.raises(ConfigurationError, match="may name this machine only") as caught:
        envfile.find()
    assert "--env-file .env" in str(caught.value)
    assert envfile.read(".env").values == {"SEKUIRE_API_URL": url}


@pytest.mark.parametrize("name", ["SEKUIRE_POLICY_DEV_OVERRIDE", "SEKUIRE_ALLOW_INSECURE_HTTP"])
def test_a_found_file_switches_nothing_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{name}=0")
    with pytest.raises(ConfigurationError, match=name):
        envfile.find()
    assert envfile.read(".env").values == {name: "0"}
    monkeypatch.setenv(name, "1")
    found = envfile.find()
    assert found is not None
    assert not found.values


@pytest.mark.parametrize("option", envfile.CREDENTIALS)
def test_a_credential_from_elsewhere(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file must not decide where a credential from the environment or an option goes."""
    write(f"SEKUIRE_API_URL={HERE}", "SEKUIRE_AGENT_ID=a", "SEKUIRE_INSTALL_TOKEN=skt_1", "SEKUIRE_INSTALLATION_ID=i")
    with pytest.raises(ConfigurationError, match=rf"\.env names the platform, .* the option {option}: "):
        SekuireSDK.from_env(".env", **{option: "secret"})  # type: ignore[arg-type]
    name = f"SEKUIRE_{option.upper()}"
    monkeypatch.setenv(name, "secret")
    with pytest.raises(ConfigurationError, match=rf"the environment \({name}\)") as caught:
        SekuireSDK.from_env(".env")
    assert "secret" not in str(caught.value)
    # With the address from the same place, it is fine.
    monkeypatch.setenv("SEKUIRE_API_URL", HERE)
    SekuireSDK.from_env(".env")
    monkeypatch.delenv("SEKUIRE_API_URL")
    SekuireSDK.from_env(".env", api_base_url=HERE)


def test_a_store_from_elsewhere() -> None:
    write(f"SEKUIRE_API_URL={HERE}", "SEKUIRE_AGENT_ID=a", "SEKUIRE_INSTALL_TOKEN=skt_1")
    with pytest.raises(ConfigurationError, match="the option credentials_store"):
        SekuireSDK.from_env(".env", credentials_store=RuntimeCredentialsStore())


def test_a_stored_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that grew from the file's own are used at the next start. Others are refused and stay as they are."""
    with LocalPlatform() as platform:

        def lines(token: str) -> List[str]:
            given = {"API_URL": platform.url, "AGENT_ID": "a", "INSTALL_TOKEN": token}
            return [f"SEKUIRE_{name}={value}" for name, value in given.items()]

        monkeypatch.setenv("SEKUIRE_CREDENTIALS_FILE", "credentials.json")
        write(*lines(platform.create_install_token("a")))
        ids = set()
        for _ in range(2):
            with SekuireSDK.from_env(".env") as sdk:
                ids.add(sdk.installation_credentials.installation_id)
        assert len(ids) == 1
        before = pathlib.Path("credentials.json").read_bytes()
        write(*lines(platform.create_install_token("a")))
        with pytest.raises(ConfigurationError, match=r"the file 'credentials\.json' \(SEKUIRE_CREDENTIALS_FILE\)"):
            SekuireSDK.from_env(".env")
        assert pathlib.Path("credentials.json").read_bytes() == before


def test_the_environment_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """in_environment() sets what the environment does not, and takes it away again."""
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "mine")
    write("SEKUIRE_AGENT_ID=theirs", "SEKUIRE_WORKSPACE_ID=ws")
    found = envfile.read(".env")
    assert found.set_elsewhere == ("SEKUIRE_AGENT_ID",)
    inside: Dict[str, str] = {}
    with envfile.in_environment(found):
        inside.update(os.environ)
    assert (inside["SEKUIRE_AGENT_ID"], inside["SEKUIRE_WORKSPACE_ID"]) == ("mine", "ws")
    assert "SEKUIRE_WORKSPACE_ID" not in os.environ
    assert os.environ["SEKUIRE_AGENT_ID"] == "mine"
