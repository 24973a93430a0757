"""The bus: connect, reconnect, ordered flush, size check, and what happened to it."""

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
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import (
    ConnectionDenied,
    ConnectionFailed,
    InvalidInput,
    PayloadTooLarge,
)
from openagentmesh.transport.nats_client import HardenedClient, Receiver
from openagentmesh.transport.tasks import end

log = logging.getLogger(__name__)

CONNECT_TIMEOUT: Final = 5.0
FLUSH_TIMEOUT: Final = 10
# What may wait for the server while it is away.
_PENDING_SIZE: Final = 8 * 1024 * 1024
_PING_INTERVAL: Final = 15
_RECONNECT_WAIT: Final = 0.1
# After UNSUB and its PONG, messages still arrive for a moment.
LINGER: Final = 0.15
_RESTORE_WAIT_MAX: Final = 5.0
_HISTORY: Final = 50
# After a server's restart its clients come back within about this many seconds.
_OTHERS_RETURN: Final = 2.0


@dataclass(slots=True, frozen=True)
class Target:
    """Where to connect and as whom; file paths are given, not contents."""

    url: str
    creds: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None

    @property
    def shown(self) -> str:
        """The url without a password or a token, fit for a message."""
        try:
            parts = urlsplit(self.url)
        except ValueError:  # no url at all; connecting will say so
            return "***@" + self.url.rpartition("@")[2] if "@" in self.url else self.url
        return (
            self.url.replace(f"{parts.netloc.rpartition('@')[0]}@", "***@", 1)
            if "@" in parts.netloc
            else self.url
        )


@dataclass(slots=True, frozen=True)
class Event:
    """Something that happened to the connection, `at` in UTC."""

    what: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


Restore = Callable[[], Awaitable[None]]


