"""Read a job's lines, each the input of a task, from a file in JSON Lines or CSV."""

# Threads: one thread at a time reads a source.

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import stat
import sys
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Optional, Set

from ..wire import protocol
from .exits import CommandError

__all__ = ["Line", "Source"]

#: Bytes of one line, or of one row of a CSV file.
_LONGEST = 32 * 1024 * 1024
_OTHER_TEXT = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class Line(NamedTuple):
    """Hold one line of a job: its number from 1, its bytes without the line's end, and the task's input."""

    number: int
    raw: bytes
    input: Any


class Source:
    """Read lines from a file, or from stdin. A regular file can be read again.

    :param path: None for stdin.
    :param delimiter: what separates the columns of a CSV file. None: it is JSON Lines.
    :param key_field: a field that every input must have, each with another value.
    """

    def __init__(self, path: Optional[str], delimiter: Optional[str], key_field: Optional[str]) -> None:
        self.name = "stdin" if path is None else path
        self._path = path
        self._delimiter = delimiter
        self._key_field = key_field
        self._file: Optional[BinaryIO] = None

    def __enter__(self) -> Source:
        problem = ""
        try:
            # Unbuffered input of a pipe would be read byte by byte.
            self._file = open(self._path, "rb") if self._path is not None else sys.stdin.buffer
        except (OSError, ValueError, AttributeError) as error:
            problem = getattr(error, "strerror", None) or str(error)
        if problem:
            raise CommandError(f"cannot read {self.name!r}: {problem}")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._path is not None and self._file is not None:
            self._file.close()

    @property
    def has_key_field(self) -> bool:
        """Return True if a field, and not the whole line, tells a line from others."""
        return self._key_field is not None

    def can_read_again(self) -> bool:
        """Return True if it is a regular file."""
        if self._path is None or self._file is None:
            return False
        try:
            return stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except OSError:
            return False

    def lines(self) -> Iterator[Line]:
        """Yield the lines, from the beginning if it can be read again. Empty ones are skipped, but counted.

        :raises CommandError: a line is wrong. The error has its number.
        """
        file = self._file
        if file is None:
            return
        if self.can_read_again():
            file.seek(0)
        found = self._jsonl(file) if self._delimiter is None else self._csv(file, self._delimiter)
        # The keys' hashes: 8 bytes of each are enough to know it again.
        seen: Set[bytes] = set()
        try:
            for line in found:
                if self._key_field is not None:
                    key = hashlib.sha256(self.key_of(line)).digest()[:8]
                    if key in seen:
                        raise self.wrong(line.number, f"{self._key_field!r} has the same value as in a line before")
                    seen.add(key)
                yield line
        except OSError as error:
            problem = error.strerror or type(error).__name__
        else:
            return
        raise CommandError(f"cannot read {self.name!r}: {problem}")

    def key_of(self, line: Line) -> bytes:
        """Return the value of the line's key field, as text.

        :raises CommandError: it has none.
        """
        name = self._key_field
        if not isinstance(line.input, dict) or name not in line.input:
            raise self.wrong(line.number, f"it has no field {name!r} (--key-field)")
        value = line.input[name]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise self.wrong(line.number, f"{name!r} (--key-field) must be a text or a whole number, got {value!r:.60}")
        return str(value).encode("utf-8", "surrogatepass")

    def wrong(self, number: int, problem: str) -> CommandError:
        """Return the error of a line."""
        return CommandError(f"{self.name}, line {number}: {problem}")

    # -- reading text --

    def _text_lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield each line as bytes with its end, the first without a byte order mark."""
        number = 0
        while True:
            line = file.readline(_LONGEST + 1)
            number += 1
            if not line:
                return
            if len(line) > _LONGEST:
                raise self.wrong(number, f"it is longer than {_LONGEST // 1024 // 1024} MiB")
            if number == 1:
                for mark, name in _OTHER_TEXT.items():
                    if line.startswith(mark):
                        raise self.wrong(1, f"the file is {name} text; save it as UTF-8")
                if line.startswith(codecs.BOM_UTF8):
                    line = line[len(codecs.BOM_UTF8) :]
            yield line

    def decoded(self, number: int, line: bytes) -> str:
        """Return a line as text."""
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            place = error.start + 1
        raise self.wrong(number, f"byte {place} is not UTF-8 text; save the file as UTF-8")

    # -- JSON Lines --

    def _jsonl(self, file: BinaryIO) -> Iterator[Line]:
        for number, line in enumerate(self._text_lines(file), 1):
            raw = line.rstrip(b"\r\n")
            if raw.strip():
                yield Line(number, raw, self._parsed(number, self.decoded(number, raw)))

    def _parsed(self, number: int, text: str) -> Any:
        try:
            return json.loads(text, parse_constant=protocol.refuse_constant)
        except json.JSONDecodeError as error:
            problem = f"column {error.colno}: {error.msg}"
            if number == 1 and text.strip() in ("[", "{"):
                problem += "; JSON Lines have a whole value on each line (jq -c '.[]' makes them of a list)"
            elif number == 1 and self.name.endswith((".csv", ".tsv")):
                problem += "; of a CSV file give --csv"
        except RecursionError:
            problem = "it is nested too deep"
        except ValueError as error:
            problem = str(error)
        raise self.wrong(number, problem)

    # -- CSV --

    def _csv(self, file: BinaryIO, delimiter: str) -> Iterator[Line]:
        feed = _Feed(self, self._text_lines(file))
        csv.field_size_limit(_LONGEST)
        rows = csv.reader(feed, delimiter=delimiter, strict=True)
        header: Optional[List[str]] = None
        while True:
            begun = feed.number + 1
            raw = feed.empty()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                problem = str(error)
            else:
                raw = feed.empty()
                if not row:
                    continue
                if header is None:
                    header = self._header(begun, row, delimiter)
                elif len(row) != len(header):
                    raise self.wrong(begun, f"it has {_cells(len(row))}, and the header has {len(header)}")
                else:
                    yield Line(begun, raw.rstrip(b"\r\n"), dict(zip(header, row)))
                continue
            if "new-line" in problem:
                problem = "a line ends in CR alone; save the file with LF or CRLF at the ends of lines"
            if "end of data" in problem:
                problem = 'a cell that begins with " has no end'
            raise self.wrong(begun, problem)

    def _header(self, number: int, row: List[str], delimiter: str) -> List[str]:
        names = [name.strip() for name in row]
        if len(names) == 1:
            for other, option in ((";", "';'"), ("\t", "tab"), (",", "','")):
                if other in names[0] and other != delimiter:
                    problem = f"the header is one column; for columns by {option}, give --delimiter {option}"
                    raise self.wrong(number, problem)
        if names[0].startswith(("{", "[")):
            raise self.wrong(number, "the header looks like JSON; of JSON Lines give --jsonl")
        if "" in names:
            raise self.wrong(number, f"column {names.index('') + 1} of the header has no name")
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise self.wrong(number, f"the header has two columns {double!r}")
        if self._key_field is not None and self._key_field not in names:
            known = ", ".join(map(repr, names[:10]))
            raise self.wrong(number, f"the header has no column {self._key_field!r} (--key-field), but {known}")
        return names


class _Feed:
    """Give a CSV reader its lines, and remember those that it has read since the last row."""

    def __init__(self, source: Source, lines: Iterator[bytes]) -> None:
        self._source = source
        self._lines = lines
        self._kept: List[bytes] = []
        self._size = 0
        #: The number of the last line that was read.
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self._kept.append(line)
        self._size += len(line)
        if self._size > _LONGEST:
            begun = self.number + 1 - len(self._kept)
            raise self._source.wrong(begun, 'the row is longer than 32 MiB; is a " missing?')
        return self._source.decoded(self.number, line)

    def empty(self) -> bytes:
        """Return the lines of the last row."""
        kept, self._kept, self._size = b"".join(self._kept), [], 0
        return kept


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"
