"""Match names, domains, paths and extensions with the entries of a policy's lists.

An entry is read once, when its list is made. A question is then answered by look-ups in dictionaries, without a lock.
The rules are those of docs/policy.md, "Matching". Some subjects can be read in two ways. A list of what is allowed must
hold both readings, and a list of what is blocked either of them.
"""

from __future__ import annotations

import ipaddress
import ntpath
import os
import posixpath
import re
import stat
import sys
import unicodedata
from typing import Any, Dict, Generic, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar

__all__ = [
    "Domains",
    "Extensions",
    "Names",
    "Paths",
    "Subject",
    "domain_problem",
    "extension_problem",
    "glob",
    "name_problem",
    "path_problem",
    "read_host",
    "read_path",
]

V = TypeVar("V")

#: Longest name, in characters; a longer one is refused.
MAX_NAME = 1024
#: Longest host, with port, in characters. Converting a name to ASCII takes more than linear time.
MAX_HOST = 512
#: Longest path, in characters; what is longer cannot be opened.
MAX_PATH = 4096
MAX_WINDOWS_PATH = 32767


class Unreadable(ValueError):
    """Report a subject that cannot be compared with any entry. The text says why."""


# -- names ------------------------------------------------------------------------------------------------------------

#: Invisible characters outside the categories Cc, Cf, Zl and Zp.
_INVISIBLE = frozenset([0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0]).union(
    range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0)
)
#: Unicode categories whose characters no name may hold.
_FORBIDDEN = frozenset(["Cc", "Cf", "Cs", "Zl", "Zp"])


def name_problem(text: str) -> str:
    """Return why ``text`` is neither a name nor an entry for names, or an empty text if it is one."""
    if not text:
        return "is empty"
    if len(text) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    if text[0].isspace() or text[-1].isspace():
        return "begins or ends with a space"
    if text.isascii():
        return "" if text.isprintable() else "holds a control character"
    for character in text:
        if unicodedata.category(character) in _FORBIDDEN or ord(character) in _INVISIBLE:
            return f"holds the invisible or control character U+{ord(character):04X}"
    return ""


def fold_name(text: str) -> str:
    """Return ``text`` without the differences that another program may ignore: compatibility forms and case."""
    if text.isascii():
        return text.lower()
    # Through upper case: the dotless "i" and the usual one have the same capital.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).upper().casefold())


def glob(pieces: Sequence[str], text: str) -> bool:
    """Return True if ``text`` matches a pattern that was split at its stars.

    No part of ``text`` is searched for a second star again, and :data:`MAX_NAME` bounds the cost of each search.
    """
    first, last = pieces[0], pieces[-1]
    if len(pieces) == 1:
        return text == first
    begin, end = len(first), len(text) - len(last)
    if begin > end or not text.startswith(first) or not text.endswith(last):
        return False
    # The leftmost place for each piece leaves the most for the next ones, so that no piece has to be moved later.
    for piece in pieces[1:-1]:
        if piece:
            found = text.find(piece, begin, end)
            if found < 0:
                return False
            begin = found + len(piece)
    return True


#: A pattern that was split at its stars, and its value.
_Glob = Tuple[List[str], V]


def _find_glob(globs: Iterable[_Glob[V]], name: str) -> Optional[V]:
    for pieces, value in globs:
        if glob(pieces, name):
            return value
    return None


class Names(Generic[V]):
    """Find the entry that matches a name; each entry is exact or has stars.

    :param entries: each entry with the value that :meth:`find` returns for it.
    :param generous: match also what differs only in case or in compatibility forms. This is for what is blocked.
    """

    __slots__ = ("_any", "_exact", "_folded", "_folded_globs", "_globs")

    def __init__(self, entries: Mapping[str, V], *, generous: bool = False) -> None:
        self._exact: Dict[str, V] = {}
        self._folded: Dict[str, V] = {}
        self._any: Optional[V] = None
        globs: List[_Glob[V]] = []
        folded_globs: List[_Glob[V]] = []
        for entry, value in entries.items():
            if "*" not in entry:
                self._exact[entry] = value
                if generous:
                    self._folded.setdefault(fold_name(entry), value)
            elif not entry.strip("*"):
                self._any = value if self._any is None else self._any
            else:
                globs.append((entry.split("*"), value))
                if generous:
                    folded_globs.append((fold_name(entry).split("*"), value))
        self._globs = tuple(globs)
        self._folded_globs = tuple(folded_globs)

    def find(self, name: str) -> Optional[V]:
        """Return the value of an entry that matches ``name``, or None."""
        found = self._exact.get(name)
        if found is not None:
            return found
        if self._any is not None:
            return self._any
        found = _find_glob(self._globs, name)
        if found is None and (self._folded or self._folded_globs):
            folded = fold_name(name)
            found = self._folded.get(folded)
            if found is None:
                found = _find_glob(self._folded_globs, folded)
        return found


