"""The one NATS connection: connect, reconnect, publish, subscribe, and a history of its events."""

import asyncio
import logging
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from nats.errors import Error as NatsError
from nats.errors import NoServersError
from nats.js import JetStreamContext

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import (
    ConnectionDenied,
    ConnectionFailed,
    InvalidInput,
    PayloadTooLarge,
    error_text,
)
from openagentmesh.protocol.status import HistoryEvent
from openagentmesh.transport.nats_client import MessageCallback, NatsClient
from openagentmesh.transport.tasks import cancel_and_wait, retry_with_reports

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 5.0
_FLUSH_TIMEOUT_S: Final = 10
# Bytes that are buffered while the server is unreachable.
_PENDING_SIZE: Final = 8 * 1024 * 1024
_PING_INTERVAL_S: Final = 15
_RECONNECT_WAIT_S: Final = 0.1
# After UNSUB and its PONG, messages still arrive for a moment.
LINGER_S: Final = 0.15
_MAX_HISTORY: Final = 50
# After a restart of the server its clients reconnect within about this many seconds.
_RECOVERY_S: Final = 2.0


@dataclass(slots=True, frozen=True)
class Target:
    """A server's url and the files with credentials and TLS material for it."""

    url: str
    creds: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None

    @property
    def display_url(self) -> str:
        """The url without a password or a token, for messages."""
        netloc = self.url
        with suppress(ValueError):  # malformed; connecting reports it
            netloc = urlsplit(self.url).netloc
        user, at, _ = netloc.rpartition("@")
        return self.url.replace(f"{user}@", "***@", 1) if at else self.url


