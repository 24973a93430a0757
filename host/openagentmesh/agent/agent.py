"""An agent: name, handler, types and limits in one object."""

import asyncio
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import iscoroutinefunction
from pathlib import Path
from time import monotonic
from types import FunctionType
from typing import Any, Final

from openagentmesh.agent.call import (
    Call,
    Caller,
    Endpoint,
    Middleware,
    ServedCall,
    reset_current_call,
    set_current_call,
)
from openagentmesh.agent.concurrency import Limiter
from openagentmesh.agent.handler import Handler, Kind, TypeCache, inspect_handler, source_location
from openagentmesh.agent.sources import Condition, KVCondition, Source, SubjectCondition
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract, AgentSpec
from openagentmesh.protocol.errors import InvalidAgent, Overloaded
from openagentmesh.protocol.messages import KVEntry, MeshMessage
from openagentmesh.transport.kv_watch import Entry
from openagentmesh.transport.nats_client import Message

# How long callers of an overloaded agent should wait.
_RETRY_AFTER_MS: Final = 250

Redactor = Callable[[bytes], bytes | None]
"""Removes secrets from a request's body before it is stored; None stores nothing."""


@dataclass(slots=True, frozen=True)
class Limits:
    """The limits of one agent.

    Attributes:
        concurrency: how many requests run at once.
        queue: how many more may wait; further ones are rejected as `overloaded`.
        timeout: seconds a request may take, waiting included; for a stream, until its next chunk.
        restart_pause: seconds before a failed publisher or watcher restarts, doubled with each failure.
        restart_pause_max: the longest such pause, in seconds.
    """

    concurrency: int = 128
    queue: int = 256
    timeout: float = 60.0
    restart_pause: float = 0.5
    restart_pause_max: float = 60.0

    def limiter(self) -> Limiter:
        """A limiter for these limits."""
        return Limiter(self.concurrency, self.queue)


DEFAULT_LIMITS: Final = Limits()


@dataclass(slots=True, frozen=True)
class RecordedRequest:
    """A recorded request; `identity` is its verified caller, `instance_id` the stated one."""

    body: bytes
    headers: Mapping[str, str]
    request_id: str = ""
    identity: Caller | None = None
    instance_id: str = ""


@dataclass(slots=True, frozen=True)
class Agent(ABC):
    """One version of an agent, as plugins see it.

    Attributes:
        name: its name.
        contract: its published form.
        kind: responder, streamer, trigger, publisher, watcher or driven.
        source: file and line of its handler.
        sources: what triggers it besides requests.
        active_when: when it is active; None for always.
        limits: its limits.
        replayable: a new version may handle recorded requests before it serves.
        redactor: removes secrets from its requests before they are stored; None when no plugin provides one.
    """

    name: str
    contract: AgentContract
    kind: Kind
    source: str
    sources: tuple[Source, ...] = ()
    active_when: Condition | None = None
    limits: Limits = DEFAULT_LIMITS
    replayable: bool = False
    redactor: Redactor | None = None

    @abstractmethod
    def encode(self, value: object) -> bytes:
        """A result or a chunk as JSON of the declared type.

        Raises:
            HandlerError: it has another type and cannot be converted.
        """

    @abstractmethod
    async def answer(self, request: RecordedRequest, timeout: float) -> bytes:
        """Run the handler for a recorded request, without middlewares and limits; returns the reply's body.

        Raises:
            MeshError: the input is invalid.
            BaseException: whatever the handler raises.
        """


@dataclass(slots=True, frozen=True)
class AppliedMiddleware:
    """The middleware of one plugin around an agent: its endpoint, which calls the next inner one."""

    plugin: str
    endpoint: Endpoint