# -- domains ----------------------------------------------------------------------------------------------------------

_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_DIGITS = frozenset("0123456789")
#: What the standards for international names take for a dot.
_DOTS = re.compile("[.\u3002\uff0e\uff61]")
_HEX_DIGITS = frozenset("0123456789abcdef")


def read_host(text: str) -> Tuple[str, ...]:
    """Return the forms in which a host may be looked up, in lower-case ASCII, without port, brackets and final dot.

    An address has one form, however it was written (``127.1``, ``0x7f.0.0.1``). An IPv6 address that leads to an IPv4
    address becomes that address (``::ffff:7f00:1``, ``64:ff9b::7f00:1``). Two kinds of hosts have several forms: a name
    that the two standards for international names convert differently, and an address of a local NAT64, whose prefix
    may have several lengths.

    :raises Unreadable: ``text`` is not a host.
    """
    if not isinstance(text, str):
        raise Unreadable(f"it is a {type(text).__name__}, not a str")
    if len(text) > MAX_HOST:
        raise Unreadable(f"it is longer than {MAX_HOST} characters")
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not _is_port(rest)):
            raise Unreadable("it is not a host name or address")
        return _ipv6(inside)
    if ":" in text:
        if text.count(":") > 1:
            return _ipv6(text)
        text, colon, port = text.partition(":")
        if not _is_port(colon + port):
            raise Unreadable("it is not a host name or address; give the host alone, not a URL")
    if text.isascii():
        return (_ascii_host(text),)
    return _international(text)


def _is_port(text: str) -> bool:
    digits = text[1:]
    return text[:1] == ":" and 0 < len(digits) <= 5 and set(digits) <= _DIGITS and int(digits) <= 65535


def _ascii_host(text: str) -> str:
    host = text.lower()
    if host.endswith("."):
        host = host[:-1]
    if not host:
        raise Unreadable("it is empty")
    if not _HOST_CHARACTERS.issuperset(host):
        raise Unreadable("it holds characters that no host name has; give the host alone, not a URL")
    if len(host) > 253:
        raise Unreadable("it is longer than a host name can be")
    if host[0] == "." or host[-1] == "." or ".." in host:
        raise Unreadable("it has an empty label")
    if len(host) > 63 and any(len(label) > 63 for label in host.split(".")):
        raise Unreadable("it has a label of more than 63 characters")
    last = host.rpartition(".")[2]
    if last[0] in _DIGITS and _is_numeric(last):
        return _ipv4(host)
    return host


def _is_numeric(label: str) -> bool:
    return _DIGITS.issuperset(label) or (label[:2] == "0x" and _HEX_DIGITS.issuperset(label[2:]))


def _ipv4(host: str) -> str:
    # inet_aton() and browsers read up to four parts, each decimal, octal or hexadecimal.
    parts = host.split(".")
    numbers = []
    for part in parts:
        try:
            # int() alone would accept "1_27" and "0o177" too, which no resolver does.
            base = 16 if part[:2] == "0x" else 8 if part[:1] == "0" else 10
            numbers.append(int(part, base) if _is_numeric(part) else -1)
        except ValueError:
            numbers.append(-1)
    *front, last = numbers
    if len(numbers) > 4 or min(numbers) < 0 or any(one > 255 for one in front) or last >= 256 ** (5 - len(numbers)):
        raise Unreadable("it ends in a number and is not an address")
    value = last
    for index, one in enumerate(front):
        value += one << (8 * (3 - index))
    return str(ipaddress.IPv4Address(value))


def _ipv6(text: str) -> Tuple[str, ...]:
    try:
        address = ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        address = None
    if address is None:
        raise Unreadable("it is not a host name or address; give the host alone, not a URL")
    return tuple(str(one) for one in _embedded_ipv4(address) or (address,))


