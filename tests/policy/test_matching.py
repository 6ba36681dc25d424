"""What an entry matches: names, domains, paths and extensions, and the tricks that must not work."""

from __future__ import annotations

import contextlib
import ntpath
import os
import pathlib
import sys
import unicodedata
from typing import Any, Dict, List, Optional, Sequence

import pytest

from sekuire.policy import matching
from sekuire.policy.matching import (
    Domains,
    Extensions,
    Names,
    Paths,
    Subject,
    Unreadable,
    name_problem,
    read_host,
    read_path,
)

needs_links = pytest.mark.skipif(os.name != "posix", reason="links need a privilege on Windows")


def own(entries: Sequence[str]) -> Dict[str, str]:
    """Return the entries of a list, each with itself as its value."""
    return {entry: entry for entry in entries}


# -- names ------------------------------------------------------------------------------------------------------------


def named(entries: Sequence[str], name: str, blocked: bool = False) -> bool:
    return Names(own(entries), generous=blocked).find(name) is not None


@pytest.mark.parametrize(
    ("entry", "yes", "no"),
    [
        ("read", ["read"], ["Read", "reads", "rea", "bread", "r\u0435ad"]),
        ("read_*", ["read_", "read_file", "read_*"], ["read", "xread_", "READ_file"]),
        ("*_file", ["_file", "read_file"], ["read_files", "file"]),
        ("a*b*c", ["abc", "aXbXc", "abbc", "abcbc"], ["ab", "acb", "abcd", "xabc"]),
        ("a**c", ["ac", "abc"], ["a", "c"]),
        ("a*a", ["aa", "aba"], ["a"]),
        ("*", ["anything", "*"], []),
        ("[a-z]", ["[a-z]"], ["a", "m"]),
        ("a.c", ["a.c"], ["abc"]),
        ("a?c", ["a?c"], ["abc"]),
        ("(x+x+)+y", ["(x+x+)+y"], ["xxxxy"]),
        ("google:docs:*", ["google:docs:read"], ["google:drive:read"]),
    ],
)
def test_names(entry: str, yes: List[str], no: List[str]) -> None:
    """Exact, or with stars; no other character means anything."""
    assert [name for name in yes if not named([entry], name)] == []
    assert [name for name in no if named([entry], name)] == []


def test_an_entry_is_found_by_the_first_that_matches() -> None:
    """The value of an entry is found, and that of ``*`` before that of another entry with a star."""
    names = Names({"b*": "B*", "a": "A", "*": "*"})
    assert [names.find("a"), names.find("b"), names.find("c")] == ["A", "*", "*"]


LOOKALIKES = [
    ("paypal", "p\u0430ypal"),  # Cyrillic a
    ("shell", "\uff53hell"),  # a full-width s
    ("kelvin", "\u212aelvin"),  # the Kelvin sign
    ("fix", "\ufb01x"),  # the ligature fi
    ("caf\u00e9", "cafe\u0301"),  # e with a combining accent
    ("stra\u00dfe", "strasse"),
    ("\u1e9b\u0323", "\u1e69"),
    ("Read", "read"),
    ("find", "f\u0131nd"),  # the dotless i
]


@pytest.mark.parametrize(("entry", "name"), LOOKALIKES)
def test_a_lookalike_is_not_allowed(entry: str, name: str) -> None:
    """What differs in any code point is another name, where the entry allows, alone or beside a star."""
    assert named([entry], entry)
    assert not named([entry], name)
    assert not named([name], entry)
    assert not named([f"{entry}*"], f"{name}x")


@pytest.mark.parametrize(("entry", "name"), LOOKALIKES[1:])
def test_a_blocked_name_is_not_evaded(entry: str, name: str) -> None:
    """Case and compatibility forms, which another program may drop, do not get a name past a blocked one."""
    assert named([entry], name, blocked=True)
    assert named([name], entry, blocked=True)
    assert named([f"*{entry}*"], f"x{name}x", blocked=True)


def test_a_lookalike_of_another_script_is_another_name() -> None:
    """No program takes a Cyrillic letter for a Latin one: the name is unknown, not blocked."""
    assert not named(["paypal"], "p\u0430ypal", blocked=True)


def test_an_accent_across_a_star() -> None:
    """A name that matches as it stands is blocked, whatever it is when composed."""
    assert named(["e*"], "e\u0301x", blocked=True)


