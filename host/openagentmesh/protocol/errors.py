"""Every error of the mesh, each with its code on the wire (protocol §8, §10)."""

from typing import Any, ClassVar, Final, Self

from pydantic import ValidationError
from pydantic_core import from_json

_MAX_PROBLEMS_TEXT: Final = 16 * 1024
_MAX_PROBLEMS: Final = 100


def valid_text(text: str) -> str:
    """A text without lone surrogates, which JSON cannot contain."""
    return text.encode("utf-8", "replace").decode()


def error_text(exc: BaseException) -> str:
    """The exception's message as valid Unicode, or the name of its type when the message is empty."""
    try:
        return valid_text(str(exc)) or type(exc).__name__
    except Exception:  # noqa: BLE001 - an author's `__str__` may raise anything
        return f"{type(exc).__name__}: <exception str() failed>"


def validation_problems(exc: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's list of problems as JSON values; exceptions in it become text."""
    try:
        document = exc.json(include_url=False)
    except ValueError:  # the input is not valid Unicode
        document = exc.json(include_url=False, include_input=False)
    if len(document) > _MAX_PROBLEMS_TEXT:  # a large input would hide the problems
        document = exc.json(include_url=False, include_input=False)
    problems: list[dict[str, Any]] = from_json(document)
    return problems[:_MAX_PROBLEMS]


class MeshError(Exception):
    """Base of all errors of the mesh, and the class of errors with an unknown code.

    All subclasses share one constructor. One text is the message, and the class supplies the
    code: `NotFound("Agent 'x' is not in the catalog")`. Two texts are a code of your own and the
    message: `MeshError("quota_used_up", "Try again tomorrow")`.

    Attributes:
        code: the code on the wire.
        message: one or two readable sentences.
        agent: the agent concerned; empty when there is none.
        request_id: the request that failed; empty when there is none.
        details: facts for programs, JSON.
    """

    code: str = "mesh_error"
    hint: ClassVar[str] = ""

    def __init__(
        self,
        code: str = "",
        message: str | None = None,
        agent: str = "",
        request_id: str = "",
        details: dict[str, Any] | None = None,
    ) -> None:
        self.code = code if message is not None and code else type(self).code
        self.message = message if message is not None else code
        self.agent = agent
        self.request_id = request_id
        self.details = details or {}
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        """Copy and pickle all attributes."""
        return type(self), (self.code, self.message, self.agent, self.request_id, self.details)

    def for_request(self, *, agent: str, request_id: str) -> "MeshError":
        """A copy for one request, since authors may raise one object twice; its own agent is kept."""
        return MeshError(self.code, self.message, self.agent or agent, request_id, self.details)

    @staticmethod
    def from_code(
        code: str, message: str, agent: str, request_id: str, details: dict[str, Any]
    ) -> "MeshError":
        """The error of the class for `code`; a MeshError with that code when it is unknown."""
        return _BY_CODE.get(code, MeshError)(code, message, agent, request_id, details)

    def to_dict(self) -> dict[str, Any]:
        """The error envelope (protocol §8)."""
        return {
            "code": self.code,
            "message": self.message,
            "agent": self.agent,
            "request_id": self.request_id,
            "details": self.details,
        }


class InvalidInput(MeshError):
    """The input does not match the agent's input type, or cannot be sent."""

    code = "invalid_input"
    hint = "Show the agent's input type: oam agent contract NAME"


class InvalidAgent(MeshError, TypeError):
    """A function or spec cannot be an agent. Raised where it is declared, never sent."""

    code = "invalid_agent"


class PluginFailed(MeshError):
    """A plugin cannot be used, or one of its hooks failed."""

    code = "plugin_failed"


class InvalidReply(MeshError):
    """A reply does not match the type that the caller expects. Raised by the caller, not by the agent."""

    code = "invalid_reply"
    hint = "Show the agent's output type: oam agent contract NAME"


class HandlerError(MeshError):
    """The handler raised an exception other than MeshError."""

    code = "handler_error"
    hint = "The log of the agent's process has the traceback."


class InvocationMismatch(MeshError):
    """The agent does not support this verb."""

    code = "invocation_mismatch"


class NotFound(MeshError):
    """The agent is not in the catalog."""

    code = "not_found"
    hint = "List the agents: oam mesh catalog"


class NotAvailable(MeshError):
    """The agent is in the catalog, but no instance serves it now."""

    code = "not_available"
    hint = "List the hosts and their agents: oam status"


class MeshTimeout(MeshError):
    """No answer arrived in time."""

    code = "timeout"
    hint = "Raise --timeout SECONDS, or check the agent: oam status"


class AgentDied(MeshError):
    """The last instance serving the agent is gone; `details` is the death notice."""

    code = "agent_died"


class ChunkSequenceError(MeshError):
    """A chunk of a stream is missing; details `expected_seq`, `got_seq`."""

    code = "chunk_sequence_error"


class ConnectionFailed(MeshError):
    """There is no connection to a NATS server."""

    code = "connection_failed"
    hint = "Start a host with `oam up`, or give the address of a server with --url or OAM_URL."


class ConnectionDenied(MeshError):
    """The NATS server rejects the credentials."""

    code = "connection_denied"
    hint = "Give a credentials file: OAM_CREDS, or `oam mesh connect URL --creds FILE`."


class Overloaded(MeshError):
    """The agent is at its limit of requests; details `retry_after_ms`."""

    code = "overloaded"


class PayloadTooLarge(MeshError):
    """A message exceeds the server's limit; details `size` and `limit` in bytes."""

    code = "payload_too_large"


class Unauthenticated(MeshError):
    """The caller's identity is not proven."""

    code = "unauthenticated"


class PermissionDenied(MeshError):
    """The caller does not have permission."""

    code = "permission_denied"


class KVKeyExists(MeshError):
    """The key to be created exists already."""

    code = "kv_key_exists"


class KVConflict(MeshError):
    """The key changed between reading and writing; details `key`, `revision`."""

    code = "kv_conflict"


class Cancelled(MeshError):
    """The handler was cancelled before it answered, because its host stops."""

    code = "cancelled"


_BY_CODE: dict[str, type[MeshError]] = {
    error.code: error for error in MeshError.__subclasses__() if error is not InvalidAgent
}