class Bus:
    """The one NATS connection of a node.

    `history` tells the last things that happened to it. `restore` runs in a task of its own
    after each reconnect; a reconnect in the middle of it starts it anew. `on_lost` is called
    when the server is lost, `on_closed` when the connection is closed for good.
    """

    def __init__(self, target: Target, name: str) -> None:
        self.target = target
        self.name = name
        self.history: deque[Event] = deque(maxlen=_HISTORY)
        self.reconnects = 0
        # Whether the server was away until just now, so that others may not be back yet.
        self.unsettled = False
        self._settled = asyncio.Event()
        self._settled.set()
        self._settling: asyncio.TimerHandle | None = None
        self._here = asyncio.Event()
        self.restore: Restore | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None
        self._client = HardenedClient()
        self._client.on_lost = self._on_lost
        self._restoring: asyncio.Task[None] | None = None
        self._last_error: Exception | None = None
        self.closed = asyncio.Event()

    async def connect(self, timeout: float = CONNECT_TIMEOUT) -> None:
        """Connect once; afterwards the connection comes back by itself.

        Raises:
            ConnectionFailed: nobody answers at the address, or not in `timeout` seconds.
            ConnectionDenied: the server refuses the credentials.

        """
        options = self._options()
        try:
            async with asyncio.timeout(timeout):
                await self._client.connect(self.target.url, **options)
        # Credentials, certificates and urls pass through libraries that raise what they like.
        except Exception as exc:
            await self._client.close()
            raise self._explain(exc, timeout) from exc
        # The first connect is bounded, every later one is not.
        self._client.options |= {"allow_reconnect": True, "max_reconnect_attempts": -1}
        self._here.set()
        self.history.append(Event(f"connected to {self.target.shown}"))

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "name": self.name,
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": _RECONNECT_WAIT,
            "connect_timeout": CONNECT_TIMEOUT,
            "ping_interval": _PING_INTERVAL,
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

    def _explain(self, exc: Exception, timeout: float) -> ConnectionFailed | ConnectionDenied:
        # The library ends with "no servers available"; why is what it said before.
        cause = self._last_error if isinstance(exc, NoServersError) and self._last_error else exc
        number = getattr(cause, "errno", None)
        reason = str(cause) or type(cause).__name__
        if isinstance(cause, OSError) and number:
            reason = os.strerror(number) if number > 0 else str(cause.strerror)
        if not isinstance(exc, (TimeoutError, OSError, NatsError, ValueError)) and self.target.creds:
            reason = f"authentication is not possible with these ({reason})"
        if "authorization" in reason.lower() or "authentication" in reason.lower():
            used = "no credentials"
            if self.target.creds:
                used = f"credentials '{self.target.creds}'"
            elif "@" in self.target.url:
                used = "the user and password of the url"
            return ConnectionDenied(
                f"The server at {self.target.shown} refuses {used}: {reason}.",
                details={"url": self.target.shown, "creds": self.target.creds},
            )
        if isinstance(exc, TimeoutError):
            reason = f"no answer within {timeout:g}s"
        return ConnectionFailed(
            f"No NATS server can be reached at {self.target.shown}: {reason}.",
            details={"url": self.target.shown},
        )

    @property
    def connected(self) -> bool:
        """Whether the server is there right now."""
        return bool(self._client.is_connected)

    async def until_connected(self) -> None:
        """Wait until the server is there.

        Raises:
            ConnectionFailed: the connection is closed for good.

        """
        if not self._here.is_set():
            await self._here.wait()
        if self.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.shown} is closed.")

    @property
    def is_closed(self) -> bool:
        """Whether the connection is closed for good."""
        return bool(self._client.is_closed)

    async def until_settled(self) -> None:
        """Wait until the server is there, and others are back from its absence.

        Raises:
            ConnectionFailed: the connection is closed for good.

        """
        await self._settled.wait()
        await self.until_connected()

    @property
    def max_payload(self) -> int:
        """The server's limit for body and headers together, in bytes."""
        return int(self._client.max_payload)

    @property
    def server(self) -> dict[str, Any]:
        """What the server said of itself when we connected."""
        return dict(self._client._server_info)  # noqa: SLF001 - the library has no accessor for it

    def jetstream(self, timeout: float = 5.0) -> JetStreamContext:
        """The library's JetStream context over this connection; `timeout` in seconds."""
        return self._client.jetstream(timeout=timeout)

    def check_size(self, head: bytes, body: bytes) -> None:
        """Refuse what the server would end the connection for.

        Raises:
            PayloadTooLarge: with `size` and `limit` in its details, in bytes.

        """
        size = len(head) + len(body)
        if size > self.max_payload:
            raise PayloadTooLarge(
                f"A message of {size} bytes (headers {len(head)}, body {len(body)}) is larger "
                f"than the server takes ({self.max_payload}). Send less, or share it as a file.",
                details={"size": size, "headers": len(head), "body": len(body), "limit": self.max_payload},
            )

    async def publish(self, subject: str, body: bytes = b"", head: bytes = b"", reply: str = "") -> None:
        """Send one message; while the server is away it waits in a bounded buffer.

        Raises:
            PayloadTooLarge: headers and body together exceed the server's limit.
            ConnectionFailed: the connection is closed, or the buffer is full.

        """
        client, size = self._client, len(head) + len(body)
        if size > client.max_payload:
            self.check_size(head, body)
        if not client.is_connected and (client.is_closed or size > client.room):
            state = "closed" if client.is_closed else "away, and the buffer for it is full"
            raise ConnectionFailed(f"The connection to {self.target.shown} is {state}.")
        if head:
            line = f"HPUB {subject} {reply} {len(head)} {size}\r\n"
        else:
            line = f"PUB {subject} {reply} {len(body)}\r\n"
        await client.write(b"".join((line.encode("utf-8", "surrogateescape"), head, body, b"\r\n")))

    async def listen(self, subject: str, receiver: Receiver, queue: str = "") -> int:
        """Subscribe; `receiver` runs in the read loop and must return at once.

        A `flush` afterwards proves that the server has the subscription.

        Raises:
            InvalidInput: nothing can be subscribed to by this subject.
            ConnectionFailed: the connection is closed.

        """
        if why := subjects.invalid_pattern(subject):
            # The server ends the connection for it, again after each reconnect.
            raise InvalidInput(f"{subject!r} cannot be listened on: {why}.")
        if self._client.is_closed:
            raise ConnectionFailed(f"The connection to {self.target.shown} is closed.")
        return await self._client.listen(subject, receiver, queue)

    async def flush(self) -> None:
        """Wait until the server has seen everything written so far.

        Raises:
            ConnectionFailed: it did not answer in time.

        """
        try:
            await self._client.flush(FLUSH_TIMEOUT)
        except NatsError as exc:
            raise ConnectionFailed(f"{self.target.shown} does not answer: {exc}") from exc

    async def leave(self, *sids: int) -> None:
        """End subscriptions without losing what is on its way: unsubscribe, linger, forget."""
        for sid in sids:
            await self._client.leave(sid)
        try:
            if self.connected:
                try:
                    await self.flush()
                except ConnectionFailed as exc:
                    log.warning("leaving without the server's word: %s", exc)
                await asyncio.sleep(LINGER)  # the server has no event for "the last one is out"
        finally:
            self.drop(*sids)

    def drop(self, *sids: int) -> None:
        """Receive nothing more for these subscriptions, which were left before."""
        for sid in sids:
            self._client.forget(sid)

    async def quit(self, sid: int) -> None:
        """End a subscription whose last messages nobody waits for."""
        await self._client.leave(sid)
        self._client.forget(sid)

    async def close(self) -> None:
        """Send what is queued and close; nothing can be sent afterwards."""
        await end(self._restoring)
        await self._client.close()

    async def _on_error(self, exc: Exception) -> None:
        # Called inside the read loop: must not wait.
        log.debug("connection: %s", exc)
        self._last_error = exc
        if "permissions violation" in str(exc).lower():
            self.history.append(Event(f"not permitted: {exc}"))
            log.error("the server does not permit it: %s", exc)

    def _on_lost(self) -> None:
        self._unsettle()
        self._here.clear()
        self.on_lost()
        self.history.append(Event(f"lost {self.target.shown}"))
        log.warning("lost the connection to %s; trying to get it back", self.target.shown)

    async def _on_reconnected(self) -> None:
        self.reconnects += 1
        self._unsettle()
        self._settling = asyncio.get_running_loop().call_later(_OTHERS_RETURN, self._settle)
        self._here.set()
        self.history.append(Event(f"reconnected to {self.target.shown}"))
        log.info("connected to %s again", self.target.shown)
        # Not awaited here: an error would end the reconnecting, and a wait would hold it up.
        if self._restoring is not None:
            self._restoring.cancel()
        if self.restore is not None:
            self._restoring = asyncio.create_task(self._restore_at_last(self.restore))

    def _unsettle(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        self.unsettled = True
        self._settled.clear()

    def _settle(self) -> None:
        self.unsettled = False
        self._settled.set()

    async def _restore_at_last(self, restore: Restore) -> None:
        """Try until it is done, or until a new reconnect begins it anew."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(Exception),  # a library's own error must not end it either
            wait=wait_random_exponential(multiplier=0.1, max=_RESTORE_WAIT_MAX),
            before_sleep=self._restore_failed,
        ):
            with attempt:
                await restore()

    def _restore_failed(self, state: RetryCallState) -> None:
        exc = state.outcome.exception() if state.outcome else None
        self.history.append(Event(f"not restored yet: {exc}"))
        log.warning("what was true before the reconnect is not restored yet: %s", exc)

    async def _on_closed(self) -> None:
        self.closed.set()
        # Nobody is to wait for it any more.
        self._here.set()
        self._settled.set()
        self.on_closed()