#: Prefixes of IPv6 addresses that end in the IPv4 address they lead to: mapped, translated (SIIT), NAT64 (RFC 6052),
#: and compatible (RFC 4291, except the unspecified and the loopback address).
_ENDING_IN_IPV4 = tuple(
    ipaddress.IPv6Network(prefix) for prefix in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "::/96")
)
#: NAT64 of a local network (RFC 8215). Its own prefix may have any length that RFC 6052 allows.
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


def _embedded_ipv4(address: ipaddress.IPv6Address) -> Tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses that packets to ``address`` may reach by a transition mechanism; none for most."""
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return (address.teredo[1],)
    value = int(address)
    last = value & 0xFFFFFFFF
    if address in _LOCAL_NAT64:
        # By prefixes of 96, 64, 56 and 48 bits. The bits 64 to 71 belong to none of them.
        readings = (
            last,
            value >> 24 & 0xFFFFFFFF,
            (value >> 64 & 0xFF) << 24 | value >> 32 & 0xFFFFFF,
            (value >> 64 & 0xFFFF) << 16 | value >> 40 & 0xFFFF,
        )
        # No host is in 0.0.0.0/8 or 240.0.0.0/4: such a reading comes from the bits that fill the address up.
        plausible = dict.fromkeys(one for one in readings if 0 < one >> 24 < 240)
        return tuple(ipaddress.IPv4Address(one) for one in plausible or (last,))
    # An interface of ISATAP (RFC 5214) has 0:5efe or 200:5efe before its IPv4 address.
    is_isatap = value >> 32 & 0xFDFFFFFF == 0x5EFE
    if value > 1 and (is_isatap or any(address in network for network in _ENDING_IN_IPV4)):
        return (ipaddress.IPv4Address(last),)
    return ()


def _international(text: str) -> Tuple[str, ...]:
    import idna

    try:
        labels = [_international_label(label, idna) for label in _DOTS.split(text)]
    except (idna.IDNAError, ValueError, IndexError):
        labels = []
    if not labels:
        raise Unreadable("it is not a name that can be converted to ASCII (IDNA)")
    modern = _ascii_host(".".join(labels))
    try:
        # The socket module follows the standard of 2003 ("ß" becomes "ss").
        old = _ascii_host(text.encode("idna").decode("ascii"))
    except ValueError:
        old = modern
    return (modern,) if old == modern else (modern, old)


def _international_label(label: str, idna: Any) -> str:
    if not label.isascii():
        # Full-width letters become ASCII, capitals become lower case, and invisible characters are removed.
        label = idna.uts46_remap(label, std3_rules=False, transitional=False)
    return label if label.isascii() else idna.alabel(label).decode("ascii")


def domain_problem(text: str) -> str:
    """Return why ``text`` cannot be an entry for domains, or an empty text if it can."""
    if text == "*":
        return ""
    is_wild = text.startswith("*.")
    host = text[2:] if is_wild else text
    try:
        form = read_host(host)[0]
    except Unreadable as error:
        if "*" in host:
            return "has a star elsewhere than at its beginning, as in '*.example.com'"
        return f"is not a domain: {error}"
    is_address = ":" in form or form.rpartition(".")[2].isdigit()
    if is_wild and is_address:
        return "asks for subdomains of an address"
    if host.startswith("[") or (":" in host and ":" not in form and not is_address):
        return "has a port or brackets; an entry is a host alone"
    if is_address and host.count(":") == 1:
        return "has a port; an entry is a host alone"
    return ""


class Domains(Generic[V]):
    """Find the entry that matches a host: ``*``, exact, or ``*.example.com`` (that domain and every subdomain).

    :param entries: each entry with the value that :meth:`find` returns for it.
    :param generous: match an entry by every form in which it can be looked up, not only by the modern one. This is for
        what is blocked.
    """

    __slots__ = ("_any", "_exact", "_trees")

    def __init__(self, entries: Mapping[str, V], *, generous: bool = False) -> None:
        self._any = entries.get("*")
        self._exact: Dict[str, V] = {}
        self._trees: Dict[str, V] = {}
        for entry, value in entries.items():
            if entry == "*":
                continue
            is_tree = entry.startswith("*.")
            forms = read_host(entry[2:] if is_tree else entry)
            for form in forms if generous else forms[:1]:
                (self._trees if is_tree else self._exact).setdefault(form, value)

    def find(self, form: str) -> Optional[V]:
        """Return the value of an entry that matches one form of a host (:func:`read_host`), or None."""
        if self._any is not None:
            return self._any
        found = self._exact.get(form)
        if found is not None or not self._trees:
            return found
        trees = self._trees
        while True:
            found = trees.get(form)
            if found is not None:
                return found
            _, dot, form = form.partition(".")
            if not dot:
                return None


# -- paths ------------------------------------------------------------------------------------------------------------

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$", "clock$"]
    + [f"{name}{number}" for name in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"]
)
#: True on systems whose file systems ignore case by default.
_USUALLY_IGNORES_CASE = sys.platform in ("darwin", "cygwin")


def path_problem(text: str) -> str:
    """Return why ``text`` cannot be an entry for paths, or an empty text if it can."""
    if not text:
        return "is empty"
    if text == "*":
        return ""
    if "\0" in text:
        return "holds a NUL character"
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        return "holds a lone surrogate"
    if len(text) > MAX_PATH:
        return f"is longer than {MAX_PATH} characters"
    directory, _ = _split_entry(text)
    if "*" in directory:
        return "has a star elsewhere than at its end, as in '/data/*'"
    if directory.startswith("~") and directory[1:2] not in ("", "/", "\\"):
        return "names the home of another user; write the path"
    if _SCHEME.match(text):
        return "is a URL, not a path"
    return ""


def _split_entry(entry: str) -> Tuple[str, bool]:
    """Return the path that an entry names, and True if it means everything under that path too."""
    if entry.endswith("/*"):
        return entry[:-2] or "/", True
    if entry.endswith("\\*") and len(entry) > 2:
        return entry[:-2], True
    return entry, False


def _is_of_windows(entry: str) -> bool:
    return bool(_DRIVE.match(entry)) or entry.startswith("\\\\") or entry.endswith("\\*")


class Subject(NamedTuple):
    """Hold a path in its two readings: normalised as a text, and as the file system resolves it."""

    written: str
    real: str


def path_text(path: Any) -> str:
    """Return a str, bytes or path object as a str.

    :raises Unreadable: it is none of these.
    """
    text = path
    if not isinstance(path, str):
        try:
            text = os.fsdecode(path)
        except Exception:  # noqa: BLE001
            # A path object may be the user's own code.
            text = None
    if not isinstance(text, str):
        raise Unreadable(f"it is a {type(path).__name__}, not a path")
    return text


def read_path(path: Any, flavour: Any = os.path) -> Subject:
    """Return both readings of a path, each absolute.

    :raises Unreadable: no program opens the path exactly as it is written.
    """
    path = path_text(path)
    if not path:
        raise Unreadable("it is empty")
    if "\0" in path:
        raise Unreadable("it holds a NUL character")
    if path[0] == "~":
        raise Unreadable("it begins with '~', which not every program expands; expand it, or put './' before it")
    if _SCHEME.match(path):
        raise Unreadable("it is a URL, not a path")
    is_windows = flavour is ntpath
    if len(path) > (MAX_WINDOWS_PATH if is_windows else MAX_PATH):
        raise Unreadable("it is longer than a path can be")
    if is_windows:
        problem = windows_problem(path)
        if problem:
            raise Unreadable(problem)
    try:
        os.fsencode(path)
        written = _one_root(flavour.abspath(path), flavour)
        real = _one_root(flavour.realpath(path), flavour)
    except (OSError, ValueError, RecursionError):
        # The working directory is gone, the path cannot be encoded, or its links form too long a chain.
        real = ""
    if not real:
        raise Unreadable("it cannot be resolved")
    if written != real:
        opened = _identity(path)
        if opened is not None and opened != _identity(real):
            # A link of /proc leads where its text does not say: into another container, to a deleted file.
            raise Unreadable("its links lead elsewhere than they say")
    return Subject(written, real)


def _one_root(path: str, flavour: Any) -> str:
    # POSIX lets a system give "//" another meaning than "/". No system in use does.
    if flavour is posixpath and path.startswith("//"):
        return "/" + path.lstrip("/")
    # On Windows a share is the same directory with and without a slash at its end.
    return path if flavour.splitdrive(path)[1] else path + flavour.sep


def windows_problem(path: str) -> str:
    """Return why Windows would open something else than ``path`` says, or an empty text if it would not."""
    plain = path.replace("/", "\\")
    if plain.startswith(("\\\\?\\", "\\\\.\\", "\\??\\")):
        return "it is in the namespace of devices"
    rest = plain[2:] if _DRIVE.match(path) else plain
    if ":" in rest:
        return "it names a drive without a root, or a stream of a file"
    for part in rest.split("\\"):
        if part in ("", ".", ".."):
            continue
        if part[-1] in ". ":
            return "a part of it ends with a dot or a space, which Windows drops"
        if part.partition(".")[0].rstrip().lower() in _DEVICES:
            return f"{part!r} is the name of a device"
    return ""


def fold_path(path: str) -> str:
    """Return ``path`` as a file system that ignores case and the forms of accents compares it."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def compose(path: str) -> str:
    """Return ``path`` with each accent composed with its letter (NFC)."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def _ancestors(path: str, flavour: Any) -> List[str]:
    """Return ``path`` and every directory above it."""
    found = [path]
    while True:
        parent = flavour.dirname(path)
        if parent == path:
            return found
        path = parent
        found.append(path)


class _Place(NamedTuple):
    """Hold a path that an entry names on this machine, and the entry's value."""

    path: str
    value: Any


