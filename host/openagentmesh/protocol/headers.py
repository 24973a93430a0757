"""Header blocks: the lines between a message's subject and its body (protocol §6)."""

from collections.abc import Mapping
from typing import Final

from openagentmesh.protocol.errors import InvalidInput

VERSION_LINE: Final = "NATS/1.0"
# The key of an inline status such as `503` in decoded headers.
INLINE_STATUS: Final = "Status"
_MAX_DIGITS: Final = 12


def write_headers(headers: Mapping[str, str]) -> bytes:
    """Headers as the block that precedes a body; raises InvalidInput for line breaks and lone surrogates."""
    if not headers:
        return b""
    block = "\r\n".join([VERSION_LINE, *[f"{k}: {v}" for k, v in headers.items()], "", ""])
    # One comparison for the usual case: every line break must be one written here.
    if block.count("\n") != len(headers) + 2 or block.count("\r") != len(headers) + 2:
        raise InvalidInput("A header has a line break in its name or value. Remove it.")
    try:
        return block.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"A header cannot be encoded as UTF-8: {exc}.") from exc


def read_headers(head: bytes) -> dict[str, str]:
    """A header block as a dict; an inline status such as `503` has the key `Status`."""
    first, *lines = head.decode("utf-8", "replace").split("\r\n")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    if len(first) > len(VERSION_LINE):
        headers[INLINE_STATUS] = first[len(VERSION_LINE) :].strip()[:3]
    return headers


def parse_int(text: str | None) -> int | None:
    """A non-negative decimal number; None for anything else."""
    # str.isdigit accepts digits of other scripts, and int() of a long text is slow.
    if text and len(text) <= _MAX_DIGITS and text.isascii() and text.isdigit():
        return int(text)
    return None
