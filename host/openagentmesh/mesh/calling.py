"""A caller's side: call and stream (protocol §7)."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from openagentmesh.bus.client import Message
from openagentmesh.bus.connection import Bus
from openagentmesh.bus.requests import Inbox, fail, settle
from openagentmesh.mesh.discovery import Directory
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.contract import AgentContract, Verb
from openagentmesh.protocol.errors import (
    AgentDied,
    ConnectionFailed,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
)
from openagentmesh.protocol.messages import DeathNotice
from openagentmesh.serving.streams import WINDOW, ChunkReader

log = logging.getLogger(__name__)

# An agent that has just begun to listen may still be about to publish its contract.
_SECOND_LOOK: Final = 0.25
_MOST_KNOWN: Final = 100_000
# After this many seconds a name is looked up again beside its next request.
_KNOWN_FOR: Final = 3.0
# While everybody returns to a restarted server, a request that reached nobody is sent again
# this often, in seconds.
_RETURNING: Final = 0.05


@dataclass(slots=True, eq=False)
class Waiting:
    """A request under way: whom it asks, and what to do when that cannot answer any more."""

    name: str
    fail: Callable[[MeshError], None]
    looking: asyncio.Task[None] | None = field(default=None)


class Caller:
    """Calls and streams over one bus; `own` gives the contract of an agent served here."""

    def __init__(
        self,
        bus: Bus,
        inbox: Inbox,
        directory: Directory,
        instance_id: str,
        own: Callable[[str], AgentContract | None],
    ) -> None:
        self._bus = bus
        self._inbox = inbox
        self._directory = directory
        self._instance_id = instance_id
        self._own = own
        self._waiting: set[Waiting] = set()
        # When a name was last seen in the registry.
        self._known: dict[str, float] = {}

    async def open(self) -> None:
        """Listen for deaths, once for all calls."""
        await self._bus.listen(subjects.DEATHS, self._on_death)

    def close(self) -> None:
        """Let nobody wait for an answer that cannot come any more."""
        for waiting in list(self._waiting):
            waiting.fail(ConnectionFailed("The connection was closed before an answer came."))

    async def call(
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Mapping[str, str] | None,
    ) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Send one request and return the first answer, or raise what came instead."""
        self._check(name, "call")
        body = codec.dump(payload)
        request_id = _request_id(headers)
        head = codec.request_headers(request_id, self._instance_id, timeout=timeout, extra=headers)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._ask(name, body, head)
                while answer.nobody and self._bus.unsettled:
                    await asyncio.sleep(_RETURNING)
                    answer = await self._ask(name, body, head)
                return codec.load(await self._body(answer, name, "call"))
        except TimeoutError:
            raise _timeout(subjects.agent(name), timeout, name, request_id) from None
        except MeshError as exc:
            raise _with_id(exc, name, request_id) from exc.__cause__

    async def _ask(self, name: str, body: bytes, head: bytes) -> codec.Answer:
        """One message out, the first answer back."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        reply = self._inbox.expect(lambda message: settle(answer, message))
        try:
            with self._watched(name, "call", lambda exc: fail(answer, exc)):
                await self._bus.publish(subjects.agent(name), body, head, reply)
                message = await answer
            return codec.read_answer(message.head, message.body)
        finally:
            self._inbox.forget(reply)

    async def stream(
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncGenerator[Any, None]:
        """Send one request and yield its chunks; `timeout` seconds from one to the next."""
        self._check(name, "stream")
        body = codec.dump(payload)
        request_id = _request_id(headers)
        if not subjects.is_token(request_id):
            raise InvalidInput(f"The request id {request_id!r} cannot name the subject of a stream.")
        subject = subjects.stream(request_id)
        head = codec.request_headers(
            request_id, self._instance_id, timeout=timeout, streaming=True, credit=WINDOW, extra=headers
        )
        reader = ChunkReader(self._bus.publish, name, request_id)
        sid = await self._bus.listen(subject, reader.receive)
        try:
            with self._watched(name, "stream", reader.fail):
                # The chunks' own subject as the reply: NATS says there that nobody listens.
                await self._bus.publish(subjects.agent(name), body, head, subject)
                while True:
                    async with asyncio.timeout(timeout):
                        frame = await reader.next()
                        if frame.nobody and self._bus.unsettled:
                            await asyncio.sleep(_RETURNING)
                            await self._bus.publish(subjects.agent(name), body, head, subject)
                            continue
                        chunk = await self._body(frame, name, "stream")
                    if frame.end:
                        return
                    yield codec.load(chunk)
                    await reader.consumed()
        except TimeoutError:
            raise _timeout(subject, timeout, name, request_id) from None
        except MeshError as exc:
            raise _with_id(exc, name, request_id) from exc.__cause__
        finally:
            if not self._bus.is_closed:
                with suppress(MeshError):  # what ended the stream is told, not this
                    await reader.abandon()
                await self._bus.quit(sid)

    def _check(self, name: str, verb: Verb) -> None:
        own = self._own(name)
        if own is not None:
            own.check_verb(verb)
        elif name not in self._known and (why := subjects.invalid_name(name)):
            raise InvalidInput(f"{name!r} names no agent: {why}.")

    async def _body(self, answer: codec.Answer, name: str, verb: Verb) -> bytes:
        """The body of an ok answer; anything else is raised."""
        if answer.nobody:
            raise await self._nobody(name, verb)
        if answer.error:
            raise codec.read_error(answer.body)
        return answer.body

    async def _nobody(self, name: str, verb: Verb) -> MeshError:
        """Why nobody answers for `name`."""
        contract = self._own(name) or await self._directory.find(name)
        if contract is None:
            return NotFound(f"Agent '{name}' is not in the catalog", agent=name)
        contract.check_verb(verb)
        return NotAvailable(f"Agent '{name}' is in the catalog, but nobody answers for it", agent=name)

    @contextmanager
    def _watched(self, name: str, verb: Verb, fail: Callable[[MeshError], None]) -> Iterator[None]:
        """Call `fail` when it turns out that no answer will come."""
        waiting = Waiting(name, fail)
        self._waiting.add(waiting)
        if time.monotonic() - self._known.get(name, -_KNOWN_FOR) >= _KNOWN_FOR:
            waiting.looking = asyncio.create_task(self._look(waiting, verb))
        try:
            yield
        finally:
            self._waiting.discard(waiting)
            if waiting.looking is not None:
                waiting.looking.cancel()

    async def _look(self, waiting: Waiting, verb: Verb) -> None:
        """Look a name up while its first request is under way.

        Usually NATS says that nobody is there, but not while anyone listens to `mesh.>`.
        """
        try:
            contract = self._own(waiting.name) or await self._directory.find(waiting.name)
            while contract is None and self._bus.unsettled:
                await asyncio.sleep(_RETURNING)
                contract = await self._directory.find(waiting.name)
            if contract is None:
                await asyncio.sleep(_SECOND_LOOK)
                contract = await self._directory.find(waiting.name)
            if contract is None:
                waiting.fail(NotFound(f"Agent '{waiting.name}' is not in the catalog", agent=waiting.name))
                return
            contract.check_verb(verb)
        except InvocationMismatch as exc:
            waiting.fail(exc)
            return
        except MeshError as exc:
            # The request itself may well be answered.
            log.debug("looking up '%s': %s", waiting.name, exc)
            return
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[waiting.name] = time.monotonic()

    def _on_death(self, message: Message) -> None:
        try:
            notice = DeathNotice.model_validate_json(message.body)
        except ValidationError:
            return
        self._known.pop(notice.agent, None)
        for waiting in [w for w in self._waiting if w.name == notice.agent]:
            waiting.fail(
                AgentDied(
                    f"The last instance serving agent '{notice.agent}' is gone ({notice.reason})",
                    agent=notice.agent,
                    details=notice.model_dump(),
                )
            )


def _request_id(headers: Mapping[str, str] | None) -> str:
    return (headers or {}).get(subjects.REQUEST_ID) or codec.new_id()


def _timeout(subject: str, timeout: float | None, name: str, request_id: str) -> MeshTimeout:
    return MeshTimeout(
        f"No message on {subject} within {timeout}s",
        agent=name,
        request_id=request_id,
        details={"subject": subject, "timeout": timeout},
    )


def _with_id(error: MeshError, name: str, request_id: str) -> MeshError:
    error.agent = error.agent or name
    error.request_id = request_id
    return error