class Connection:
    """The one NATS connection of a node; reconnects by itself.

    Attributes:
        is_recovering: the server was unreachable until a moment ago; other clients may not be back yet.
        restore: runs in a task after each reconnect, again when the connection is lost meanwhile.
        on_disconnected: called when the connection is lost.
        on_closed: called when the connection is closed for good.
        closed: set when it is closed for good.
    """

    def __init__(self, target: Target, name: str) -> None:
        self.target = target
        self.name = name
        self.history: deque[HistoryEvent] = deque(maxlen=_MAX_HISTORY)
        self.reconnects = 0
        self.is_recovering = False
        self.restore: Callable[[], Awaitable[None]] | None = None
        self.on_disconnected: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None
        self.closed = asyncio.Event()
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._recovery_timer: asyncio.TimerHandle | None = None
        self._up = asyncio.Event()
        self._client = NatsClient()
        self._client.on_disconnected = self._on_disconnected
        self._restoring: asyncio.Task[None] | None = None
        self._last_error: Exception | None = None

    async def connect(self, timeout: float = CONNECT_TIMEOUT_S) -> None:
        """Connect within `timeout` seconds, or raise ConnectionFailed or ConnectionDenied."""
        options = self._options()
        try:
            async with asyncio.timeout(timeout):
                await self._client.connect(self.target.url, **options)
        # Credentials, certificates and urls pass through libraries that may raise anything.
        except Exception as exc:
            await self._client.close()
            raise self._connect_error(exc, timeout) from exc
        self._client.options |= {"allow_reconnect": True, "max_reconnect_attempts": -1}
        self._up.set()
        self.history.append(HistoryEvent(what=f"connected to {self.target.display_url}"))

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "name": self.name,
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": _RECONNECT_WAIT_S,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "ping_interval": _PING_INTERVAL_S,
            "pending_size": _PENDING_SIZE,
            "error_cb": self._on_error,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }
        if self.target.creds:
            if not Path(self.target.creds).is_file():
                raise ConnectionFailed(
                    f"The credentials file '{self.target.creds}' does not exist. "
                    "Give the path of a .creds file, or leave it out."
                )
            options["user_credentials"] = self.target.creds
        if self.target.tls_ca or self.target.tls_cert:
            options["tls"] = self._tls()
        return options

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.target.tls_ca)
            if self.target.tls_cert:
                context.load_cert_chain(self.target.tls_cert, self.target.tls_key)
        except (OSError, ssl.SSLError) as exc:
            raise ConnectionFailed(
                f"The TLS files cannot be used: {exc} (ca '{self.target.tls_ca}', "
                f"certificate '{self.target.tls_cert}', key '{self.target.tls_key}')."
            ) from exc
        return context

    def _connect_error(self, exc: Exception, timeout: float) -> ConnectionFailed | ConnectionDenied:
        # The library ends with "no servers available"; the cause is the error it reported before.
        cause = self._last_error if isinstance(exc, NoServersError) and self._last_error else exc
        reason = error_text(cause)
        if isinstance(cause, OSError) and cause.errno:
            reason = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        if not isinstance(exc, (TimeoutError, OSError, NatsError, ValueError)) and self.target.creds:
            reason = f"authentication failed ({reason})"
        if "authorization" in reason.lower() or "authentication" in reason.lower():
            used = "no credentials"
            if self.target.creds:
                used = f"credentials '{self.target.creds}'"
            elif "@" in self.target.url:
                used = "the user and password in the url"
            return ConnectionDenied(
                f"The server at {self.target.display_url} rejects {used}: {reason}.",
                details={"url": self.target.display_url, "creds": self.target.creds},
            )
        if isinstance(exc, TimeoutError):
            reason = f"no answer within {timeout:g}s"
        return ConnectionFailed(
            f"No NATS server is reachable at {self.target.display_url}: {reason}.",
            details={"url": self.target.display_url},
        )

    @property
    def connected(self) -> bool:
        """Whether the server is connected now."""
        return bool(self._client.is_connected)

    async def wait_connected(self) -> None:
        """Wait until the server is connected; raises ConnectionFailed if the connection is closed."""
        await self._up.wait()
        if self.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.display_url} is closed.")

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed for good."""
        return bool(self._client.is_closed)

    async def wait_recovered(self) -> None:
        """`wait_connected`, and until other clients have had time to reconnect, too."""
        await self._recovered.wait()
        await self.wait_connected()

    @property
    def max_payload(self) -> int:
        """The server's limit for body and headers together, in bytes."""
        return int(self._client.max_payload)

    @property
    def server(self) -> dict[str, Any]:
        """The server's INFO at the last connect."""
        return dict(self._client._server_info)  # noqa: SLF001 - the library has no accessor for it

    def jetstream(self) -> JetStreamContext:
        """The library's JetStream context over this connection."""
        return self._client.jetstream()

    async def publish(self, subject: str, body: bytes = b"", head: bytes = b"", reply: str = "") -> None:
        """Publish one message; while the server is unreachable it waits in a bounded buffer.

        Raises:
            PayloadTooLarge: headers and body together exceed the server's limit; in bytes in its details.
            ConnectionFailed: the connection is closed, or the buffer is full.
        """
        client, size = self._client, len(head) + len(body)
        if size > client.max_payload:  # the server would close the connection
            raise PayloadTooLarge(
                f"A message of {size} bytes (headers {len(head)}, body {len(body)}) is larger "
                f"than the server's max_payload ({self.max_payload}). Send less, or use the workspace.",
                details={"size": size, "headers": len(head), "body": len(body), "limit": self.max_payload},
            )
        if not client.is_connected and (client.is_closed or size > client.buffer_space):
            state = "closed" if client.is_closed else "down, and its buffer is full"
            raise ConnectionFailed(f"The connection to {self.target.display_url} is {state}.")
        line = (
            f"HPUB {subject} {reply} {len(head)} {size}\r\n" if head else f"PUB {subject} {reply} {size}\r\n"
        )
        await client.write(b"".join((line.encode("utf-8", "surrogateescape"), head, body, b"\r\n")))

    async def subscribe(self, subject: str, callback: MessageCallback, queue: str = "") -> int:
        """Subscribe, and return the id; `callback` runs in the read loop and must return at once.

        A `flush` afterwards proves that the server has it. Raises InvalidInput or ConnectionFailed.
        """
        if reason := subjects.invalid_pattern(subject):
            # The server would close the connection, again after each reconnect.
            raise InvalidInput(f"{subject!r} cannot be subscribed to: {reason}.")
        if self._client.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.display_url} is closed.")
        return await self._client.subscribe_callback(subject, callback, queue)

    async def flush(self) -> None:
        """Wait until the server has processed all that was written, or raise ConnectionFailed."""
        try:
            await self._client.flush(_FLUSH_TIMEOUT_S)
        except NatsError as exc:
            raise ConnectionFailed(f"{self.target.display_url} does not answer: {exc}") from exc

    async def drain(self, *sids: int) -> None:
        """Unsubscribe without losing messages that are on their way: UNSUB, linger, remove the callbacks."""
        for sid in sids:
            await self._client.send_unsubscribe(sid)
        try:
            if self.connected:
                try:
                    await self.flush()
                except ConnectionFailed as exc:
                    log.warning("unsubscribed without confirmation by the server: %s", exc)
                await asyncio.sleep(LINGER_S)  # the server does not announce the last message
        finally:
            for sid in sids:
                self._client.remove_callback(sid)

    async def unsubscribe(self, sid: int) -> None:
        """Unsubscribe and ignore messages that are on their way."""
        await self._client.send_unsubscribe(sid)
        self._client.remove_callback(sid)

    async def close(self) -> None:
        """Send what is queued and close for good."""
        await cancel_and_wait(self._restoring)
        await self._client.close()

    async def _on_error(self, exc: Exception) -> None:
        # Called inside the read loop: must not wait.
        log.debug("connection: %s", exc)
        self._last_error = exc
        if "permissions violation" in str(exc).lower():
            self.history.append(HistoryEvent(what=f"not permitted: {exc}"))
            log.error("permission denied by the server: %s", exc)

    def _on_disconnected(self) -> None:
        self._begin_recovery()
        self._up.clear()
        self.on_disconnected()
        self.history.append(HistoryEvent(what=f"lost {self.target.display_url}"))
        log.warning("connection lost: %s; reconnecting", self.target.display_url)

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._begin_recovery()
        self._recovery_timer = asyncio.get_running_loop().call_later(_RECOVERY_S, self._end_recovery)
        self._up.set()
        self.history.append(HistoryEvent(what=f"reconnected to {self.target.display_url}"))
        log.info("reconnected: %s", self.target.display_url)
        # Not awaited here: an error would end the library's reconnecting, and a wait would delay it.
        if self._restoring is not None:
            self._restoring.cancel()
        if self.restore is not None:
            self._restoring = asyncio.create_task(retry_with_reports(self.restore, self._on_restore_failed))

    def _begin_recovery(self) -> None:
        if self._recovery_timer is not None:
            self._recovery_timer.cancel()
        self.is_recovering = True
        self._recovered.clear()

    def _end_recovery(self) -> None:
        self.is_recovering = False
        self._recovered.set()

    def _on_restore_failed(self, exc: BaseException | None) -> None:
        self.history.append(HistoryEvent(what=f"not restored yet: {exc}"))
        log.warning("state after the reconnect not restored yet: %s", exc)

    async def _on_closed(self) -> None:
        self.closed.set()
        # Waiting tasks continue, and find that it is closed.
        self._up.set()
        self._recovered.set()
        self.on_closed()
