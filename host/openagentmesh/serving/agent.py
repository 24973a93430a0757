"""An agent: name, handler, types and limits in one object."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from openagentmesh.protocol import subjects
from openagentmesh.protocol.codec import Request
from openagentmesh.protocol.contract import AgentContract, AgentSpec
from openagentmesh.protocol.errors import InvalidAgent
from openagentmesh.serving.call import Call, Endpoint
from openagentmesh.serving.handler import Handler, Types, inspect_handler, where


@dataclass(slots=True, frozen=True)
class Limits:
    """What one agent may take.

    Attributes:
        concurrency: requests running at once.
        queue: requests that may wait for their turn; one more is refused as `overloaded`.
        timeout: seconds a request may take, waiting included; for a stream, until its next chunk.

    """

    concurrency: int = 128
    queue: int = 256
    timeout: float = 60.0


DEFAULT_LIMITS: Final = Limits()


@dataclass(slots=True, frozen=True)
class Agent:
    """One version of an agent, ready to serve."""

    name: str
    contract: AgentContract
    handler: Handler
    endpoint: Endpoint
    limits: Limits = DEFAULT_LIMITS

    @property
    def source(self) -> str:
        """File and line of the handler."""
        return where(self.handler.function)

    def limited(self, limits: Limits) -> "Agent":
        """The same agent within other limits."""
        return replace(self, limits=limits)

    def patience(self, request: Request) -> float:
        """Seconds that this request may take: the agent's limit or what its caller waits."""
        own = self.limits.timeout
        return own if request.timeout is None else min(own, request.timeout)

    def accept(self, call: Call) -> None:
        """Check the verb and read the input.

        Raises:
            InvocationMismatch: a call of a streamer, or a stream of something else.
            InvalidInput: the body is not what the handler takes.

        """
        self.contract.check_verb("stream" if call.request.streaming else "call")
        call.input = self.handler.read(self.name, call.request.body)

    def dump(self, value: object) -> bytes:
        """A result or a chunk as JSON of the declared type."""
        return self.handler.dump(value)


def declare(spec: AgentSpec, function: Callable[..., Any], types: Types) -> Agent:
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
    handler = inspect_handler(function, spec.name, types)
    streaming = handler.shape == "streamer"
    output = handler.output.schema if handler.output else None
    contract = AgentContract.of(
        spec,
        invocable=True,
        streaming=streaming,
        input_schema=handler.input.schema if handler.input else None,
        output_schema=None if streaming else output,
        chunk_schema=output if streaming else None,
    )
    return Agent(spec.name, contract, handler, handler.endpoint())