class Paths(Generic[V]):
    """Find the entry that matches a path: exact, or ``dir/*`` (the directory and everything under it).

    Entries are resolved when the list is made: relative ones begin at the working directory, ``~`` at the home
    directory, and links are followed. An entry written for another system (a drive letter on POSIX) matches nothing.

    :param entries: each entry with the value that :meth:`find` returns for it.
    :param generous: match either reading of a path, everything under a directory that is named alone, another case
        where the file system ignores case, and other names of a file. This is for what is blocked.
    :raises Unreadable: an entry cannot be resolved on this machine.
    """

    __slots__ = ("_any", "_exact", "_files", "_flavour", "_folded", "_generous", "_ids", "_lowered", "_trees")

    def __init__(self, entries: Mapping[str, V], *, generous: bool = False, flavour: Any = os.path) -> None:
        self._flavour = flavour
        self._generous = generous
        self._any = entries.get("*")
        self._exact: Dict[str, V] = {}
        self._trees: Dict[str, V] = {}
        # Blocked: folded paths of directories on file systems that ignore case. Allowed: lower-case paths, which the
        # file system has to confirm.
        self._folded: Dict[str, V] = {}
        self._lowered: Dict[str, List[Tuple[str, bool, V]]] = {}
        self._ids: Dict[Tuple[int, int], _Place] = {}
        # Blocked entries that may be files. A file can be replaced, and the new one can have hard links.
        self._files: List[_Place] = []
        for entry, value in entries.items():
            if entry != "*":
                self._add(entry, value)

    def _add(self, entry: str, value: V) -> None:
        flavour = self._flavour
        text, is_tree = _split_entry(entry)
        if flavour is posixpath and _is_of_windows(entry):
            return
        if text[0] == "~":
            text = flavour.expanduser("~") + text[1:]
        if text[0] == "~":
            raise Unreadable(f"{entry!r} begins at the home directory, which is not known here")
        try:
            written = _one_root(flavour.abspath(text), flavour)
            real = _one_root(flavour.realpath(text), flavour)
        except (OSError, ValueError, RecursionError):
            written = real = ""
        if not real:
            raise Unreadable(f"{entry!r} cannot be resolved here (is the working directory gone?)")
        for path in dict.fromkeys((written, real)):
            if self._generous:
                self._trees.setdefault(compose(path), value)
                if _ignores_case(path, flavour):
                    self._folded.setdefault(fold_path(path), value)
                identity = _identity(path)
                if identity is not None:
                    self._ids.setdefault(identity, _Place(path, value))
                if not is_tree and not os.path.isdir(path):
                    self._files.append(_Place(path, value))
            else:
                (self._trees if is_tree else self._exact).setdefault(path, value)
                self._lowered.setdefault(path.lower(), []).append((path, is_tree, value))

    def find(self, subject: Subject) -> Optional[V]:
        """Return the value of an entry that matches, or None."""
        if self._any is not None:
            return self._any
        return self._find_blocked(subject) if self._generous else self._find_allowed(subject.real)

    def hint(self, subject: Subject) -> str:
        """Return how an entry could be meant to match ``subject``, or an empty text if nothing suggests it."""
        for path in _ancestors(subject.real, self._flavour)[1:]:
            if path in self._exact:
                return f"; {path!r} there is that path alone, and {path + '/*'!r} would be what is under it"
        return ""

    def _find_allowed(self, real: str) -> Optional[V]:
        found = self._exact.get(real)
        if found is not None:
            return found
        above = _ancestors(real, self._flavour)
        for path in above:
            found = self._trees.get(path)
            if found is not None:
                return found
        for path in above:
            for place, is_tree, value in self._lowered.get(path.lower(), ()):
                # Another spelling is the same place only if the file system says so.
                if (is_tree or path == real) and _same_file(path, place):
                    return value
        return None

    def _find_blocked(self, subject: Subject) -> Optional[V]:
        flavour = self._flavour
        above = _ancestors(subject.real, flavour)
        paths = above if subject.written == subject.real else above + _ancestors(subject.written, flavour)
        for path in paths:
            found = self._trees.get(compose(path))
            if found is not None:
                return found
        if self._folded:
            for path in paths:
                found = self._folded.get(fold_path(path))
                if found is not None:
                    return found
        if self._ids:
            for path in above:
                identity = _identity(path)
                place = None if identity is None else self._ids.get(identity)
                # The number may belong to another file by now: look at both paths at the same time.
                if place is not None and _same_file(path, place.path):
                    return place.value  # type: ignore[no-any-return]
        if self._files and _has_other_names(subject.real):
            for place in self._files:
                if _same_file(subject.real, place.path):
                    return place.value  # type: ignore[no-any-return]
        return None


