"""Everything that can go wrong on the mesh, each with its code on the wire (protocol §8, §10)."""

from typing import Any, ClassVar, Final, Self

from pydantic import ValidationError
from pydantic_core import from_json

_MOST_SHOWN: Final = 16 * 1024
_MOST_PROBLEMS: Final = 100


def text_of(exc: BaseException) -> str:
    """An exception's own text, or its type's name when it has none."""
    try:
        return str(exc) or type(exc).__name__
    except Exception:  # noqa: BLE001 - an author's exception may fail even at this
        return f"{type(exc).__name__}: <exception str() failed>"


def problems_of(exc: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's list of what is wrong; exceptions in it become texts."""
    try:
        document = exc.json(include_url=False)
    except ValueError:  # the input itself cannot be shown, for it is no text
        document = exc.json(include_url=False, include_input=False)
    if len(document) > _MOST_SHOWN:  # large inputs would crowd out what is wrong with them
        document = exc.json(include_url=False, include_input=False)
    found: list[dict[str, Any]] = from_json(document)
    return found[:_MOST_PROBLEMS]


class MeshError(Exception):
    """The base of all errors of the mesh, and any error whose code is not known here.

    All have one constructor. A single text is the message and the class gives the code:
    `NotFound("Agent 'x' is not in the catalog")`; two are a code of your own and the message:
    `MeshError("quota_used_up", "Try again tomorrow")`.

    Attributes:
        code: the code on the wire.
        message: one readable sentence or two.
        agent: the agent it concerns; empty when there is none.
        request_id: the request it ended; empty when there is none.
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
        """Copies and pickles keep everything."""
        return type(self), (self.code, self.message, self.agent, self.request_id, self.details)

    def located(self, *, agent: str, request_id: str) -> "MeshError":
        """What is sent for this error: its code, in this request, of this agent unless it names one.

        A new object, for authors may raise one and the same error again and again.
        """
        return MeshError(self.code, self.message, self.agent or agent, request_id, self.details)

    @staticmethod
    def from_code(
        code: str, message: str, agent: str, request_id: str, details: dict[str, Any]
    ) -> "MeshError":
        """The error that a received envelope stands for; an unknown code is kept."""
        error = _BY_CODE.get(code, MeshError)
        return error(code, message, agent, request_id, details)

    def to_dict(self) -> dict[str, Any]:
        """The envelope (protocol §8)."""
        return {
            "code": self.code,
            "message": self.message,
            "agent": self.agent,
            "request_id": self.request_id,
            "details": self.details,
        }


class InvalidInput(MeshError):
    """The caller's input does not fit the agent, or cannot be sent at all."""

    code = "invalid_input"
    hint = "See what it takes: oam agent contract NAME"


class InvalidAgent(MeshError, TypeError):
    """A function or a spec cannot be an agent. Raised where it is declared, never sent."""

    code = "invalid_agent"


class PluginFailed(MeshError):
    """A plugin cannot be used, or failed in a hook. Raised here, never sent."""

    code = "plugin_failed"


class HandlerError(MeshError):
    """The handler raised something that is no MeshError."""

    code = "handler_error"
    hint = "The agent's own log has the traceback."


class InvocationMismatch(MeshError):
    """The agent cannot be used in this way."""

    code = "invocation_mismatch"


class NotFound(MeshError):
    """No such agent is in the catalog."""

    code = "not_found"
    hint = "See what there is: oam mesh catalog"


class NotAvailable(MeshError):
    """The agent is in the catalog, but nobody answers for it now."""

    code = "not_available"
    hint = "See who is there: oam status"


class MeshTimeout(MeshError):
    """No answer came in time."""

    code = "timeout"
    hint = "Give it longer with --timeout SECONDS, or see what the agent does: oam status"


class AgentDied(MeshError):
    """The last instance serving the agent went away; `details` is the death notice."""

    code = "agent_died"


class ChunkSequenceError(MeshError):
    """A chunk of a stream is missing; details `expected_seq`, `got_seq`."""

    code = "chunk_sequence_error"


class ConnectionFailed(MeshError):
    """There is no connection to a NATS server."""

    code = "connection_failed"
    hint = "Start a host with `oam up`, or say where one is with --url or OAM_URL."


class ConnectionDenied(MeshError):
    """The NATS server refuses the credentials."""

    code = "connection_denied"
    hint = "Give a credentials file: OAM_CREDS, or `oam mesh connect URL --creds FILE`."


class Overloaded(MeshError):
    """The agent has as many requests as it may; details `retry_after_ms`."""

    code = "overloaded"


class PayloadTooLarge(MeshError):
    """A message exceeds the server's limit; details `size` and `limit` in bytes."""

    code = "payload_too_large"


class Unauthenticated(MeshError):
    """The caller did not prove who it is."""

    code = "unauthenticated"


class PermissionDenied(MeshError):
    """The caller may not do this."""

    code = "permission_denied"


class KVKeyExists(MeshError):
    """The key to be created is there already."""

    code = "kv_key_exists"


class KVConflict(MeshError):
    """Somebody else changed the key between reading and writing; details `key`, `revision`."""

    code = "kv_conflict"


class Cancelled(MeshError):
    """The handler was stopped before it had answered, because its host stops."""

    code = "cancelled"


_BY_CODE: dict[str, type[MeshError]] = {
    error.code: error for error in MeshError.__subclasses__() if error is not InvalidAgent
}
