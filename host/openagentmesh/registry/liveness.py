"""Liveness of instances, and of agents that no instance record lists (protocol §10)."""

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal

from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.errors import AgentDied, MeshError, MeshTimeout
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message
from openagentmesh.transport.tasks import cancel_and_wait

# How often an instance that handles a request of this node is pinged.
_PING_S: Final = 1.0
# A disconnected instance may reconnect, so two 503s in a row count as its death. An instance that
# does not answer may be busy: ten unanswered pings.
_NO_RESPONDERS_SCORE: Final = 5
_UNANSWERED_SCORE: Final = 1
_DEAD_SCORE: Final = 10

Fail = Callable[[MeshError], None]
DeathReason = Literal["graceful_shutdown", "disconnect"]


class LivenessMonitor:
    """Pings instances for as long as requests wait for their answers."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox
        self._requests: dict[str, dict[Fail, str]] = {}
        self._scores: dict[str, int] = {}
        self._pinging: asyncio.Task[None] | None = None

    def watch(self, instance_id: str, agent: str, fail: Fail) -> None:
        """Call `fail` when this instance, which has a request for `agent`, is dead."""
        self._requests.setdefault(instance_id, {})[fail] = agent
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.create_task(self._ping_all())

    def unwatch(self, instance_id: str, fail: Fail) -> None:
        """Call `fail` no more: the request is answered."""
        requests = self._requests.get(instance_id, {})
        requests.pop(fail, None)
        if not requests:
            self._requests.pop(instance_id, None)

    async def close(self) -> None:
        """Stop pinging."""
        await cancel_and_wait(self._pinging)

    async def _ping_all(self) -> None:
        while self._requests:
            await asyncio.sleep(_PING_S)
            if self._connection.is_recovering:  # the connection is down, not the instances
                self._scores.clear()
                continue
            await asyncio.gather(*[self._ping(instance_id) for instance_id in self._requests])
            self._scores = {key: score for key, score in self._scores.items() if key in self._requests}

    async def _ping(self, instance_id: str) -> None:
        dead = await is_dead(self._inbox, instance_id)
        score = _NO_RESPONDERS_SCORE if dead else _UNANSWERED_SCORE
        self._scores[instance_id] = 0 if dead is False else self._scores.get(instance_id, 0) + score
        if self._scores[instance_id] < _DEAD_SCORE:
            return
        del self._scores[instance_id]
        for fail, agent in self._requests.pop(instance_id, {}).items():
            notice = death_notice(agent, instance_id, "disconnect")
            fail(agent_died(notice, f"The instance that answered for agent '{agent}' is gone"))


def death_notice(agent: str, instance_id: str, reason: DeathReason) -> DeathNotice:
    """The notice that an agent's last instance is dead, as of now."""
    now = datetime.now(UTC).isoformat()
    return DeathNotice(agent=agent, reason=reason, detected_at=now, instance_id=instance_id)


def agent_died(notice: DeathNotice, message: str) -> AgentDied:
    """The error of requests to an agent whose instance is dead."""
    return AgentDied(message, agent=notice.agent, details=notice.model_dump())


async def is_dead(inbox: Inbox, instance_id: str) -> bool | None:
    """Whether an instance's ping subject has no subscription; None when it does not answer in time."""
    return await _has_no_responders(inbox, subjects.host(instance_id, "ping"))


async def reports_no_responders(inbox: Inbox, name: str) -> bool:
    """Whether NATS reports subjects without a subscription; it does not while one matches all subjects."""
    return bool(await _has_no_responders(inbox, _unused_subject(name)))


async def _has_no_responders(inbox: Inbox, subject: str) -> bool | None:
    try:
        message = await inbox.request(subject, timeout=_PING_S)
    except MeshTimeout:
        return None
    except MeshError:
        return False  # the connection is down
    return codec.is_no_responders(message.head)


def _unused_subject(name: str) -> str:
    """A subject like an agent's, which no agent has."""
    return f"{subjects.agent(name).rpartition('.')[0]}.{codec.new_id()}"


async def served_without_record(
    connection: Connection, inbox: Inbox, contracts: Iterable[AgentContract]
) -> set[str]:
    """Which of these agents have a subscription though no record lists them: instances without a record.

    Each gets a request with the wrong verb, which runs nothing: only NATS' 503 matters. Where an unused
    subject like the agent's gets no 503, a subscription matches all subjects, and nothing can be concluded.
    """
    unserved: set[str] = set()
    replies: list[str] = []
    requested: dict[str, tuple[str, str]] = {}

    def receive(subject: str, message: Message) -> None:
        if codec.is_no_responders(message.head):
            unserved.add(subject)

    try:
        for contract in contracts:
            if contract.invocable:
                requested[contract.name] = subjects.agent(contract.name), _unused_subject(contract.name)
                wrong_verb = not contract.streaming
                head = codec.request_headers(codec.new_id(), "", timeout=None, streaming=wrong_verb)
                for subject in requested[contract.name]:
                    replies.append(inbox.register(partial(receive, subject)))
                    await connection.publish(subject, b"", head, replies[-1])
        await connection.flush()  # the 503s arrive before it
    finally:
        for reply in replies:
            inbox.unregister(reply)
    return {name for name, (own, unused) in requested.items() if own not in unserved and unused in unserved}
