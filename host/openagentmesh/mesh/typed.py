"""Typed requests: `returns=Model`, and decorated functions instead of agents' names."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.handler import PayloadType
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import InvalidInput, InvalidReply, validation_problems

_ATTRIBUTE: Final = "__openagentmesh__"


@dataclass(slots=True, frozen=True)
class AgentReference:
    """The agent that a decorated function stands for: its name and its types."""

    name: str
    input: PayloadType | None
    output: PayloadType | None

    def encode(self, payload: object) -> bytes | None:
        """The payload as JSON of the agent's input type; InvalidInput for a payload of another type."""
        if self.input is None or payload is None:
            return None
        try:
            return self.input.encode(payload)
        except ValueError as exc:
            problems = validation_problems(exc) if isinstance(exc, ValidationError) else [{"msg": str(exc)}]
            message = f"Input failed validation for agent '{self.name}'"
            raise InvalidInput(message, agent=self.name, details={"errors": problems}) from exc


def set_reference(function: Callable[..., Any], agent: AgentVersion) -> None:
    """Let a decorated function stand for its agent, unless it is a method, or the handler of several."""
    reference = AgentReference(agent.name, agent.handler.input, agent.handler.output)
    if getattr(function, _ATTRIBUTE, reference).name != agent.name:
        reference = AgentReference("", None, None)
    # On the function, not in a table: types refer to their module, which would then live for ever.
    with suppress(AttributeError):
        setattr(function, _ATTRIBUTE, reference)


def get_reference(function: object) -> AgentReference:
    """The agent that a function stands for; InvalidInput if it is not decorated."""
    reference = getattr(function, _ATTRIBUTE, None)
    if not isinstance(reference, AgentReference):
        raise InvalidInput(
            f"{function!r} is neither an agent's name nor a function decorated with @mesh.agent(…). "
            "Methods are called by their agent's name."
        )
    if not reference.name:
        raise InvalidInput(f"{function!r} is the handler of several agents. Call the agent by its name.")
    return reference


def decode_untyped(body: bytes) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """The reply of a function without a return type; None when it returned None, which is sent as `{}`."""
    value = codec.decode(body)
    return None if value == {} else value


def decoder(expected: PayloadType) -> Callable[[bytes], Any]:
    """A function that decodes replies, or chunks, of a type; it raises InvalidReply for another one."""

    def decode(body: bytes) -> Any:  # noqa: ANN401 - of the expected type
        try:
            if not body or (body == codec.NO_RESULT and expected.accepts_none):
                return expected.adapter.validate_python(None)
            return expected.adapter.validate_json(body)
        except ValidationError as exc:
            problems = validation_problems(exc)
            raise InvalidReply(
                f"The reply does not match {expected.hint!r}: {problems[0]['msg']}",
                details={"errors": problems},
            ) from exc

    return decode
