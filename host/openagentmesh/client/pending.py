"""Pending requests, and what shows that no answer will come (protocol §7, §9, §10)."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract, Verb
from openagentmesh.protocol.errors import (
    ConnectionFailed,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    NotAvailable,
    NotFound,
)
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.registry.directory import Directory, OwnContracts, not_found
from openagentmesh.registry.liveness import LivenessMonitor, agent_died, reports_no_responders
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import RECOVERY_RETRY_S, Inbox
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# An agent that has just subscribed may be about to publish its contract.
_SECOND_LOOKUP_S: Final = 0.25
_MAX_KNOWN: Final = 100_000
# A known name is looked up again, while a request is on its way, after this many seconds.
_KNOWN_FOR_S: Final = 3.0
# A host acknowledges a request within this many seconds.
_MAX_ACCEPT_S: Final = 2.0


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that waits for its answer; `fail` is called with an error when none will come."""

    name: str
    fail: Callable[[MeshError], None]
    # Looks the name up while the request is on its way.
    lookup: asyncio.Task[None] | None = None
    # The instance that acknowledged it, and the subject on which that receives a cancel.
    instance: str = ""
    control: str = ""


class PendingRequests:
    """All pending requests of one node."""

    def __init__(self, connection: Connection, inbox: Inbox, directory: Directory, own: OwnContracts) -> None:
        self._connection = connection
        self._inbox = inbox
        self._directory = directory
        self._own = own
        self._liveness = LivenessMonitor(connection, inbox)
        self._pending: set[PendingRequest] = set()
        # When each name was last known to be served.
        self._known: dict[str, float] = {}
        self._cancelling: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Subscribe to death notices, once for all requests."""
        await self._connection.subscribe(subjects.DEATHS, self._on_death)

    def fail_all(self) -> None:
        """Fail all requests: the connection is closed."""
        for pending in list(self._pending):
            pending.fail(ConnectionFailed("The connection was closed before an answer arrived."))

    async def close(self) -> None:
        """Fail all requests and ping no more instances."""
        self.fail_all()
        await self._liveness.close()

    def check(self, name: str, verb: Verb) -> None:
        """Reject at once what cannot succeed: an invalid name, a wrong verb for an agent served here."""
        own = self._own(name)
        if own is not None:
            own.check_verb(verb)
        elif name not in self._known and (reason := subjects.invalid_name(name)):
            raise InvalidInput(f"{name!r} is not an agent's name: {reason}.")

    async def is_registered(self, name: str, verb: Verb) -> bool:
        """Whether the agent is in the registry, and supports `verb`; peers may serve unregistered agents."""
        if not self._is_known(name):
            contract = await self._find(name)
            if contract is None:
                return False
            contract.check_verb(verb)
            self.mark_known(name)
        return True

    async def check_delivered(self, name: str, verb: Verb) -> None:
        """Raise NotFound for an unregistered agent unless NATS would have reported a missing subscription."""
        if not await self.is_registered(name, verb) and not await reports_no_responders(self._inbox, name):
            raise not_found(name)

    async def no_responders(self, name: str, verb: Verb) -> MeshError:
        """The error for a request that no instance received."""
        contract = self._own(name) or await self._directory.find(name)
        if contract is None:
            return not_found(name)
        contract.check_verb(verb)
        return NotAvailable(f"Agent '{name}' is in the catalog, but no instance serves it now", agent=name)

    @contextmanager
    def watch(self, name: str, verb: Verb, fail: Callable[[MeshError], None]) -> Iterator[PendingRequest]:
        """Call `fail` when no answer will come."""
        pending = PendingRequest(name, fail)
        self._pending.add(pending)
        if not self._is_known(name):
            pending.lookup = asyncio.create_task(self._look_up(pending, verb))
        try:
            yield pending
        finally:
            self._pending.discard(pending)
            if pending.instance:
                self._liveness.unwatch(pending.instance, pending.fail)
            if pending.lookup is not None:
                pending.lookup.cancel()

    def accepted(self, pending: PendingRequest, instance: str, control: str) -> None:
        """An instance acknowledged the request: monitor it, and remember where it receives a cancel."""
        pending.control = control or pending.control
        # It becomes part of a subject, and is not trusted.
        if subjects.is_token(instance) and instance != pending.instance:
            if pending.instance:
                self._liveness.unwatch(pending.instance, pending.fail)
            pending.instance = instance
            self._liveness.watch(instance, pending.name, pending.fail)

    async def cancel(self, pending: PendingRequest, reply: str, *, timed_out: bool) -> None:
        """Cancel the request at its host, as soon as that has acknowledged it on the subject `reply`."""
        if self._connection.is_closed:
            return
        if pending.control:
            self._inbox.unregister(reply)
            await self._send_cancel(pending.control, timed_out=timed_out)
            return

        def receive(message: Message) -> None:
            self._inbox.unregister(reply)
            if message.reply and codec.decode_reply(message.head, b"").accepted:
                task = asyncio.create_task(self._send_cancel(message.reply, timed_out=timed_out))
                self._cancelling.add(task)
                task.add_done_callback(self._cancelling.discard)

        self._inbox.replace(reply, receive)
        asyncio.get_running_loop().call_later(_MAX_ACCEPT_S, self._inbox.unregister, reply)

    async def _send_cancel(self, control: str, *, timed_out: bool) -> None:
        with suppress(MeshError):  # the request's own error is raised, not this one
            await self._connection.publish(control, b"", codec.cancel_headers(timed_out=timed_out))

    def _is_known(self, name: str) -> bool:
        return time.monotonic() - self._known.get(name, -_KNOWN_FOR_S) < _KNOWN_FOR_S

    def mark_known(self, name: str) -> None:
        """Look this name up no more for a while: an instance has answered for it."""
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[name] = time.monotonic()

    async def _look_up(self, pending: PendingRequest, verb: Verb) -> None:
        """Look a name up: while a subscription matches all subjects, NATS reports no missing subscription."""
        try:
            await self.check_delivered(pending.name, verb)
        except InvocationMismatch as exc:
            pending.fail(exc)
        except NotFound as exc:
            if not pending.instance:
                pending.fail(exc)
        except MeshError as exc:
            # The request itself may succeed.
            log.debug("looking up '%s': %s", pending.name, exc)

    async def _find(self, name: str) -> AgentContract | None:
        """The contract of an agent, also of one that is about to be published."""
        contract = self._own(name) or await self._directory.find(name)
        while contract is None and self._connection.is_recovering:
            await asyncio.sleep(RECOVERY_RETRY_S)
            contract = await self._directory.find(name)
        if contract is None:
            await asyncio.sleep(_SECOND_LOOKUP_S)
            contract = await self._directory.find(name)
        return contract

    def _on_death(self, message: Message) -> None:
        try:
            notice = DeathNotice.model_validate_json(message.body)
        except ValidationError:
            return
        self._known.pop(notice.agent, None)
        # A request that another instance acknowledged is monitored by itself.
        concerned = ("", notice.instance_id)
        for pending in [p for p in self._pending if p.name == notice.agent and p.instance in concerned]:
            text = f"The last instance serving agent '{notice.agent}' is gone ({notice.reason})"
            pending.fail(agent_died(notice, text))
