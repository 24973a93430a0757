"""The nats-py client with its measured defects corrected, and messages dispatched without a queue.

Every override here depends on private parts of one nats-py series (see the bound in pyproject.toml)
and has a test of its own against the real server.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from openagentmesh.transport.parser import Parser
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

_READ_SIZE: Final = 64 * 1024
_PING: Final = b"PING\r\n"
# "NATS/1.0" and the line breaks around a header block.
_HEADER_OVERHEAD: Final = 12


@dataclass(slots=True)  # one per message: frozen would cost a microsecond
class Message:
    """One message as received: `head` is the raw header block, empty without headers."""

    subject: str
    reply: str
    head: bytes
    body: bytes


MessageCallback = Callable[[Message], None]


class NatsClient(Client):
    """A `Client` that survives errors, flushes in order and dispatches messages at once."""

    def __init__(self) -> None:
        super().__init__()
        # Called when the server is lost, before anything more can be sent.
        self.on_disconnected: Callable[[], None] = lambda: None
        self._callbacks: dict[int, MessageCallback] = {}
        self._ps = Parser(self)

    async def subscribe_callback(self, subject: str, callback: MessageCallback, queue: str = "") -> int:
        """Subscribe; the read loop calls `callback`, which must return at once. Returns the id."""
        self._sid += 1
        sid = self._sid
        # Kept among the library's subscriptions so that a reconnect replays it, but never started:
        # its own task and queue would cost a hop per message and 3 KiB per agent.
        self._subs[sid] = Subscription(self, sid, subject, queue=queue)
        self._callbacks[sid] = callback
        await self.write(f"SUB {subject} {queue} {sid}\r\n".encode())
        return sid

    async def send_unsubscribe(self, sid: int) -> None:
        """Send UNSUB; messages that are on their way are still dispatched."""
        if self._subs.pop(sid, None) is not None and not self.is_closed:
            await self.write(f"UNSUB {sid}\r\n".encode())

    def remove_callback(self, sid: int) -> None:
        """Ignore further messages of a subscription."""
        self._callbacks.pop(sid, None)

    async def write(self, command: bytes) -> None:
        """Queue a protocol line; waits only while more than `pending_size` bytes are queued."""
        # The base class uses two coroutines, which would slow down every chunk of a stream.
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._pending_data_size > self._max_pending_size > 0:
            task = asyncio.current_task()
            cancelled = task.cancelling() if task is not None else 0
            await self._flush_pending(force_flush=True)
            if task is not None and task.cancelling() > cancelled:
                raise asyncio.CancelledError  # the base class swallows it
        elif self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    @property
    def buffer_space(self) -> int:
        """How many bytes more may be queued while the server is unreachable."""
        return self._max_pending_size - self._pending_data_size

    async def close(self) -> None:
        """Close for good; messages queued for an unreachable server are dropped."""
        if self._flush_queue is None:
            return  # never connected
        if not self.is_connected:
            # The base class would write into a dead socket, and not end its tasks.
            self._pending.clear()
            self._pending_data_size = 0
        reconnecting = self._reconnection_task
        if reconnecting is not asyncio.current_task():
            await cancel_and_wait(reconnecting)  # the base class cancels it once, which it can swallow
        await super().close()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if not self.dispatch(sid, subject, reply, data, headers or b""):
            await super()._process_msg(sid, subject, reply, data, headers)

    def dispatch(self, sid: int, subject: bytes, reply: bytes, body: bytes, head: bytes) -> bool:
        """Pass a message to its callback; False when it belongs to a subscription of the library."""
        callback = self._callbacks.get(sid)
        if callback is None:
            return False
        # Subjects are any bytes to the server.
        name = subject.decode("utf-8", "surrogateescape")
        try:
            callback(Message(name, reply.decode("utf-8", "surrogateescape"), head, body))
        except Exception:  # the message ends here; the read loop must go on
            log.exception("message on %a could not be processed", name)
        return True

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int, headers: dict[str, Any] | None
    ) -> None:
        # The base class checks the body alone; the server counts the headers too, and
        # closes the connection.
        if headers:
            size = sum(len(k) + len(v.encode()) + 4 for k, v in headers.items()) + _HEADER_OVERHEAD
            if size + payload_size > self.max_payload:
                raise MaxPayloadError
        await super()._send_publish(subject, reply, payload, payload_size, headers)

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # The base class writes PING past what is queued, so its PONG proves nothing.
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(_PING)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        # The base class sets the result of a cancelled flush; the error ends its read loop.
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pongs_received += 1
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def _process_err(self, err_msg: str) -> None:
        # The base class closes for good on most errors. After a permission error the server keeps
        # the connection; after any other one a reconnect helps.
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
            return
        error = NatsError(f"nats: {err_msg.strip(chr(39))}")
        self._err = error
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _process_op_err(self, e: Exception) -> None:
        # The base class notifies once the old socket is closed; messages are queued from now on.
        if self.is_connected and self.options["allow_reconnect"]:
            self.on_disconnected()
        await super()._process_op_err(e)

    async def _process_connect_init(self) -> None:
        # Something other than a nats-server may answer at the address while that is down; the base
        # class would stop reconnecting for good.
        # asyncio allocates 256 KiB for each read, which the system maps and unmaps each time; other event
        # loops have no such attribute.
        with suppress(AttributeError):
            self._transport._io_writer.transport.max_size = _READ_SIZE  # type: ignore[union-attr]  # noqa: SLF001 - no option
        try:
            await super()._process_connect_init()
        except (OSError, NatsError, TimeoutError):
            raise
        except Exception as exc:
            raise NatsError(f"nats: no NATS server answers: {exc!r}") from exc

    async def _read_loop(self) -> None:
        # The base class logs a parser error and stops reading.
        await super()._read_loop()
        if self.is_connected and asyncio.current_task() is self._reading_task:
            await self._process_op_err(NatsError("nats: the read loop ended"))
