"""The acknowledgement of a request, repeated to learn whether its caller still waits (protocol §10)."""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Final

from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import MeshError
from openagentmesh.serving.resources import Resources
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# A request that is answered within this many seconds is not acknowledged.
_FIRST_S: Final = 0.02
_INTERVAL_S: Final = 1.0
# A caller that lost its connection for a moment misses one acknowledgement.
_MAX_MISSED: Final = 2


class Keepalive:
    """Acknowledges a request repeatedly; calls `on_abandoned` once its caller does not wait any more.

    Either the caller cancels, and states whether its timeout expired, or NATS reports repeatedly that
    the `reply` subject has no subscription. `on_abandoned` gets whether the caller's timeout expired.
    """

    def __init__(
        self, resources: Resources, request_id: str, reply: str, on_abandoned: Callable[[bool], object]
    ) -> None:
        self._connection = resources.connection
        self._inbox = resources.inbox
        self._head = codec.accepted_headers(request_id, resources.instance_id)
        self._reply = reply
        self._on_abandoned = on_abandoned
        self._control = ""
        self._missed, self._last_missed = 0, False
        self._sending: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_FIRST_S, self._beat, context=Context())

    def close(self) -> None:
        """Send and receive nothing more."""
        self._timer.cancel()
        if self._control:
            self._inbox.unregister(self._control)

    def _beat(self) -> None:
        self._control = self._control or self._inbox.register(self._receive)
        self._missed, self._last_missed = self._missed if self._last_missed else 0, False
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
        is_missed = codec.is_no_responders(message.head)
        if is_missed and self._connection.is_recovering:
            return  # the caller may not have reconnected yet
        self._missed, self._last_missed = self._missed + 1, True
        if not is_missed or self._missed >= _MAX_MISSED:
            self.close()
            self._on_abandoned(codec.is_timeout_cancel(message.head))
