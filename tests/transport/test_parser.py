"""The protocol parser: all data of a server is parsed, wherever the reads are split."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from openagentmesh.transport.parser import Parser

# A message as sid, subject, reply, body and header block; any other operation as its name.
Operation = tuple[int, bytes, bytes, bytes, bytes] | str

WORDS = st.from_regex(rb"[!-~]{1,20}", fullmatch=True)
BODIES = st.binary(max_size=200) | st.sampled_from([b"\r\n", b"MSG a 1 3\r\n", b"PING\r\n"])
BLANKS = st.sampled_from([b" ", b"  ", b"\t"])
OTHERS = {"ping": b"PING\r\n", "pong": b"PONG\r\n", "ok": b"+OK\r\n", "err": b"-ERR 'Slow Consumer'\r\n"}


@dataclass
class RecordingClient:
    """Records each operation; only messages with an even sid have a callback."""

    operations: list[Operation] = field(default_factory=list)

    def dispatch(self, sid: int, subject: bytes, reply: bytes, body: bytes, head: bytes) -> bool:
        if sid % 2 == 0:
            self.operations.append((sid, subject, reply, body, head))
        return sid % 2 == 0

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.operations.append((sid, subject, reply, data, headers or b""))

    async def _process_ping(self) -> None:
        self.operations.append("ping")

    async def _process_pong(self) -> None:
        self.operations.append("pong")

    async def _process_err(self, _message: str) -> None:
        self.operations.append("err")


@st.composite
def sent_operations(draw: st.DrawFn) -> tuple[bytes, Operation]:
    """An operation as a server sends it, and as the client receives it."""
    if name := draw(st.sampled_from(["", "", "", *OTHERS])):
        return OTHERS[name], name
    sid, subject, body, blank = draw(st.integers(1, 5)), draw(WORDS), draw(BODIES), draw(BLANKS)
    # A server's header blocks begin with the version; the library parses others as sizes.
    reply, head = draw(WORDS | st.just(b"")), draw(st.just(b"") | BODIES.map(b"NATS/1.0".__add__))
    words = [subject, str(sid).encode(), *([reply] if reply else [])]
    if head:
        words = [b"HMSG", *words, str(len(head)).encode(), str(len(head) + len(body)).encode()]
    else:
        words = [b"MSG", *words, str(len(body)).encode()]
    return blank.join(words) + b"\r\n" + head + body + b"\r\n", (sid, subject, reply, body, head)


def split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data, split at these positions."""
    positions = sorted({0, len(data), *[cut % (len(data) + 1) for cut in cuts]})
    return (data[start:end] for start, end in pairwise(positions))


@given(st.lists(sent_operations(), max_size=12), st.lists(st.integers(0, 5000), max_size=12))
def test_each_operation_is_received_once_and_in_order(
    sent: list[tuple[bytes, Operation]], cuts: list[int]
) -> None:
    """Messages with any content, between other operations, are received wherever the reads are split."""
    client = RecordingClient()
    parser = Parser(client)

    async def read() -> None:
        for piece in split(b"".join(data for data, _ in sent), cuts):
            await parser.parse(piece)

    asyncio.run(read())
    assert [operation for _, operation in sent if operation != "ok"] == client.operations
    assert not parser.buf


@pytest.mark.parametrize(
    "line",
    [
        b"MSG a 1 x\r\n",
        b"MSG a x 1\r\n",
        b"MSG a\r\n",
        b"HMSG a 1 2\r\n",
        b"HMSG a 1 x 2\r\n",
        b"MSG a 1 b c 3\r\n",
        b"WHAT\r\n",
    ],
)
async def test_a_malformed_line_raises_protocol_error(line: bytes) -> None:
    """A line that is not of the NATS protocol raises ProtocolError, also after a valid message."""
    with pytest.raises(ProtocolError):
        await Parser(RecordingClient()).parse(b"MSG a 2 1\r\nx\r\n" + line)


async def test_a_reset_discards_an_incomplete_message() -> None:
    """The data of a new connection is not appended to an incomplete message of the old one."""
    client = RecordingClient()
    parser = Parser(client)
    await parser.parse(b"MSG a 2 100\r\nhalf of")
    parser.reset()
    await parser.parse(b"MSG b 2 1\r\nx\r\n")
    assert [(2, b"b", b"", b"x", b"")] == client.operations
