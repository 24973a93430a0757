"""The one NATS connection: connect, reconnect, publish, subscribe, and a history of its events."""

import asyncio
import logging
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from nats.errors import Error as NatsError
from nats.errors import NoServersError
from nats.js import JetStreamContext
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import ConnectionDenied, ConnectionFailed, InvalidInput, PayloadTooLarge
from openagentmesh.transport.backoff import jittered_backoff
from openagentmesh.transport.nats_client import MessageCallback, NatsClient
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 5.0
_FLUSH_TIMEOUT_S: Final = 10
# Bytes that are buffered while the server is unreachable.
_PENDING_SIZE: Final = 8 * 1024 * 1024
_PING_INTERVAL_S: Final = 15
_RECONNECT_WAIT_S: Final = 0.1
# After UNSUB and its PONG, messages still arrive for a moment.
LINGER_S: Final = 0.15
_MAX_RESTORE_BACKOFF_S: Final = 5.0
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
        try:
            parts = urlsplit(self.url)
        except ValueError:  # malformed; connecting reports it
            return "***@" + self.url.rpartition("@")[2] if "@" in self.url else self.url
        return (
            self.url.replace(f"{parts.netloc.rpartition('@')[0]}@", "***@", 1)
            if "@" in parts.netloc
            else self.url
        )


@dataclass(slots=True, frozen=True)
class ConnectionEvent:
    """An event of the connection; `at` in UTC."""

    what: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


Restore = Callable[[], Awaitable[None]]


