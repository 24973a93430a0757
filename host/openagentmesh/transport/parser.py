"""The protocol parser: messages are cut out of the data in one pass; nats-py parses the rest."""

from typing import Final, Protocol

from nats.protocol.parser import AWAITING_CONTROL_LINE
from nats.protocol.parser import Parser as LibraryParser

_CRLF: Final = b"\r\n"
# Whether the line of a message has a reply subject, by its number of words.
_MSG_HAS_REPLY: Final = {4: False, 5: True}
_HMSG_HAS_REPLY: Final = {5: False, 6: True}


class _Client(Protocol):
    """What receives the messages."""

    def dispatch(self, sid: int, subject: bytes, reply: bytes, body: bytes, head: bytes) -> bool: ...
    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None: ...


class Parser(LibraryParser):
    """Parses messages in a third of the time of the library, which matches several patterns for each."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        super().__init__(client)

    def reset(self) -> None:
        """Reset for a new connection."""
        super().reset()
        self._bytes_needed = 0

    async def parse(self, data: bytes = b"") -> None:
        """Dispatch every complete message; ProtocolError when the data is not of the NATS protocol."""
        if self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            return
        if self.buf:
            self.buf.extend(data)
            if len(self.buf) < self._bytes_needed:
                return
            data = bytes(self.buf)
        end = await self._messages(data)
        self.buf = bytearray(data[end:])
        if self.buf and not self._bytes_needed:
            await super().parse()

    async def _messages(self, data: bytes) -> int:
        """Dispatch the messages at the start of `data`; returns where they end.

        `_bytes_needed` is then the length of the next message; 0 when the next line is not a
        message, or is incomplete.
        """
        at, length, dispatch = 0, len(data), self._client.dispatch
        self._bytes_needed = 0
        while at < length:
            with_headers = data.startswith(b"HMSG ", at)
            if not with_headers and not data.startswith(b"MSG ", at):
                break
            line_end = data.find(_CRLF, at)
            if line_end < 0:
                break
            words = data[at:line_end].split()
            has_reply = (_HMSG_HAS_REPLY if with_headers else _MSG_HAS_REPLY).get(len(words))
            try:
                sid, size = int(words[2]), int(words[-1])
                body_at = line_end + 2 + (int(words[-2]) if with_headers else 0)
            except (ValueError, IndexError):
                break  # the library reports the error
            if has_reply is None:
                break
            body_end = line_end + 2 + size
            if body_end + 2 > length:
                self._bytes_needed = body_end + 2 - at
                break
            subject, reply = words[1], words[3] if has_reply else b""
            head, body = data[line_end + 2 : body_at], data[body_at:body_end]
            at = body_end + 2
            if not dispatch(sid, subject, reply, body, head):
                await self._client._process_msg(sid, subject, reply, body, head)  # noqa: SLF001 - the library's entry
        return at
