"""Make the known-answer vectors of policies: ``python tests/vectors/make.py`` writes the JSON files beside this one.

Nothing of the library and none of its dependencies is used. BLAKE3 and Ed25519 are written here from their
specifications (the BLAKE3 paper, sections 2.1 to 2.6; RFC 8032, section 5.1), as plainly as they can be and far too
slow for use; canonical forms are written by hand. README.md says how these two are themselves checked.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from typing import Any, Dict, List, Optional, Sequence, Tuple

HERE = pathlib.Path(__file__).resolve().parent

# -- BLAKE3 -----------------------------------------------------------------------------------------------------------

IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
BLOCK, CHUNK = 64, 1024


def _rotate(word: int, by: int) -> int:
    return ((word >> by) | (word << (32 - by))) & 0xFFFFFFFF


def _mix(state: List[int], a: int, b: int, c: int, d: int, x: int, y: int) -> None:
    state[a] = (state[a] + state[b] + x) & 0xFFFFFFFF
    state[d] = _rotate(state[d] ^ state[a], 16)
    state[c] = (state[c] + state[d]) & 0xFFFFFFFF
    state[b] = _rotate(state[b] ^ state[c], 12)
    state[a] = (state[a] + state[b] + y) & 0xFFFFFFFF
    state[d] = _rotate(state[d] ^ state[a], 8)
    state[c] = (state[c] + state[d]) & 0xFFFFFFFF
    state[b] = _rotate(state[b] ^ state[c], 7)


def _compress(chaining: Sequence[int], block: Sequence[int], counter: int, length: int, flags: int) -> List[int]:
    """The first eight words of the compression function, which is all that 32 bytes of output need."""
    state = [*chaining, *IV[:4], counter & 0xFFFFFFFF, counter >> 32, length, flags]
    words = list(block)
    for number in range(7):
        _mix(state, 0, 4, 8, 12, words[0], words[1])
        _mix(state, 1, 5, 9, 13, words[2], words[3])
        _mix(state, 2, 6, 10, 14, words[4], words[5])
        _mix(state, 3, 7, 11, 15, words[6], words[7])
        _mix(state, 0, 5, 10, 15, words[8], words[9])
        _mix(state, 1, 6, 11, 12, words[10], words[11])
        _mix(state, 2, 7, 8, 13, words[12], words[13])
        _mix(state, 3, 4, 9, 14, words[14], words[15])
        if number < 6:
            words = [words[index] for index in PERMUTATION]
    return [state[index] ^ state[index + 8] for index in range(8)]


def _chunk(data: bytes, counter: int, root: int) -> List[int]:
    chaining = list(IV)
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)] or [b""]
    for index, block in enumerate(blocks):
        flags = (CHUNK_START if index == 0 else 0) | (CHUNK_END | root if index == len(blocks) - 1 else 0)
        words = struct.unpack("<16I", block.ljust(BLOCK, b"\0"))
        chaining = _compress(chaining, words, counter, len(block), flags)
    return chaining


def _tree(data: bytes, counter: int, root: int) -> List[int]:
    if len(data) <= CHUNK:
        return _chunk(data, counter, root)
    # The left side is the largest power of two of whole chunks that leaves something for the right.
    left = CHUNK
    while left * 2 < len(data):
        left *= 2
    first = _tree(data[:left], counter, 0)
    second = _tree(data[left:], counter + left // CHUNK, 0)
    return _compress(IV, first + second, 0, BLOCK, PARENT | root)


def blake3(data: bytes) -> str:
    """The hash of ``data``: 32 bytes as hex."""
    return struct.pack("<8I", *_tree(data, 0, ROOT)).hex()


# -- Ed25519 ----------------------------------------------------------------------------------------------------------

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P

Point = Tuple[int, int]


def _add(one: Point, other: Point) -> Point:
    """The addition law of the twisted Edwards curve, in affine coordinates."""
    (x1, y1), (x2, y2) = one, other
    product = D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, P) % P
    y = (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P
    return x, y


def multiply(scalar: int, point: Point) -> Point:
    total: Point = (0, 1)
    while scalar:
        if scalar & 1:
            total = _add(total, point)
        point = _add(point, point)
        scalar >>= 1
    return total


def find_x(y: int, sign: int) -> Optional[int]:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return P - x if x % 2 != sign and x else x


_Y = 4 * pow(5, -1, P) % P
BASE: Point = (find_x(_Y, 0) or 0, _Y)


def _encode(point: Point) -> bytes:
    x, y = point
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _secrets(seed: bytes) -> Tuple[int, bytes]:
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little")
    return scalar & ~7 & ~(1 << 255) | 1 << 254, digest[32:]


def public_key(seed: bytes) -> bytes:
    return _encode(multiply(_secrets(seed)[0], BASE))


def sign(seed: bytes, message: bytes) -> bytes:
    scalar, prefix = _secrets(seed)
    key = public_key(seed)
    nonce = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % L
    point = _encode(multiply(nonce, BASE))
    challenge = int.from_bytes(hashlib.sha512(point + key + message).digest(), "little") % L
    return point + ((nonce + challenge * scalar) % L).to_bytes(32, "little")


# -- the vectors ------------------------------------------------------------------------------------------------------

#: A policy's content as it might be sent, and its canonical form, both written by hand.
CONTENTS = [
    ("empty", "{}", "{}"),
    (
        "keys are sorted, spaces dropped, numbers shortened",
        '{ "rate_limits" : { "requests" : { "max_per_minute" : 60.0 , "max_per_hour" : 1E3 } },\n'
        '  "permissions" : { "tools" : { "blocked_tools" : [ "shell" ] , "allowed_tools" : null } } }',
        '{"permissions":{"tools":{"allowed_tools":null,"blocked_tools":["shell"]}},'
        '"rate_limits":{"requests":{"max_per_hour":1000,"max_per_minute":60}}}',
    ),
    (
        "text beyond ASCII is kept as it is, escapes are resolved",
        '{"permissions": {"network": {"allowed_domains": ["b\\u00fccher.example", "*.example.com"], "enabled": true}},'
        ' "note": "\\u20ac \\ud83d\\ude00 \\/ \\u0007 \\" \\\\ \\u007f"}',
        '{"note":"\u20ac \U0001f600 / \\u0007 \\" \\\\ \x7f","permissions":{"network":'
        '{"allowed_domains":["b\u00fccher.example","*.example.com"],"enabled":true}}}',
    ),
    (
        "keys are sorted by UTF-16 units, not by code points",
        '{"\\ufb33": 1, "\\ud83d\\ude00": 2, "b": 3, "B": 4, "\\u00f6": 5, "compliance": {}}',
        '{"B":4,"b":3,"compliance":{},"\u00f6":5,"\U0001f600":2,"\ufb33":1}',
    ),
    (
        "longer than one chunk of the hash",
        json.dumps({"permissions": {"tools": {"allowed_tools": [f"tool_{number:04d}" for number in range(400)]}}}),
        '{"permissions":{"tools":{"allowed_tools":['
        + ",".join(f'"tool_{number:04d}"' for number in range(400))
        + "]}}}",
    ),
]


def policies() -> List[Dict[str, Any]]:
    made = []
    for number, (name, content, canonical) in enumerate(CONTENTS, 1):
        seed = bytes(range(number, number + 32))
        digest = blake3(canonical.encode())
        policy_id, workspace_id, version = f"pol_{number}", f"ws_{number}", 10 * number
        # Four keys in this order, no spaces: the canonical form, as none of the values needs an escape.
        message = f'{{"hash":"{digest}","policy_id":"{policy_id}","version":{version},"workspace_id":"{workspace_id}"}}'
        made.append(
            {
                "name": name,
                "content": content,
                "canonical": canonical,
                "hash": digest,
                "policy_id": policy_id,
                "workspace_id": workspace_id,
                "version": version,
                "message": message,
                "public_key": public_key(seed).hex(),
                "signature": sign(seed, message.encode()).hex(),
                "signature_of_hash": sign(seed, digest.encode()).hex(),
            }
        )
    return made


def small_order_keys() -> List[str]:
    """Encodings of every point whose order divides 8, reduced or not."""
    found = set()
    y = 2
    while len(found) < 8:
        x = find_x(y, 0)
        if x is not None:
            # What is left of a point times L has an order of at most 8; all multiples of it have too.
            point = multiply(L, (x, y))
            found |= {multiply(factor, point) for factor in range(8)}
        y += 1
    encodings = set()
    for _, y in found:
        for value in (y, y + P):
            if value < 2**255:
                for sign_bit in (0, 1):
                    encodings.add((value | sign_bit << 255).to_bytes(32, "little").hex())
    return sorted(encodings)


def write(name: str, about: List[str], cases: Any) -> None:
    text = json.dumps({"about": about, "cases": cases}, indent=1, ensure_ascii=True)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    write(
        "policies.json",
        [
            "Contents of policies with their canonical form (RFC 8785), hash (BLAKE3) and signatures (Ed25519).",
            '"content" is JSON as it might be sent; "message" is what "signature" covers;',
            '"signature_of_hash" covers the hash alone.',
            "Made by make.py, which uses neither the library nor its dependencies.",
        ],
        policies(),
    )
    write(
        "weak-keys.json",
        ["Every encoding of a point of small order: whoever pins one as a public key trusts signatures of anyone."],
        small_order_keys(),
    )


if __name__ == "__main__":
    main()