class Connection:
    """The one NATS connection of a node; reconnects by itself.

    Attributes:
        history: its last events.
        reconnects: how often it reconnected.
        is_recovering: the server was unreachable until a moment ago; other clients may not be back yet.
        restore: runs in a task after each reconnect, again when the connection is lost meanwhile.
        on_disconnected: called when the connection is lost.
        on_closed: called when the connection is closed for good.
    """

    def __init__(self, target: Target, name: str) -> None:
        self.target = target
        self.name = name
        self.history: deque[ConnectionEvent] = deque(maxlen=_MAX_HISTORY)
        self.reconnects = 0
        self.is_recovering = False
        self.restore: Restore | None = None
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
        """Connect within `timeout` seconds; later reconnects are unbounded.

        Raises:
            ConnectionFailed: no server answers at the address, or not in time.
            ConnectionDenied: the server rejects the credentials.
        """
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
        self.history.append(ConnectionEvent(f"connected to {self.target.display_url}"))

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
        number = getattr(cause, "errno", None)
        reason = str(cause) or type(cause).__name__
        if isinstance(cause, OSError) and number:
            reason = os.strerror(number) if number > 0 else str(cause.strerror)
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
        """Wait until the server is connected.

        Raises:
            ConnectionFailed: the connection is closed for good.
        """
        if not self._up.is_set():
            await self._up.wait()
        if self.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.display_url} is closed.")

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed for good."""
        return bool(self._client.is_closed)

    async def wait_recovered(self) -> None:
        """Wait until the server is connected and other clients have had time to reconnect.

        Raises:
            ConnectionFailed: the connection is closed for good.
        """
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

    def jetstream(self, timeout: float = 5.0) -> JetStreamContext:
        """The library's JetStream context over this connection; `timeout` in seconds."""
        return self._client.jetstream(timeout=timeout)

    def check_size(self, head: bytes, body: bytes) -> None:
        """Check the size of a message; the server would close the connection.

        Raises:
            PayloadTooLarge: with `size` and `limit` in its details, in bytes.
        """
        size = len(head) + len(body)
        if size > self.max_payload:
            raise PayloadTooLarge(
                f"A message of {size} bytes (headers {len(head)}, body {len(body)}) is larger "
                f"than the server's max_payload ({self.max_payload}). Send less, or use the workspace.",
                details={"size": size, "headers": len(head), "body": len(body), "limit": self.max_payload},
            )

    async def publish(self, subject: str, body: bytes = b"", head: bytes = b"", reply: str = "") -> None:
        """Publish one message; while the server is unreachable it waits in a bounded buffer.

        Raises:
            PayloadTooLarge: headers and body together exceed the server's limit.
            ConnectionFailed: the connection is closed, or the buffer is full.
        """
        client, size = self._client, len(head) + len(body)
        if size > client.max_payload:
            self.check_size(head, body)
        if not client.is_connected and (client.is_closed or size > client.buffer_space):
            state = "closed" if client.is_closed else "down, and its buffer is full"
            raise ConnectionFailed(f"The connection to {self.target.display_url} is {state}.")
        if head:
            line = f"HPUB {subject} {reply} {len(head)} {size}\r\n"
        else:
            line = f"PUB {subject} {reply} {len(body)}\r\n"
        await client.write(b"".join((line.encode("utf-8", "surrogateescape"), head, body, b"\r\n")))

    async def subscribe(self, subject: str, callback: MessageCallback, queue: str = "") -> int:
        """Subscribe; `callback` runs in the read loop and must return at once.

        Returns the subscription's id. A `flush` afterwards proves that the server has it.

        Raises:
            InvalidInput: the subject cannot be subscribed to.
            ConnectionFailed: the connection is closed.
        """
        if reason := subjects.invalid_pattern(subject):
            # The server would close the connection, again after each reconnect.
            raise InvalidInput(f"{subject!r} cannot be subscribed to: {reason}.")
        if self._client.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.display_url} is closed.")
        return await self._client.subscribe_callback(subject, callback, queue)

    async def flush(self) -> None:
        """Wait until the server has processed everything written so far.

        Raises:
            ConnectionFailed: it did not answer in time.
        """
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
            self.remove_callbacks(*sids)

    def remove_callbacks(self, *sids: int) -> None:
        """Ignore further messages of these subscriptions."""
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
            self.history.append(ConnectionEvent(f"not permitted: {exc}"))
            log.error("permission denied by the server: %s", exc)

    def _on_disconnected(self) -> None:
        self._begin_recovery()
        self._up.clear()
        self.on_disconnected()
        self.history.append(ConnectionEvent(f"lost {self.target.display_url}"))
        log.warning("connection lost: %s; reconnecting", self.target.display_url)

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._begin_recovery()
        self._recovery_timer = asyncio.get_running_loop().call_later(_RECOVERY_S, self._end_recovery)
        self._up.set()
        self.history.append(ConnectionEvent(f"reconnected to {self.target.display_url}"))
        log.info("reconnected: %s", self.target.display_url)
        # Not awaited here: an error would end the library's reconnecting, and a wait would delay it.
        if self._restoring is not None:
            self._restoring.cancel()
        if self.restore is not None:
            self._restoring = asyncio.create_task(self._restore_with_retries(self.restore))

    def _begin_recovery(self) -> None:
        if self._recovery_timer is not None:
            self._recovery_timer.cancel()
        self.is_recovering = True
        self._recovered.clear()

    def _end_recovery(self) -> None:
        self.is_recovering = False
        self._recovered.set()

    async def _restore_with_retries(self, restore: Restore) -> None:
        """Retry until it succeeds, or until the next reconnect starts it again."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(Exception),  # errors of libraries are retried, too
            wait=jittered_backoff(0.1, _MAX_RESTORE_BACKOFF_S),
            before_sleep=self._on_restore_failed,
        ):
            with attempt:
                await restore()

    def _on_restore_failed(self, state: RetryCallState) -> None:
        exc = state.outcome.exception() if state.outcome else None
        self.history.append(ConnectionEvent(f"not restored yet: {exc}"))
        log.warning("state after the reconnect not restored yet: %s", exc)

    async def _on_closed(self) -> None:
        self.closed.set()
        # Release those who wait; they see that it is closed.
        self._up.set()
        self._recovered.set()
        self.on_closed()
