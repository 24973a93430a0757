"""What the server sends, however it is cut into pieces."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError
from openagentmesh.transport.parser import Parser

# Sid, subject, reply, body and header block; of others their name alone.
Told = tuple[int, bytes, bytes, bytes, bytes] | str

words = st.from_regex(rb"[!-~]{1,20}", fullmatch=True)
bodies = st.binary(max_size=200) | st.sampled_from([b"\r\n", b"MSG a 1 3\r\n", b"PING\r\n"])
blanks = st.sampled_from([b" ", b"  ", b"\t"])
OTHERS = {"ping": b"PING\r\n", "pong": b"PONG\r\n", "ok": b"+OK\r\n", "err": b"-ERR 'Slow Consumer'\r\n"}


@dataclass
class Client:
    """Notes what it is given; only messages of even sids have a receiver."""

    told: list[Told] = field(default_factory=list)

    def dispatch(self, sid: int, subject: bytes, reply: bytes, body: bytes, head: bytes) -> bool:
        if sid % 2 == 0:
            self.told.append((sid, subject, reply, body, head))
        return sid % 2 == 0

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self.told.append((sid, subject, reply, data, headers or b""))

    async def _process_ping(self) -> None:
        self.told.append("ping")

    async def _process_pong(self) -> None:
        self.told.append("pong")

    async def _process_err(self, _message: str) -> None:
        self.told.append("err")


@st.composite
def lines(draw: st.DrawFn) -> tuple[bytes, Told]:
    """One thing that a server says, and what the client is to be told."""
    if name := draw(st.sampled_from(["", "", "", *OTHERS])):
        return OTHERS[name], name
    sid, subject, body, blank = draw(st.integers(1, 5)), draw(words), draw(bodies), draw(blanks)
    # Headers begin like this in all that a server sends; the library takes other ones for sizes.
    reply, head = draw(words | st.just(b"")), draw(st.just(b"") | bodies.map(b"NATS/1.0".__add__))
    parts = [subject, str(sid).encode(), *([reply] if reply else [])]
    if head:
        parts = [b"HMSG", *parts, str(len(head)).encode(), str(len(head) + len(body)).encode()]
    else:
        parts = [b"MSG", *parts, str(len(body)).encode()]
    return blank.join(parts) + b"\r\n" + head + body + b"\r\n", (sid, subject, reply, body, head)


def pieces(text: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(text), *[cut % (len(text) + 1) for cut in cuts]})
    return (text[a:b] for a, b in pairwise(places))


@given(st.lists(lines(), max_size=12), st.lists(st.integers(0, 5000), max_size=12))
def test_all_is_told_once_and_in_order(said: list[tuple[bytes, Told]], cuts: list[int]) -> None:
    """Messages of any content, mixed with all else, wherever the reads were cut."""
    client = Client()
    parser = Parser(client)

    async def read() -> None:
        for piece in pieces(b"".join(text for text, _ in said), cuts):
            await parser.parse(piece)

    asyncio.run(read())
    assert [told for _, told in said if told != "ok"] == client.told
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
async def test_what_no_server_sends_is_refused(line: bytes) -> None:
    """The read loop ends the connection for it, and comes back on a new one."""
    with pytest.raises(ProtocolError):
        await Parser(Client()).parse(b"MSG a 2 1\r\nx\r\n" + line)


async def test_a_new_connection_begins_anew() -> None:
    """Half a message of the old connection is forgotten."""
    client = Client()
    parser = Parser(client)
    await parser.parse(b"MSG a 2 100\r\nhalf of")
    parser.reset()
    await parser.parse(b"MSG b 2 1\r\nx\r\n")
    assert [(2, b"b", b"", b"x", b"")] == client.told
