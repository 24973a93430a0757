"""An agent: name, handler, types and limits in one object."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import iscoroutinefunction
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from openagentmesh.agent.call import Call, Endpoint, Middleware
from openagentmesh.agent.concurrency import Slots
from openagentmesh.agent.handler import Handler, Types, inspect_handler, where
from openagentmesh.agent.sources import (
    Condition,
    KVCondition,
    KVSource,
    Source,
    SubjectCondition,
    SubjectSource,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import AgentContract, AgentSpec
from openagentmesh.protocol.errors import InvalidAgent, Overloaded
from openagentmesh.protocol.messages import KVEntry, MeshMessage
from openagentmesh.transport.kv_watch import Entry

# What an overloaded agent tells its callers to wait.
_RETRY_AFTER_MS: Final = 250


@dataclass(slots=True, frozen=True)
class Limits:
    """What one agent may take.

    Attributes:
        concurrency: requests running at once.
        queue: requests that may wait for their turn; one more is refused as `overloaded`.
        timeout: seconds a request may take, waiting included; for a stream, until its next chunk.
        restart_pause: seconds until a publisher or watcher that failed is started again; twice
            as long each time that it fails again.
        restart_pause_max: the longest such pause, in seconds.

    """

    concurrency: int = 128
    queue: int = 256
    timeout: float = 60.0
    restart_pause: float = 0.5
    restart_pause_max: float = 60.0

    def slots(self) -> Slots:
        """Room for as many requests as may run and wait."""
        return Slots(self.concurrency, self.queue)


DEFAULT_LIMITS: Final = Limits()


@dataclass(slots=True, frozen=True)
class Layer:
    """What one plugin has put around an agent: its endpoint, which leads to those below."""

    plugin: str
    endpoint: Endpoint


@dataclass(slots=True, frozen=True)
class Agent:
    """One version of an agent, ready to serve."""

    name: str
    contract: AgentContract
    handler: Handler
    endpoint: Endpoint
    sources: tuple[Source, ...] = ()
    active_when: Condition | None = None
    limits: Limits = DEFAULT_LIMITS
    replayable: bool = False
    layers: tuple[Layer, ...] = ()

    @property
    def source(self) -> str:
        """File and line of the handler."""
        return where(self.handler.function)

    @property
    def file(self) -> Path:
        """The handler's file."""
        return Path(self.source.rpartition(":")[0])

    def limited(self, limits: Limits) -> "Agent":
        """The same agent within other limits."""
        return replace(self, limits=limits)

    @property
    def bare(self) -> "Agent":
        """The same agent with nothing around its handler."""
        return replace(self, layers=(), endpoint=self.handler.endpoint())

    def within(self, plugin: str, middleware: Middleware) -> "Agent":
        """The same agent with one more middleware around it.

        Raises:
            TypeError: the middleware gives no endpoint.

        """
        endpoint = middleware(self.outermost)
        if not callable(endpoint):
            raise TypeError(f"its middleware gave {endpoint!r}, not an endpoint")
        return replace(self, layers=(Layer(plugin, _as_function(endpoint)), *self.layers))

    @property
    def outermost(self) -> Endpoint:
        """Where a request enters."""
        return self.layers[0].endpoint if self.layers else self.enter

    async def enter(self, call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
        """The innermost endpoint: wait for a turn, read the input, run the handler.

        Raises:
            Overloaded: too many wait already.
            InvocationMismatch: a call of a streamer, or a stream of something else.
            InvalidInput: the body is not what the handler takes.

        """
        if call.slots.full and not call.in_turn:
            raise self.overloaded()
        async with call.slots:
            call.read()
            return await self.endpoint(call)

    def overloaded(self) -> Overloaded:
        """What a caller is told for whom there is no room."""
        return Overloaded(
            f"Agent '{self.name}' has {self.limits.concurrency} requests running and "
            f"{self.limits.queue} waiting. Try again later.",
            details={"retry_after_ms": _RETRY_AFTER_MS},
        )

    def patience(self, request: Request) -> float:
        """Seconds that this request may take: the agent's limit or what its caller waits."""
        own = self.limits.timeout
        return own if request.timeout is None else min(own, request.timeout)

    def plugin_that_raised(self, exc: BaseException) -> str:
        """The plugin whose middleware an error comes from; empty when it comes from further in."""
        found, below = "", list(self.layers)
        for frame, _ in traceback.walk_tb(exc.__traceback__):
            if frame.f_code is Agent.enter.__code__:
                return ""
            # Each that the request has entered has a frame; so two of the same code are told apart, too.
            if at := [i for i, layer in enumerate(below) if layer.endpoint.__code__ is frame.f_code]:
                found, below = below[at[0]].plugin, below[at[0] + 1 :]
        return found

    def accept(self, call: Call) -> None:
        """Check the verb and read the input.

        Raises:
            InvocationMismatch: a call of a streamer, or a stream of something else.
            InvalidInput: the body is not what the handler takes.

        """
        assert call.verb != "source", "a source reads its own"
        self.contract.check_verb(call.verb)
        call.input = self.handler.read(self.name, call.request.body)

    def accept_message(self, call: Call, subject: str) -> None:
        """Read a message of a subject source as the input.

        Raises:
            InvalidInput: its body is not what the handler takes.

        """
        handler, request = self.handler, call.request
        kind, headers = request.headers.get(subjects.CONTENT_TYPE), request.headers
        is_json = kind == "application/json" or subjects.STREAM_SEQ in headers  # as publishers emit
        data = (handler.read if is_json else handler.read_plain)(self.name, request.body)
        call.input = MeshMessage(subject, data, call.headers) if handler.envelope else data

    def accept_entry(self, call: Call, entry: Entry) -> None:
        """Read a change of the shared state as the input; the value of a deletion is None.

        Raises:
            InvalidInput: its value is not what the handler takes.

        """
        data = None if entry.operation else self.handler.read_plain(self.name, call.request.body)
        call.input = KVEntry(entry.key, data, entry.revision or 0) if self.handler.envelope else data

    def dump(self, value: object) -> bytes:
        """A result or a chunk as JSON of the declared type."""
        return self.handler.dump(value)


def _as_function(endpoint: Endpoint) -> Endpoint:
    """An endpoint as a coroutine function, whatever it is: while it runs, its frame is on the stack."""
    if isinstance(endpoint, FunctionType) and iscoroutinefunction(endpoint):
        return endpoint

    async def layer(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
        return await endpoint(call)

    return layer


def declare(  # noqa: PLR0913 - what `@mesh.agent` takes
    spec: AgentSpec,
    function: Callable[..., Any],
    types: Types,
    *,
    sources: Sequence[Source] = (),
    active_when: Condition | None = None,
    mcp: dict[str, Any] | bool | None = None,
) -> Agent:
    """Make an agent of a spec and a function.

    Raises:
        InvalidAgent: the name or the function cannot be used, in words for the author.

    """
    if why := subjects.invalid_name(spec.name):
        raise InvalidAgent(
            f"Agent name {spec.name!r} ({where(function)}) cannot be used: {why}.", agent=spec.name
        )
    if not spec.description:
        spec = spec.model_copy(update={"description": (function.__doc__ or "").strip()})
    if not isinstance(sources, list | tuple):
        raise InvalidAgent(
            f"sources= of agent '{spec.name}' ({where(function)}) is a list; this is {sources!r}.",
            agent=spec.name,
        )
    if active_when is not None and not isinstance(active_when, KVCondition | SubjectCondition):
        raise InvalidAgent(
            f"active_when= of agent '{spec.name}' ({where(function)}) is made by mesh.kv_condition or "
            f"mesh.subject_condition; this is {active_when!r}.",
            agent=spec.name,
        )
    handler = inspect_handler(function, spec.name, types, driven=bool(sources), thread=spec.thread)
    for source in sources:
        wanted = {"entry": KVSource, "message": SubjectSource, "": SubjectSource | KVSource}[handler.envelope]
        if not isinstance(source, wanted):
            raise InvalidAgent(
                f"The handler of agent '{spec.name}' ({where(function)}) takes {handler.envelope or 'data'} "
                f"and cannot be driven by {source!r}.",
                agent=spec.name,
            )
    invocable = handler.shape in {"responder", "streamer", "trigger"}
    streaming = handler.shape in {"streamer", "publisher"}
    output = handler.output.schema if handler.output else None
    contract = AgentContract.declare(
        spec,
        invocable=invocable,
        streaming=streaming,
        input_schema=handler.input.schema if invocable and handler.input else None,
        output_schema=None if streaming or not invocable else output,
        chunk_schema=output if streaming else None,
        mcp=mcp,
    )
    endpoint = handler.endpoint()
    return Agent(
        spec.name, contract, handler, endpoint, tuple(sources), active_when, replayable=spec.replayable
    )
