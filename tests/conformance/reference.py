"""The WHATWG standard's own algorithm for event streams, to compare the parser with."""

from __future__ import annotations

from typing import List, Optional, Tuple

from sekuire.transport.sse import MAX_RETRY_MS

BOM = b"\xef\xbb\xbf"

#: Events as (type, data, id), the retry and the last event id.
Facts = Tuple[List[Tuple[str, str, str]], Optional[int], str]


def reference(stream: bytes, last_event_id: str = "") -> Facts:
    """The standard's section 9.2.6, word for word and slow; the reconnection time is bounded as ours is."""
    text = (stream[3:] if stream.startswith(BOM) else stream).decode("utf-8", "replace")
    lines: List[str] = []
    line = ""
    at = 0
    while at < len(text):
        if text[at] in "\r\n":
            at += 2 if text[at : at + 2] == "\r\n" else 1
            lines.append(line)
            line = ""
        else:
            line += text[at]
            at += 1
    events = []
    retry = None
    data_buffer = type_buffer = ""
    id_buffer = last_event_id
    for line in lines:
        if line == "":
            last_event_id = id_buffer
            if data_buffer == "":
                type_buffer = ""
                continue
            if data_buffer[-1] == "\n":
                data_buffer = data_buffer[:-1]
            events.append((type_buffer if type_buffer != "" else "message", data_buffer, last_event_id))
            data_buffer = type_buffer = ""
        elif line[0] == ":":
            continue
        else:
            if ":" in line:
                field = line[: line.index(":")]
                value = line[line.index(":") + 1 :]
                if value[:1] == " ":
                    value = value[1:]
            else:
                field, value = line, ""
            if field == "event":
                type_buffer = value
            elif field == "data":
                data_buffer += value + "\n"
            elif field == "id":
                if "\0" not in value:
                    id_buffer = value
            elif field == "retry" and value and all(digit in "0123456789" for digit in value):
                retry = min(int(value), MAX_RETRY_MS)
    return events, retry, last_event_id


def without_large_events(stream: bytes, limit: int) -> Tuple[bytes, int]:
    """``stream`` as a parser with ``limit`` should take it, in LF form, and how many events it should skip."""
    # bytes.splitlines() knows CR, LF and CRLF only, and none of their bytes is part of a multibyte character.
    lines = (stream[3:] if stream.startswith(BOM) else stream).splitlines(True)
    kept: List[bytes] = []
    block: List[bytes] = []
    size = skipped = 0
    for line in [*lines, None]:
        content = b"" if line is None else line.rstrip(b"\r\n")
        if content:
            block.append(line)
            size += 0 if content.startswith(b":") else len(content) + (line != content)
            continue
        if size > limit:
            skipped += 1
            fields = [part for part in block if part.startswith((b"id", b"retry"))]
            block = [part for part in fields if len(part.rstrip(b"\r\n")) <= limit]
        kept += block
        kept += [b"\n"] if line else []
        block = []
        size = 0
    # A BOM of its own, for the first line may begin with a second one, which is content.
    return BOM + b"".join(part.replace(b"\r\n", b"\n").replace(b"\r", b"\n") for part in kept), skipped
