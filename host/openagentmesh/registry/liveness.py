"""An eye on the instances that have our requests in hand (protocol §10)."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import AgentDied, MeshError, MeshTimeout
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait

# How often an instance that we wait for is asked whether it lives, in seconds.
_ASK_EVERY: Final = 1.0
# One that lost its connection for a moment comes back, so NATS must say twice that nobody
# listens there. One that is only silent may be busy, and is given ten times.
_NOBODY_COUNTS: Final = 5
_GIVEN_UP_AT: Final = 10

Fail = Callable[[MeshError], None]


class Peers:
    """Asks instances whether they live, as long as somebody waits for them."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._waiting: dict[str, dict[Fail, str]] = {}
        self._silent: dict[str, int] = {}
        self._asking: asyncio.Task[None] | None = None

    def wait_for(self, instance_id: str, agent: str, fail: Fail) -> None:
        """Call `fail` when this instance, which has a request for `agent`, is gone."""
        self._waiting.setdefault(instance_id, {})[fail] = agent
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all())

    def forget(self, instance_id: str, fail: Fail) -> None:
        """Wait for this instance no more."""
        waiting = self._waiting.get(instance_id, {})
        waiting.pop(fail, None)
        if not waiting:
            self._waiting.pop(instance_id, None)

    async def close(self) -> None:
        """Ask no more."""
        await cancel_and_wait(self._asking)

    async def _ask_all(self) -> None:
        while self._waiting:
            await asyncio.sleep(_ASK_EVERY)
            if self._connection.is_recovering:  # it is we who are cut off
                self._silent.clear()
                continue
            await asyncio.gather(*[self._ask(instance_id) for instance_id in self._waiting])
            self._silent = {key: times for key, times in self._silent.items() if key in self._waiting}

    async def _ask(self, instance_id: str) -> None:
        gone = await is_gone(self._inbox, instance_id)
        counts = 0 if gone is False else self._silent.get(instance_id, 0) + (_NOBODY_COUNTS if gone else 1)
        self._silent[instance_id] = counts
        if counts < _GIVEN_UP_AT:
            return
        for fail, agent in self._waiting.pop(instance_id, {}).items():
            notice = DeathNotice(
                agent=agent,
                reason="disconnect",
                detected_at=datetime.now(UTC).isoformat(),
                instance_id=instance_id,
            )
            fail(died(notice, f"The instance that answered for agent '{agent}' is gone"))


def died(notice: DeathNotice, message: str) -> AgentDied:
    """The error for those who wait for an agent that is gone."""
    return AgentDied(message, agent=notice.agent, details=notice.model_dump())


async def is_gone(inbox: Inbox, instance_id: str) -> bool | None:
    """Whether nobody listens where this instance answers; None when it does not answer."""
    try:
        message = await inbox.request(subjects.host(instance_id, "ping"), timeout=_ASK_EVERY)
    except MeshTimeout:
        return None
    except MeshError:
        return False  # it is we who are cut off
    return codec.decode_reply(message.head, message.body).no_responders


async def nobody_is_told(inbox: Inbox, name: str) -> bool:
    """Whether NATS says that nobody is there, of a name like this that nobody can have.

    It does not while anyone listens to everything.
    """
    try:
        message = await inbox.request(_impossible(name), timeout=_ASK_EVERY)
    except MeshError:
        return False
    return codec.decode_reply(message.head, message.body).no_responders


def _impossible(name: str) -> str:
    """A subject beside an agent's own, for a name that nobody can have."""
    return f"{subjects.agent(name).rpartition('.')[0]}.{codec.new_id()}"


async def served_by_strangers(
    connection: Connection, inbox: Inbox, contracts: Iterable[AgentContract]
) -> set[str]:
    """Which of these agents somebody listens for, though no record says so: peers of other makes.

    They are asked with the wrong verb, which runs nothing: what counts is whether NATS says that
    nobody is there. Where it does not say so of a name that nobody can have, somebody listens to
    everything, and nothing can be told.
    """
    nobody: set[str] = set()
    replies: list[str] = []
    asked = []

    async def ask(subject: str, *, streaming: bool) -> None:
        def receive(message: Message) -> None:
            if codec.decode_reply(message.head, b"").no_responders:
                nobody.add(subject)

        reply = inbox.register(receive)
        replies.append(reply)
        head = codec.request_headers(codec.new_id(), "", timeout=None, streaming=streaming)
        await connection.publish(subject, b"", head, reply)

    try:
        for contract in contracts:
            if contract.invocable:
                subject, impossible = subjects.agent(contract.name), _impossible(contract.name)
                await ask(subject, streaming=not contract.streaming)
                await ask(impossible, streaming=False)
                asked.append((contract.name, subject, impossible))
        await connection.flush()  # the 503s come before it
    finally:
        for reply in replies:
            inbox.unregister(reply)
    return {name for name, subject, impossible in asked if subject not in nobody and impossible in nobody}