@dataclass(slots=True, frozen=True, kw_only=True)
class AgentVersion(Agent):
    """One version of an agent, ready to serve; `middlewares` are those around it, outermost first."""

    handler: Handler
    endpoint: Endpoint
    middlewares: tuple[AppliedMiddleware, ...] = ()

    @property
    def file(self) -> Path:
        """The handler's file."""
        return Path(self.source.rpartition(":")[0])

    @property
    def is_request_only(self) -> bool:
        """Whether requests are all that triggers it, so that a new version needs nothing but a swap."""
        return self.contract.invocable and not self.sources and self.active_when is None

    def with_limits(self, limits: Limits) -> "AgentVersion":
        """The same agent with other limits."""
        return replace(self, limits=limits)

    def without_middlewares(self) -> "AgentVersion":
        """The same agent with no middlewares around its handler."""
        return replace(self, middlewares=())

    def with_middleware(self, plugin: str, middleware: Middleware) -> "AgentVersion":
        """The same agent with one more middleware around it; TypeError when that returns no endpoint."""
        endpoint = middleware(self.outermost)
        if not callable(endpoint):
            raise TypeError(f"its middleware returned {endpoint!r}, not an endpoint")
        applied = AppliedMiddleware(plugin, _as_function(endpoint))
        return replace(self, middlewares=(applied, *self.middlewares))

    @property
    def outermost(self) -> Endpoint:
        """The endpoint that a request enters."""
        return self.middlewares[0].endpoint if self.middlewares else self.run

    async def run(self, call: Call) -> Any:  # noqa: ANN401 - the handler's result
        """The endpoint within all middlewares: wait for a slot, check the verb and input, run the handler."""
        assert isinstance(call, ServedCall), "a middleware must pass on the call that it got"
        if call.is_admitted:
            return await self._run(call)
        if call.limiter.is_full:
            raise self.overloaded()
        call.limiter.admit()
        try:
            return await self._run(call)
        finally:
            call.limiter.release()

    async def _run(self, call: ServedCall) -> Any:  # noqa: ANN401 - the handler's result
        async with call.limiter:
            call.input = self._input(call)
            call.handler_started = monotonic()
            return await self.endpoint(call)

    def overloaded(self) -> Overloaded:
        """The error for a request above the limits."""
        return Overloaded(
            f"Agent '{self.name}' has {self.limits.concurrency} requests running and "
            f"{self.limits.queue} waiting. Try again later.",
            details={"retry_after_ms": _RETRY_AFTER_MS},
        )

    def failed_plugin(self, exc: BaseException) -> str:
        """The plugin whose middleware raised an error; empty when the error comes from further inside."""
        found, inner = "", list(self.middlewares)
        for frame, _ in traceback.walk_tb(exc.__traceback__):
            if frame.f_code is AgentVersion.run.__code__:
                return ""
            # Each entered middleware has a frame, so two with the same code are distinct.
            for index, applied in enumerate(inner):
                if applied.endpoint.__code__ is frame.f_code:
                    found, inner = applied.plugin, inner[index + 1 :]
                    break
        return found

    def encode(self, value: object) -> bytes:
        """As in the base class."""
        return self.handler.encode(value)

    async def answer(self, request: RecordedRequest, timeout: float) -> bytes:
        """As in the base class."""
        deadline = asyncio.get_running_loop().time() + timeout
        call = Call(
            self.name,
            request.request_id,
            request.body,
            request.headers,
            request.instance_id,
            subject=subjects.agent(self.name),
            identity=request.identity,
            deadline=deadline,
        )
        token = set_current_call(call)
        try:
            call.input = self.handler.decode(self.name, request.body)
            return self.encode(await self.endpoint(call))
        finally:
            reset_current_call(token)

    def _input(self, call: ServedCall) -> Any:  # noqa: ANN401 - of the author's type
        """Check the verb and decode the input."""
        match call.trigger:
            case Message() as message:
                return self._message(call, message)
            case Entry() as entry:
                return self._entry(entry)
        assert call.verb != "source", "a source has a trigger"
        self.contract.check_verb(call.verb)
        return self.handler.decode(self.name, call.body)

    def _message(self, call: ServedCall, message: Message) -> Any:  # noqa: ANN401 - of the author's type
        """A message of a subject source as the input."""
        handler, headers = self.handler, call.headers
        kind = headers.get(subjects.CONTENT_TYPE)
        is_json = kind == "application/json" or subjects.STREAM_SEQ in headers  # publishers emit JSON
        data = (handler.decode if is_json else handler.decode_plain)(self.name, message.body)
        return MeshMessage(message.subject, data, headers) if handler.envelope else data

    def _entry(self, entry: Entry) -> Any:  # noqa: ANN401 - of the author's type
        """A change of the shared state as the input; the value of a deletion is None."""
        data = None if entry.operation else self.handler.decode_plain(self.name, entry.value or b"")
        return KVEntry(entry.key, data, entry.revision or 0) if self.handler.envelope else data


def _as_function(endpoint: Endpoint) -> Endpoint:
    """An endpoint as a coroutine function, so that its frame is on the stack while it runs."""
    if isinstance(endpoint, FunctionType) and iscoroutinefunction(endpoint):
        return endpoint

    async def call_endpoint(call: Call) -> Any:  # noqa: ANN401 - the handler's result
        return await endpoint(call)

    return call_endpoint


def declare(  # noqa: PLR0913 - what `@mesh.agent` takes
    spec: AgentSpec,
    function: Callable[..., Any],
    types: TypeCache,
    *,
    sources: Sequence[Source] = (),
    active_when: Condition | None = None,
    mcp: dict[str, Any] | bool | None = None,
) -> AgentVersion:
    """An agent from a spec and a function.

    Raises:
        InvalidAgent: the name, the function, a source or the condition is invalid.
    """
    if not spec.description:
        spec = spec.model_copy(update={"description": (function.__doc__ or "").strip()})
    location = source_location(function)
    if problem := _problem_of_spec(spec, sources, active_when):
        raise InvalidAgent(f"Agent {spec.name!r} ({location}) is invalid: {problem}.", agent=spec.name)
    handler = inspect_handler(function, spec.name, types, sources, thread=spec.thread)
    return AgentVersion(
        name=spec.name,
        contract=_contract(spec, handler, mcp),
        kind=handler.kind,
        source=location,
        sources=tuple(sources),
        active_when=active_when,
        replayable=spec.replayable,
        handler=handler,
        endpoint=handler.endpoint(),
    )


def _problem_of_spec(spec: AgentSpec, sources: object, active_when: object) -> str | None:
    if problem := subjects.invalid_name(spec.name):
        return problem
    if not isinstance(sources, list | tuple):
        return f"sources= must be a list, not {sources!r}"
    if active_when is not None and not isinstance(active_when, KVCondition | SubjectCondition):
        return f"active_when= must come from mesh.kv_condition or mesh.subject_condition, not {active_when!r}"
    return None


def _contract(spec: AgentSpec, handler: Handler, mcp: dict[str, Any] | bool | None) -> AgentContract:  # noqa: FBT001 - the published signature
    invocable = handler.kind in {"responder", "streamer", "trigger"}
    streaming = handler.kind in {"streamer", "publisher"}
    output = handler.output.schema if handler.output else None
    return AgentContract.declare(
        spec,
        invocable=invocable,
        streaming=streaming,
        input_schema=handler.input.schema if invocable and handler.input else None,
        output_schema=None if streaming or not invocable else output,
        chunk_schema=output if streaming else None,
        mcp=mcp,
    )