@pytest.mark.parametrize(
    "name",
    [
        "", " x", "x ", "\tx", "x\n", "x\0", "x\x1b[0m", "x\u200b", "\ufeffx", "x\u00ad", "x\u202ey", "x\ud800",
        "x\u3164", "x\ufe0f", "x\u2028y", "x\U000e0041", "x\u00a0", "a" * 1025,
    ],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    """What shows nothing, or steers a terminal, is no part of a name."""
    assert name_problem(name)


@pytest.mark.parametrize("name", ["x", "a b", "x/y:z@1.0-b+c", "\u540d\u524d", "na\u00efve", "\U0001f600", "a" * 1024])
def test_names_that_are_names(name: str) -> None:
    """Everything else is."""
    assert name_problem(name) == ""


class Searched(str):
    """A name that notes how far each search in it goes."""

    spans: List[int] = []

    def find(self, piece: str, begin: Any = 0, end: Any = None) -> int:
        found = super().find(piece, begin, end)
        Searched.spans.append((found if found >= 0 else end) - begin)
        return found


def test_a_pattern_is_linear() -> None:
    """No part of a name is looked at again for another star: pieces are searched in what the last one left."""
    text = Searched("a" * 1000)
    for pattern in ("*a*a*a*a*a*a*a*a*b", "*" + "a*" * 400 + "b*", "a*" * 300, "*aa" * 200 + "*"):
        Searched.spans.clear()
        matching.glob(pattern.split("*"), text)
        assert sum(Searched.spans) <= len(text)
        assert len(Searched.spans) <= pattern.count("*")


@pytest.mark.parametrize(
    ("piece", "text"),
    [("a" * 50 + "b", "a" * 1000), ("ab" * 25 + "c", "ab" * 500), ("a", "b" * 1000), ("aabaaab" * 9, "aabaaa" * 170)],
)
def test_long_pieces_are_found(piece: str, text: str) -> None:
    """A long piece is found where it is, on inputs made to mislead a search."""
    assert matching.glob(["", piece, ""], text) is False
    assert matching.glob(["", piece, ""], text[:300] + piece + text[:300])
    assert matching.glob(["", "ba" * 100, ""], "ab" * 400 + "c")


# -- domains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("example.com", "example.com"),
        ("EXAMPLE.Com", "example.com"),
        ("example.com.", "example.com"),
        ("example.com:443", "example.com"),
        ("example.com.:443", "example.com"),
        ("localhost", "localhost"),
        ("my_service", "my_service"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("B\u00dcCHER.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("example\u3002com", "example.com"),
        ("example\uff0ecom\uff61", "example.com"),
        ("\uff45xample.com", "example.com"),
        ("ex\u00adample.com", "example.com"),
        ("ex\u200bample.com", "example.com"),
        ("a_b.b\u00fccher.example", "a_b.xn--bcher-kva.example"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0x7F.0.0.1", "127.0.0.1"),
        ("0177.0.0.01", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"),
        ("\u2460\u2461\u2466.0.0.1", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("1.2.3.4.", "1.2.3.4"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[::1]:443", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("2001:DB8::A", "2001:db8::a"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("[::FFFF:7f00:1]:80", "127.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]", "fe80::1"),
        ("64:ff9b::10.0.0.1", "10.0.0.1"),
        ("[64:FF9B::a00:1]:443", "10.0.0.1"),
        ("64:ff9b:1::a00:1", "10.0.0.1"),
        ("64:ff9b:1:ffff::a00:1", "10.0.0.1"),
        ("64:ff9b:1:a00:0:100::", "10.0.0.1"),
        ("2002:a00:1::", "10.0.0.1"),
        ("2002:a00:1:2::5%eth0", "10.0.0.1"),
        ("::10.0.0.1", "10.0.0.1"),
        ("::a00:1", "10.0.0.1"),
        ("::ffff:0:10.0.0.1", "10.0.0.1"),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", "10.0.0.1"),
        ("fe80::5efe:10.0.0.1", "10.0.0.1"),
        ("2001:db8::200:5efe:a00:1", "10.0.0.1"),
        ("::", "::"),
        ("64:ff9b:2::a00:1", "64:ff9b:2::a00:1"),
        ("2001:db8::a00:1", "2001:db8::a00:1"),
    ],
)
def test_hosts_in_one_form(text: str, form: str) -> None:
    """However a host is written, it is compared in the one form that it is reached by."""
    assert read_host(text) == (form,)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "a..b", ".a", "a..", "\u3002", "a\u3002\u3002b", "a b", " a", "a\n", "a\0b", "a/b", "a\\b",
        "a?b", "a#b", "https://example.com", "//example.com", "user@example.com", "user:password@example.com",
        "example.com@evil.org", "example.com:80@evil.org", "example.com:", "example.com:x", "example.com:99999",
        "example.com:-1", "example.com:\u0661", "a%2eb", "exam%70le.com", "*", "*.example.com", "[::1", "::1]",
        "[]", "[::1]x", "[::1]:", "[example.com]", ":::", "1:x", "\u2488com", "1.2.3.256", "1.2.3.4.5",
        "1_27.0.0.1", "127.-0.0.1", "0o177.0.0.1", "0x_7f.0.0.1",
        "256.256.256.256", "0x", "1.2.3.0x", "08.1.1.1", "4294967296", "foo.1", "a" * 64, ".".join(["a" * 60] * 5),
        "a" * 600, "evil\uff0fexample.com", "evil\u2100example.com", "\U0001f600\ud800", "\u2603.net",
        "a\uff20b.com", "x\uff1a80", "xn--\u00e9", "\u00ad", "-\u0300.com", "\u0625xa.example",
    ],
)  # fmt: skip
def test_hosts_that_are_none(text: str) -> None:
    """What another program could read as something else is not read at all."""
    with pytest.raises(Unreadable):
        read_host(text)


@pytest.mark.parametrize("value", [None, 5, b"example.com", ["example.com"]])
def test_hosts_of_other_types(value: Any) -> None:
    """Only a str is a host."""
    with pytest.raises(Unreadable, match="not a str"):
        read_host(value)


def domains(entries: Sequence[str], host: str, blocked: bool = False) -> bool:
    found = [Domains(own(entries), generous=blocked).find(form) is not None for form in read_host(host)]
    return any(found) if blocked else all(found)


@pytest.mark.parametrize(
    ("entry", "yes", "no"),
    [
        ("*", ["example.com", "localhost", "::1", "10.0.0.1"], []),
        (
            "example.com",
            ["example.com", "EXAMPLE.COM.", "example.com:1"],
            ["a.example.com", "xexample.com", "example.co"],
        ),
        (
            "*.example.com",
            ["example.com", "a.example.com", "a.b.c.example.com", "A.EXAMPLE.com."],
            ["notexample.com", "example.com.evil.org", "com", "example-com", "aexample.com"],
        ),
        ("*.com", ["a.com", "com"], ["a.org"]),
        ("*.b\u00fccher.example", ["xn--bcher-kva.example", "a.B\u00dcCHER.example"], ["bucher.example"]),
        ("xn--bcher-kva.example", ["b\u00fccher.example"], ["b\u0446cher.example"]),
        ("127.0.0.1", ["127.1", "0x7f.1", "::ffff:127.0.0.1", "127.0.0.1:80"], ["127.0.0.2", "localhost", "1.127.0.0"]),
        ("::1", ["[::1]:80", "0::1"], ["::2"]),
        ("EXAMPLE.com.", ["example.com"], ["example.org"]),
        ("paypal.com", ["paypal.com"], ["p\u0430ypal.com"]),
    ],
)
def test_domains(entry: str, yes: List[str], no: List[str]) -> None:
    """``*``, exact, or a domain with every subdomain; never a part of a label."""
    for blocked in (False, True):
        assert [host for host in yes if not domains([entry], host, blocked)] == []
        assert [host for host in no if domains([entry], host, blocked)] == []


def test_a_local_nat64_of_unknown_length() -> None:
    """Each reading may be meant: blocked if one of them is, allowed only if all are."""
    host = "64:ff9b:1:a01:2:300::"
    forms = read_host(host)
    assert "10.1.2.3" in forms
    assert domains(["10.1.2.3"], host, blocked=True)
    assert not domains(["10.1.2.3"], host)
    assert domains(forms, host)


@pytest.mark.parametrize(
    "written",
    [
        "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::1", "::a00:1", "::ffff:a00:1", "[64:ff9b::10.0.0.1]:80",
        "10.0.0.1.", "167772161", "0xa.1", "012.0.0.1", "\uff11\uff10.0.0.1",
    ],
)  # fmt: skip
def test_a_blocked_address_is_not_evaded(written: str) -> None:
    """However the address is written, in the entry or in what is asked, it is the same."""
    assert domains(["10.0.0.1"], written, blocked=True)
    assert domains([written.partition("]")[0].lstrip("[")], "10.0.0.1", blocked=True)


def test_a_name_that_two_standards_convert_differently() -> None:
    """It may go to either host: blocked if one is, allowed only if both are."""
    assert read_host("stra\u00dfe.example") == ("xn--strae-oqa.example", "strasse.example")
    assert domains(["strasse.example"], "stra\u00dfe.example", blocked=True)
    assert domains(["xn--strae-oqa.example"], "stra\u00dfe.example", blocked=True)
    assert not domains(["strasse.example"], "stra\u00dfe.example")
    assert not domains(["xn--strae-oqa.example"], "stra\u00dfe.example")
    assert domains(["strasse.example", "xn--strae-oqa.example"], "stra\u00dfe.example")
    # An entry blocks both hosts and allows the modern one alone.
    assert domains(["stra\u00dfe.example"], "strasse.example", blocked=True)
    assert domains(["stra\u00dfe.example"], "xn--strae-oqa.example")
    assert not domains(["stra\u00dfe.example"], "strasse.example")


# -- paths ------------------------------------------------------------------------------------------------------------


def paths(entries: Sequence[str], path: Any, blocked: bool = False) -> bool:
    return Paths(own(entries), generous=blocked).find(read_path(path)) is not None


@pytest.fixture
def tree(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """``work/`` (allowed, by convention here) beside ``secret/key``; the working directory is the parent of both."""
    root = pathlib.Path(os.path.realpath(tmp_path)) / "root"
    (root / "work" / "sub").mkdir(parents=True)
    (root / "work" / "file").touch()
    (root / "secret").mkdir()
    (root / "secret" / "key").touch()
    monkeypatch.chdir(root)
    return root


def test_a_directory_and_everything_under_it(tree: pathlib.Path) -> None:
    """``dir/*`` holds the directory, what is there, and what is not there yet; no sibling whose name begins alike."""
    for entry in (f"{tree}/work/*", "work/*", "./work/*", f"{tree}//work/./*", f"{tree}/secret/../work/*"):
        for path in (
            "work",
            "work/",
            "work/file",
            "work/sub/new/file",
            f"{tree}/work/file",
            "./work//file",
            b"work/file",
        ):
            assert paths([entry], path), (entry, path)
        for path in (
            "work2",
            "worksheet/x",
            "workx",
            "secret/key",
            ".",
            "/",
            "work/../secret/key",
            "work/sub/../../secret",
        ):
            assert not paths([entry], path), (entry, path)
    assert paths([f"{tree}/work/*"], pathlib.Path("work/file"))


def test_an_exact_path(tree: pathlib.Path) -> None:
    """Allows itself alone, and the list can say what was perhaps meant; blocks itself with everything under it."""
    assert paths(["work"], "work/")
    assert paths(["work/file"], f"{tree}/work/sub/../file")
    assert not paths(["work"], "work/file")
    assert not paths(["work/"], "work/file")
    assert paths(["work"], "work/file", blocked=True)
    assert paths(["work/"], "work/file", blocked=True)
    assert not paths(["work"], "workshop", blocked=True)
    hint = Paths(own(["work"])).hint(read_path("work/file"))
    assert f"'{tree}/work/*' would be what is under it" in hint
    assert Paths(own(["work"])).hint(read_path("secret/key")) == ""


def test_everything() -> None:
    """``*`` and the root hold every path."""
    for entry in ("*", "/*"):
        assert paths([entry], "/etc/passwd")
        assert paths([entry], "relative", blocked=True)
    assert not paths(["/"], "/etc")
    assert paths(["/"], "/etc", blocked=True)


@needs_links
def test_a_link_that_leads_out_of_an_allowed_directory(tree: pathlib.Path) -> None:
    """A link is where it leads: to a file, to a directory, to nothing yet, through another, back up through ``..``."""
    (tree / "work" / "link").symlink_to(tree / "secret" / "key")
    (tree / "work" / "dir").symlink_to("../secret")
    (tree / "work" / "dangling").symlink_to(tree / "secret" / "new")
    (tree / "work" / "chain").symlink_to("dir")
    (tree / "work" / "sub" / "up").symlink_to("../..")
    for path in (
        "link",
        "dir/key",
        "dir",
        "dangling",
        "chain/key",
        "chain/new/deep",
        "sub/up/secret/key",
        "dir/../secret/key",
    ):
        assert not paths(["work/*"], f"work/{path}"), path
        assert paths(["secret/*"], f"work/{path}", blocked=True), path
    # ".." after a link means the parent of where it leads: as a text this path stays inside.
    (tree / "other" / "deep").mkdir(parents=True)
    (tree / "work" / "out").symlink_to(tree / "other" / "deep")
    assert not paths(["work/*"], "work/out/../file")
    assert os.path.normpath("work/out/../file") == os.path.join("work", "file")


@needs_links
def test_links_in_entries(tree: pathlib.Path) -> None:
    """An entry means where its links lead; what is blocked also the place of the link itself."""
    (tree / "alias").symlink_to("work")
    assert paths(["alias/*"], "work/file")
    assert paths(["alias/*"], "alias/file")
    assert paths(["alias/*"], "work/file", blocked=True)
    (tree / "private").symlink_to("secret")
    assert paths(["private/*"], "secret/key", blocked=True)
    assert paths(["private"], "private", blocked=True)
    # Replaced by a link after the list was made, the allowed directory does not take its permission along.
    allowed = Paths(own(["work/*"]))
    (tree / "work").rename(tree / "moved")
    (tree / "work").symlink_to("secret")
    assert allowed.find(read_path("work/key")) is None


@needs_links
def test_other_names_of_a_blocked_file(tree: pathlib.Path) -> None:
    """A hard link to a blocked file is that file; a number used again by another file is not."""
    blocked = Paths(own(["secret/key", "gone"]), generous=True)
    os.link(tree / "secret" / "key", tree / "work" / "innocent")
    assert blocked.find(read_path("work/innocent")) == "secret/key"
    assert blocked.find(read_path("work/file")) is None
    (tree / "work" / "innocent").unlink()
    (tree / "secret" / "key").rename(tree / "work" / "kept")
    (tree / "secret" / "key").touch()
    assert blocked.find(read_path("work/kept")) is None
    # The file that has come in its place has other names, too.
    os.link(tree / "secret" / "key", tree / "work" / "again")
    assert blocked.find(read_path("work/again")) == "secret/key"


@needs_links
def test_a_long_chain_of_links(tree: pathlib.Path) -> None:
    """It is followed, or refused; as an entry it is an error of the policy. It ends no task."""
    before = tree / "work" / "file"
    for number in range(2 * sys.getrecursionlimit()):
        link = tree / "work" / f"l{number}"
        link.symlink_to(before)
        before = link
    for use in (lambda: read_path(str(before)), lambda: Paths(own([str(before)]))):
        with contextlib.suppress(Unreadable):
            use()


@pytest.mark.skipif(not os.path.exists("/proc/self/root"), reason="needs /proc")
def test_links_that_are_no_text(tree: pathlib.Path) -> None:
    """Links of /proc are followed where they say where they lead, and refused where they lie."""
    assert not paths(["work/*"], f"/proc/self/root{tree}/secret/key")
    assert paths(["secret/*"], f"/proc/self/root{tree}/secret/key", blocked=True)
    assert paths(["secret/*"], "/proc/self/cwd/secret/key", blocked=True)
    with open("work/gone", "wb") as file:
        os.unlink("work/gone")
        with pytest.raises(Unreadable, match="elsewhere"):
            read_path(f"/proc/self/fd/{file.fileno()}")


@needs_links
def test_a_path_through_nothing(tree: pathlib.Path) -> None:
    """``..`` after what does not exist cannot be opened, and is no lie either."""
    (tree / "link").symlink_to("work")
    assert paths(["work/*"], "link/nothing/../file")
    assert paths(["work/*"], "link/nothing/../../secret/key") is False


@needs_links
def test_a_loop_of_links(tree: pathlib.Path) -> None:
    """It ends."""
    (tree / "work" / "a").symlink_to("b")
    (tree / "work" / "b").symlink_to("a")
    assert paths(["secret/*"], "work/a/x", blocked=True) is False


@pytest.mark.parametrize(
    "path",
    [
        "", "a\0b", "~", "~/x", "~root/x", "file:///etc/passwd", "FILE://x", "http://x/y", "s3://bucket/key",
        "/" + "a/" * 3000, "/\ud800x", None, 5, ["x"], object(),
    ],
)  # fmt: skip
def test_paths_that_are_none(path: Any) -> None:
    """What a program would expand, fetch or cut is not read as a path."""
    with pytest.raises(Unreadable):
        read_path(path)


def test_a_path_object_that_fails() -> None:
    """It is refused as any other thing that is no path."""

    class Broken:
        def __fspath__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(Unreadable, match="a Broken, not a path"):
        read_path(Broken())


def test_two_slashes(tree: pathlib.Path) -> None:
    """A doubled root is the root."""
    assert read_path("//etc//passwd").written == "/etc/passwd"
    assert paths(["/etc/*"], "//etc/../etc/passwd", blocked=True)
    assert not paths([f"{tree}/work/*"], f"//{tree}/secret/key")


def test_home(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry may begin at the home directory; where none is known the list cannot be made."""
    monkeypatch.setenv("HOME", str(tree))
    monkeypatch.setenv("USERPROFILE", str(tree))
    assert paths(["~/secret/*"], "secret/key", blocked=True)
    assert paths(["~/*"], "work/file")
    assert paths(["~"], tree)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(Unreadable, match="home directory"):
        Paths(own(["~/x"]))


@pytest.mark.skipif(os.name != "posix", reason="Windows does not remove a working directory")
def test_a_working_directory_that_is_gone(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a relative path nor a relative entry can be resolved; absolute ones can."""
    gone = tree / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(Unreadable, match="cannot be resolved"):
        read_path("x")
    with pytest.raises(Unreadable, match="working directory"):
        Paths(own(["x/*"]))
    assert paths(["/etc/*"], "/etc/passwd")


@pytest.mark.skipif(os.name != "posix", reason="about entries for Windows elsewhere")
def test_entries_for_windows_match_nothing_elsewhere() -> None:
    """A fleet's policy may hold both kinds; a file whose name looks like one is another file."""
    for entry in ("C:\\data\\*", "c:/data/*", "\\\\server\\share\\*", "data\\*"):
        assert not paths([entry], "C:\\data\\x")
        assert not paths([entry], "data/x")
        assert not paths([entry], "/etc/passwd", blocked=True)


def test_a_list_of_paths_in_nfd() -> None:
    """An entry in one normal form blocks a path in the other, and does not allow it."""
    composed, apart = "/data/caf\u00e9/x", unicodedata.normalize("NFD", "/data/caf\u00e9/x")
    assert composed != apart
    assert paths(["/data/caf\u00e9/*"], apart, blocked=True)
    assert paths([apart], composed, blocked=True)
    assert not paths(["/data/caf\u00e9/*"], apart)


class Insensitive:
    """``os.stat`` of a file system that ignores case and accents' forms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: pathlib.Path) -> None:
        self._root = str(root)
        monkeypatch.setattr(matching, "_identity", self.identity)

    def identity(self, path: str) -> Optional[Any]:
        if path.startswith(self._root):
            existing = {str(one).lower(): one for one in [self._real(), *self._real().rglob("*")]}
            path = str(existing.get(path.lower(), path))
        try:
            status = os.stat(path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _real(self) -> pathlib.Path:
        return pathlib.Path(self._root)


def test_a_file_system_that_ignores_case(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There another case is the same path, blocked as well as allowed; here it is another."""
    if not os.path.exists(str(tree / "SECRET")):
        assert not paths([f"{tree}/secret/*"], tree / "SECRET" / "key", blocked=True)
        assert not paths([f"{tree}/work/*"], tree / "WORK" / "file")
    Insensitive(monkeypatch, tree)
    assert paths([f"{tree}/secret/*"], tree / "SECRET" / "KEY", blocked=True)
    assert paths([f"{tree}/secret/new/*"], tree / "secret" / "NEW" / "key", blocked=True)
    assert paths([f"{tree}/work/*"], tree / "WORK" / "new")
    assert paths([f"{tree}/work/file"], tree / "work" / "FILE")
    assert not paths([f"{tree}/work/*"], tree / "WORKS" / "new")
    # What is not there yet cannot be confirmed to be the same.
    assert not paths([f"{tree}/work/new"], tree / "work" / "NEW")


def test_guesses_where_nothing_tells(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file to ask about, systems that usually ignore case are taken to do so."""
    monkeypatch.setattr(matching, "_identity", lambda path: None)
    monkeypatch.setattr(matching, "_directory_ignores_case", lambda directory, flavour: None)
    for usually in (False, True):
        monkeypatch.setattr(matching, "_USUALLY_IGNORES_CASE", usually)
        assert paths(["/nowhere/secret/*"], "/nowhere/SECRET/x", blocked=True) is usually
        assert not paths(["/nowhere/secret/*"], "/nowhere/SECRET/x")


def test_a_directory_tells_by_what_it_holds(tree: pathlib.Path) -> None:
    """An existing entry of a directory shows whether case counts there; an empty one shows nothing."""
    sensitive = not os.path.exists(str(tree / "WORK"))
    assert matching._directory_ignores_case(str(tree), os.path) is (not sensitive)
    assert matching._directory_ignores_case(str(tree / "work" / "sub"), os.path) is None
    assert matching._directory_ignores_case(str(tree / "work" / "file"), os.path) is None
    assert matching._directory_ignores_case(str(tree / "nowhere"), os.path) is None


# -- paths of Windows, in code ----------------------------------------------------------------------------------------


def windows(entries: Sequence[str], path: str, blocked: bool = False) -> bool:
    found = Paths(own(entries), generous=blocked, flavour=ntpath)
    return found.find(read_path(path, ntpath)) is not None


def test_windows_paths() -> None:
    """Either slash, ``..``, drives, shares; case does not count for what is blocked."""
    assert windows(["C:\\data\\*"], "C:\\data\\x\\y")
    assert windows(["C:/data/*"], "C:\\data\\sub\\..\\x")
    assert windows(["C:\\data\\*"], "C:/data")
    assert not windows(["C:\\data\\*"], "C:\\data\\..\\secret")
    assert not windows(["C:\\data\\*"], "C:\\database")
    assert not windows(["C:\\data\\*"], "D:\\data\\x")
    assert windows(["C:\\Secret\\*"], "c:\\SECRET\\key", blocked=True)
    assert windows(["\\\\server\\share\\*"], "\\\\SERVER\\share\\x", blocked=True)
    assert windows(["*"], "D:\\x")


@pytest.mark.parametrize(
    "path",
    [
        "\\\\?\\C:\\x", "\\\\.\\C:\\x", "//?/C:/x", "\\\\.\\pipe\\x", "C:x", "C:", "C:\\x:stream", "x::$DATA",
        "C:\\x.", "C:\\x ", "C:\\a.\\b", "C:\\NUL", "con", "C:\\x\\com1.txt", "aux .txt", "lpt\u00b9",
        "C:\\CONIN$",
    ],
)  # fmt: skip
def test_windows_paths_that_mean_something_else(path: str) -> None:
    """Devices, streams, and names of which Windows drops a part."""
    with pytest.raises(Unreadable):
        read_path(path, ntpath)


def test_windows_names_that_only_look_so() -> None:
    """A device's name inside another name is none."""
    for path in ("C:\\console\\x", "C:\\..\\com10", "C:\\.\\a.b", "C:\\nullable"):
        assert isinstance(read_path(path, ntpath), Subject)


# -- extensions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "yes", "no"),
    [
        (
            [".csv"],
            ["/a.csv", "/a.CSV", "/x.y.csv", "a.csv"],
            ["/a.csv.exe", "/csv", "/.csv", "/a.csv.", "/a.csv ", "/acsv", "/a"],
        ),
        (["csv", "tar.gz"], ["/a.csv", "/a.tar.gz"], ["/a.gz", "/tar.gz", "/a.xtar.gz"]),
        (["*"], ["/a", "/a.b"], []),
        ([], [], ["/a", "/a.b"]),
        ([".k"], ["/a.K"], ["/a.\u212a"]),
        ([".\u00e9"], ["/a.\u00e9"], ["/a.e\u0301"]),
    ],
)
def test_extensions(entries: List[str], yes: List[str], no: List[str]) -> None:
    """Of the last part of a path, with or without the dot in the entry; one of several dots counts from any of them."""
    known = Extensions(entries)
    assert [path for path in yes if not known.holds(path)] == []
    assert [path for path in no if known.holds(path)] == []


def test_the_module_compiles_no_pattern_of_a_policy() -> None:
    """The only regular expressions are the module's own."""
    source = pathlib.Path(sys.modules[Names.__module__].__file__ or "").read_text(encoding="utf-8")
    assert source.count("re.compile(") == 3
    assert "fnmatch" not in source
