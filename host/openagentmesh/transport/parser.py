"""The wire's parser: messages are cut out of what was read in one go; the rest is nats-py's."""

from collections.abc import Callable
from typing import Final, Protocol

from nats.protocol.parser import AWAITING_CONTROL_LINE
from nats.protocol.parser import Parser as LibraryParser

_CRLF: Final = b"\r\n"
# The words of a message's line: its kind, subject, sid, maybe a reply subject, and its sizes.
_MSG: Final = {4: False, 5: True}
_HMSG: Final = {5: False, 6: True}

TakeMessage = Callable[[int, bytes, bytes, bytes, bytes], bool]


class _Client(Protocol):
    """What takes the messages."""

    def take(self, sid: int, subject: bytes, reply: bytes, body: bytes, head: bytes) -> bool: ...
    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None: ...


class Parser(LibraryParser):
    """Parses what the server sends, messages in a third of the library's time.

    The library matches several patterns a message and moves its buffer twice.
    """

    def __init__(self, client: _Client) -> None:
        self._client = client
        super().__init__(client)

    def reset(self) -> None:
        """Begin anew, as on a new connection."""
        super().reset()
        self._enough = 0

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read, and pass on every message that is complete.

        Raises:
            ProtocolError: no server sends this.

        """
        if self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            return
        if self.buf:
            self.buf.extend(data)
            if len(self.buf) < self._enough:
                return
            data = bytes(self.buf)
        done = await self._messages(data)
        self.buf = bytearray(data[done:])
        if self.buf and not self._enough:
            await super().parse()

    async def _messages(self, data: bytes) -> int:
        """Pass on the messages that `data` begins with; returns where they end.

        `_enough` is then how many bytes the next one takes from there on; 0 when the next is
        no message, or its first line is not complete.
        """
        at, length, take = 0, len(data), self._client.take
        self._enough = 0
        while at < length:
            with_headers = data.startswith(b"HMSG ", at)
            if not with_headers and not data.startswith(b"MSG ", at):
                break
            line_end = data.find(_CRLF, at)
            if line_end < 0:
                break
            words = data[at:line_end].split()
            has_reply = (_HMSG if with_headers else _MSG).get(len(words))
            try:
                sid, size = int(words[2]), int(words[-1])
                body_at = line_end + 2 + (int(words[-2]) if with_headers else 0)
            except (ValueError, IndexError):
                break  # the library says what is wrong with it
            if has_reply is None:
                break
            body_end = line_end + 2 + size
            if body_end + 2 > length:
                self._enough = body_end + 2 - at
                break
            subject, reply = words[1], words[3] if has_reply else b""
            head, body = data[line_end + 2 : body_at], data[body_at:body_end]
            at = body_end + 2
            if not take(sid, subject, reply, body, head):
                await self._client._process_msg(sid, subject, reply, body, head)  # noqa: SLF001 - the library's own way in
        return at
