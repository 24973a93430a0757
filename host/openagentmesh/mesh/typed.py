"""Typed requests: `returns=Model`, and functions in the place of agents' names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.handler import PayloadType, TypeCache
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import InvalidInput, InvalidReply, validation_problems

_ATTRIBUTE: Final = "__openagentmesh__"


@dataclass(slots=True, frozen=True)
class AgentReference:
    """What a decorated function says about its agent: the name and the types."""

    name: str
    input: PayloadType | None
    output: PayloadType | None

    def encode(self, payload: object) -> bytes | None:
        """The payload as JSON of the agent's input type.

        Raises:
            InvalidInput: it has another type.
        """
        if self.input is None or payload is None:
            return None
        try:
            return self.input.encode(payload)
        except ValidationError as exc:
            problems = validation_problems(exc)
            raise InvalidInput(
                f"Input failed validation for agent '{self.name}'", details={"errors": problems}
            ) from exc


def set_reference(function: Callable[..., Any], agent: AgentVersion) -> None:
    """Let a decorated function stand for its agent, unless it is a bound method."""
    reference = AgentReference(agent.name, agent.handler.input, agent.handler.output)
    # On the function, not in a table: types refer to their module, which would then live for ever.
    try:
        setattr(function, _ATTRIBUTE, reference)
    except AttributeError:
        return


def get_reference(function: object) -> AgentReference:
    """The agent that a decorated function stands for.

    Raises:
        InvalidInput: it is not decorated.
    """
    reference = getattr(function, _ATTRIBUTE, None)
    if not isinstance(reference, AgentReference):
        raise InvalidInput(
            f"{function!r} is neither an agent's name nor a function decorated with @mesh.agent(…)."
        )
    return reference


def decode_untyped(body: bytes) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """The reply of a function without a return type; None when it returned None, which is sent as `{}`."""
    value = codec.decode(body)
    return None if value == {} else value


def decoder(returns: Any, types: TypeCache) -> Callable[[bytes], Any]:  # noqa: ANN401 - any annotation
    """A function that decodes replies, or chunks, of a type.

    Raises:
        PydanticUserError, NameError, TypeError: pydantic does not support the type.
    """
    return typed_decoder(types.get(returns))


def typed_decoder(expected: PayloadType) -> Callable[[bytes], Any]:
    """As `decoder`, for a type that was created before; its function raises InvalidReply."""

    def decode(body: bytes) -> Any:  # noqa: ANN401 - of the expected type
        adapter = expected.adapter
        try:
            return adapter.validate_json(body) if body else adapter.validate_python(None)
        except ValidationError as exc:
            problems = validation_problems(exc)
            raise InvalidReply(
                f"The reply does not match {expected.hint!r}: {problems[0]['msg']}",
                details={"errors": problems},
            ) from exc

    return decode