def _identity(path: str) -> Optional[Tuple[int, int]]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _has_other_names(path: str) -> bool:
    """Return True if ``path`` is a file with hard links."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink > 1


def _same_file(one: str, other: str) -> bool:
    first = _identity(one)
    return first is not None and first == _identity(other)


def _ignores_case(path: str, flavour: Any) -> bool:
    """Return True if a part of ``path`` can be spelt in another case. If no file shows it, guess by the system."""
    known = False
    for place in _ancestors(path, flavour):
        directory, name = flavour.split(place)
        twin = name.swapcase()
        if twin == name:
            continue
        if _identity(place) is not None:
            known = True
            if _same_file(place, flavour.join(directory, twin)):
                return True
        elif not known:
            answer = _directory_ignores_case(directory, flavour)
            if answer:
                return True
            known = answer is not None
    return not known and (flavour is ntpath or _USUALLY_IGNORES_CASE)


def _directory_ignores_case(directory: str, flavour: Any) -> Optional[bool]:
    """Return whether a directory ignores case, by a file in it, or None if no file shows it."""
    try:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            return None
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                twin = entry.name.swapcase()
                if twin != entry.name and _identity(entry.path) is not None:
                    return _same_file(entry.path, flavour.join(directory, twin))
                if number > 100:
                    return None
    except (OSError, ValueError):
        pass
    return None


# -- extensions -------------------------------------------------------------------------------------------------------


def extension_problem(text: str) -> str:
    """Return why ``text`` cannot be an entry for extensions, or an empty text if it can."""
    bare = text[1:] if text.startswith(".") else text
    if text == "*":
        return ""
    if not bare or any(character in bare for character in "/\\*\0") or bare.startswith(".") or bare.endswith("."):
        return "is not an extension, such as '.csv' or '.tar.gz'"
    return ""


class Extensions:
    """Match the extension of a file, with or without the dot before it. The case of ASCII letters does not count."""

    __slots__ = ("_any", "_known")

    def __init__(self, entries: Sequence[str]) -> None:
        self._any = "*" in entries
        self._known = frozenset(_lower(entry if entry.startswith(".") else f".{entry}") for entry in entries)

    def holds(self, path: str, flavour: Any = os.path) -> bool:
        """Return True if the last part of ``path`` has one of the extensions."""
        if self._any:
            return True
        name = _lower(flavour.basename(path))
        # ".profile" is a name without an extension.
        dot = name.find(".", 1)
        while dot > 0:
            if name[dot:] in self._known:
                return True
            dot = name.find(".", dot + 1)
        return False


_UPPER = {ord(character): ord(character) + 32 for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def _lower(text: str) -> str:
    # str.lower() would also turn the Kelvin sign into a "k".
    return text.lower() if text.isascii() else text.translate(_UPPER)
