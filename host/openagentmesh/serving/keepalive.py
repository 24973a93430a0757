"""A request's line to its caller: who has it in hand, and whether anybody still waits (protocol §10)."""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Final

from openagentmesh.agent.call import Call
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import MeshError
from openagentmesh.serving.deadline import Deadline
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# An answer within this many seconds needs no word that it is coming.
_ACCEPT_AFTER: Final = 0.02
# Afterwards the word is given again this often, in seconds, to learn whether it is heard.
_BEAT: Final = 1.0
# A caller that lost its connection for a moment hears one beat less.
_UNHEARD: Final = 2


class Lifeline:
    """Says `accepted` to a caller that asked for it; `gone` is called once nobody waits.

    Either the caller says so, and whether it waited in vain, or NATS says repeatedly that nobody
    hears us. `head` is the word itself, see `codec.accepted_headers`, and `reply` where it goes.
    """

    def __init__(
        self, connection: Connection, inbox: Inbox, head: bytes, reply: str, gone: Callable[[bool], object]
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._head = head
        self._reply = reply
        self._gone = gone
        self._control = ""
        self._unheard, self._missed = 0, False
        self._sending: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(_ACCEPT_AFTER, self._beat, context=Context())

    def close(self) -> None:
        """Say and hear nothing more."""
        self._timer.cancel()
        if self._control:
            self._inbox.unregister(self._control)

    def _beat(self) -> None:
        self._control = self._control or self._inbox.register(self._receive)
        self._unheard, self._missed = self._unheard if self._missed else 0, False
        self._sending = asyncio.create_task(self._send())
        self._timer = asyncio.get_running_loop().call_later(_BEAT, self._beat, context=Context())

    async def _send(self) -> None:
        if not self._connection.connected:
            return  # heard all at once later, the beats would tell nothing
        try:
            await self._connection.publish(self._reply, b"", self._head, self._control)
        except MeshError as exc:
            log.debug("a caller could not be told that its request is in hand: %s", exc)

    def _receive(self, message: Message) -> None:
        nobody = codec.decode_reply(message.head, b"").no_responders
        if nobody and self._connection.is_recovering:
            return  # the caller may not be back from the server's absence
        self._unheard, self._missed = self._unheard + 1, True
        if not nobody or self._unheard >= _UNHEARD:
            self.close()
            self._gone(codec.is_timeout_cancel(message.head))


def leaving(call: Call, deadline: Deadline) -> Callable[[bool], None]:
    """What stops the running request when its caller is gone; `late` when that waited in vain."""
    task = asyncio.current_task()
    assert task is not None, "a request has a task of its own"

    def leave(late: bool) -> None:  # noqa: FBT001 - the only thing there is to say
        if late:  # the caller's clock was faster than ours, that is all
            deadline.expire()
        else:
            call.abandoned = True
            task.cancel()

    return leave
