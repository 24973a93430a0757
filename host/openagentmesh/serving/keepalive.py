"""The acknowledgement of a request, repeated to learn whether its caller still waits (protocol §10)."""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Final

from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import MeshError
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# A request that is answered within this many seconds is not acknowledged.
_FIRST_S: Final = 0.02
_INTERVAL_S: Final = 1.0
# A caller that lost its connection for a moment misses one acknowledgement.
_MAX_UNHEARD: Final = 2


class Keepalive:
    """Acknowledges a request repeatedly; `on_gone` is called once its caller does not wait any more.

    Either the caller cancels, and states whether its timeout expired, or NATS reports repeatedly that
    the reply subject has no subscription.

    Args:
        connection: the connection.
        inbox: for the caller's cancel.
        head: the header block, see `codec.accepted_headers`.
        reply: the request's reply subject.
        on_gone: called with whether the caller's timeout expired.
    """

    def __init__(
        self, connection: Connection, inbox: Inbox, head: bytes, reply: str, on_gone: Callable[[bool], object]
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._head = head
        self._reply = reply
        self._on_gone = on_gone
        self._control = ""
        self._unheard, self._was_unheard = 0, False
        self._sending: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_FIRST_S, self._beat, context=Context())

    def close(self) -> None:
        """Send and receive nothing more."""
        self._timer.cancel()
        if self._control:
            self._inbox.unregister(self._control)

    def _beat(self) -> None:
        self._control = self._control or self._inbox.register(self._receive)
        self._unheard, self._was_unheard = self._unheard if self._was_unheard else 0, False
        self._sending = asyncio.create_task(self._send())
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL_S, self._beat, context=Context())

    async def _send(self) -> None:
        if not self._connection.connected:
            return  # buffered, several would arrive at once
        try:
            await self._connection.publish(self._reply, b"", self._head, self._control)
        except MeshError as exc:
            log.debug("a request was not acknowledged: %s", exc)

    def _receive(self, message: Message) -> None:
        unheard = codec.is_no_responders(message.head)
        if unheard and self._connection.is_recovering:
            return  # the caller may not have reconnected yet
        self._unheard, self._was_unheard = self._unheard + 1, True
        if not unheard or self._unheard >= _MAX_UNHEARD:
            self.close()
            self._on_gone(codec.is_timeout_cancel(message.head))
