"""Who waits for an answer, and what tells that none will come (protocol §7, §9, §10)."""

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
from openagentmesh.registry.directory import Directory
from openagentmesh.registry.liveness import Peers, died, nobody_is_told
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import RECOVERY_RETRY_S, Inbox
from openagentmesh.transport.nats_client import Message

log = logging.getLogger(__name__)

# An agent that has just begun to listen may still be about to publish its contract.
_SECOND_LOOK: Final = 0.25
_MOST_KNOWN: Final = 100_000
# After this many seconds a name is looked up again beside its next request.
_KNOWN_FOR: Final = 3.0
# A host that has a request in hand says so within this many seconds.
_ACCEPTS_WITHIN: Final = 2.0


@dataclass(slots=True, eq=False)
class Waiting:
    """A request under way: whom it asks, and what to do when that cannot answer any more.

    `instance` has it in hand, once that is known; `control` is where that hears of a cancel.
    """

    name: str
    fail: Callable[[MeshError], None]
    looking: asyncio.Task[None] | None = None
    instance: str = ""
    control: str = ""


class Waits:
    """All requests of one node that wait; `own` gives the contract of an agent served here."""

    def __init__(
        self,
        connection: Connection,
        inbox: Inbox,
        directory: Directory,
        own: Callable[[str], AgentContract | None],
    ) -> None:
        self._connection = connection
        self._inbox = inbox
        self._directory = directory
        self._own = own
        self._peers = Peers(connection, inbox)
        self._waiting: set[Waiting] = set()
        # When a name was last seen in the registry.
        self._known: dict[str, float] = {}
        self._cancelling: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen for deaths, once for all requests."""
        await self._connection.subscribe(subjects.DEATHS, self._on_death)

    def fail_all(self) -> None:
        """Let nobody wait for an answer that cannot come any more."""
        for waiting in list(self._waiting):
            waiting.fail(ConnectionFailed("The connection was closed before an answer came."))

    async def close(self) -> None:
        """Let nobody wait, and ask nobody any more."""
        self.fail_all()
        await self._peers.close()

    def check(self, name: str, verb: Verb) -> None:
        """Refuse at once what cannot be: a wrong verb for an agent of our own, a name that is none."""
        own = self._own(name)
        if own is not None:
            own.check_verb(verb)
        elif name not in self._known and (why := subjects.invalid_name(name)):
            raise InvalidInput(f"{name!r} names no agent: {why}.")

    async def look_up(self, name: str, verb: Verb) -> None:
        """See that the agent is in the registry and made for `verb`.

        Raises:
            NotFound, InvocationMismatch: it is not.

        """
        if self._is_known(name):
            return
        contract = await self._find(name)
        if contract is None:
            raise _not_found(name)
        contract.check_verb(verb)
        self.now_known(name)

    async def is_registered(self, name: str, verb: Verb) -> bool:
        """Whether the agent is in the registry; some are there all the same that are not in it.

        Raises:
            InvocationMismatch: it is, and not made for `verb`.

        """
        try:
            await self.look_up(name, verb)
        except NotFound:
            return False
        return True

    async def see_whether_told(self, name: str, verb: Verb) -> None:
        """See that a request for which NATS did not say that nobody is there has gone to somebody.

        Raises:
            NotFound: the agent is not in the registry, and NATS would not have said so.
            InvocationMismatch: it is, and not made for `verb`.

        """
        if not await self.is_registered(name, verb) and not await nobody_is_told(self._inbox, name):
            raise _not_found(name)

    async def nobody(self, name: str, verb: Verb) -> MeshError:
        """Why nobody answers for `name`."""
        contract = self._own(name) or await self._directory.find(name)
        if contract is None:
            return _not_found(name)
        contract.check_verb(verb)
        return NotAvailable(f"Agent '{name}' is in the catalog, but nobody answers for it", agent=name)

    @contextmanager
    def watched(self, name: str, verb: Verb, fail: Callable[[MeshError], None]) -> Iterator[Waiting]:
        """Call `fail` when it turns out that no answer will come."""
        waiting = Waiting(name, fail)
        self._waiting.add(waiting)
        if not self._is_known(name):
            waiting.looking = asyncio.create_task(self._look(waiting, verb))
        try:
            yield waiting
        finally:
            self._waiting.discard(waiting)
            if waiting.instance:
                self._peers.forget(waiting.instance, waiting.fail)
            if waiting.looking is not None:
                waiting.looking.cancel()

    def accepted(self, waiting: Waiting, instance: str, control: str) -> None:
        """An instance has the request in hand: see that it lives, and know where it hears us."""
        waiting.control = control or waiting.control
        # It becomes part of a subject, and who says it may be anybody.
        if subjects.is_token(instance) and instance != waiting.instance:
            if waiting.instance:
                self._peers.forget(waiting.instance, waiting.fail)
            waiting.instance = instance
            self._peers.wait_for(instance, waiting.name, waiting.fail)

    async def cancel(self, waiting: Waiting, reply: str, *, late: bool) -> None:
        """Tell the host that nobody waits any more; if it is not known yet, as soon as it is.

        `reply` is where the host says that it has the request in hand; `late` when time was up.
        """
        if self._connection.is_closed:
            return
        if waiting.control:
            self._inbox.unregister(reply)
            await self._send_cancel(waiting.control, late)
            return

        def receive(message: Message) -> None:
            self._inbox.unregister(reply)
            if message.reply and codec.decode_reply(message.head, b"").accepted:
                task = asyncio.create_task(self._send_cancel(message.reply, late))
                self._cancelling.add(task)
                task.add_done_callback(self._cancelling.discard)

        self._inbox.replace(reply, receive)
        asyncio.get_running_loop().call_later(_ACCEPTS_WITHIN, self._inbox.unregister, reply)

    async def _send_cancel(self, control: str, late: bool) -> None:  # noqa: FBT001 - the cancel's own
        with suppress(MeshError):  # what ended the wait is told, not this
            await self._connection.publish(control, b"", codec.cancel_headers(timed_out=late))

    def _is_known(self, name: str) -> bool:
        return time.monotonic() - self._known.get(name, -_KNOWN_FOR) < _KNOWN_FOR

    def now_known(self, name: str) -> None:
        """Somebody answers for this name, so nobody needs to look it up for a while."""
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[name] = time.monotonic()

    async def _look(self, waiting: Waiting, verb: Verb) -> None:
        """Look a name up while its first request is under way.

        Usually NATS says that nobody is there, but not while anyone listens to `mesh.>`.
        """
        try:
            await self.see_whether_told(waiting.name, verb)
        except InvocationMismatch as exc:
            waiting.fail(exc)
        except NotFound as exc:
            if not waiting.instance:
                waiting.fail(exc)
        except MeshError as exc:
            # The request itself may well be answered.
            log.debug("looking up '%s': %s", waiting.name, exc)

    async def _find(self, name: str) -> AgentContract | None:
        """The contract of an agent, which may be about to be published."""
        contract = self._own(name) or await self._directory.find(name)
        while contract is None and self._connection.is_recovering:
            await asyncio.sleep(RECOVERY_RETRY_S)
            contract = await self._directory.find(name)
        if contract is None:
            await asyncio.sleep(_SECOND_LOOK)
            contract = await self._directory.find(name)
        return contract

    def _on_death(self, message: Message) -> None:
        try:
            notice = DeathNotice.model_validate_json(message.body)
        except ValidationError:
            return
        self._known.pop(notice.agent, None)
        # Who has a request in hand is watched by itself, and may well be another one.
        ours = ("", notice.instance_id)
        for waiting in [w for w in self._waiting if w.name == notice.agent and w.instance in ours]:
            text = f"The last instance serving agent '{notice.agent}' is gone ({notice.reason})"
            waiting.fail(died(notice, text))


def _not_found(name: str) -> NotFound:
    return NotFound(f"Agent '{name}' is not in the catalog", agent=name)
