"""Specs, contracts and catalog entries of agents (protocol §3–§5, §7)."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json, to_json

from openagentmesh.protocol import subjects, tools
from openagentmesh.protocol.errors import InvocationMismatch, MeshError

Verb = Literal["call", "stream", "send", "subscribe"]

_PARTICIPLES: Final = {"call": "called", "stream": "streamed", "send": "sent to"}
_MISMATCHES: Final[dict[tuple[Verb, bool, bool], str]] = {
    ("call", True, True): "is streaming-only. Use stream() instead",
    ("stream", True, False): "does not support streaming. Use call() instead",
    ("subscribe", True, True): "streams responses to requests. Use stream() instead",
    ("subscribe", True, False): "does not publish events. Use call() instead",
    ("subscribe", False, False): "is a background task and does not publish events",
}


def _mismatch(verb: Verb, *, invocable: bool, streaming: bool) -> str | None:
    if verb in _PARTICIPLES and not invocable:
        what = "publisher" if streaming else "background task"
        instead = ". Subscribe to its events instead" if streaming else ""
        return f"is a {what} and cannot be {_PARTICIPLES[verb]}{instead}"
    return _MISMATCHES.get((verb, invocable, streaming))


class AgentSpec(BaseModel):
    """An agent as its author declares it.

    Attributes:
        name: its name, unique on the mesh.
        description: what it does; the handler's docstring when empty.
        tags: labels to filter the catalog by.
        version: its version, any text.
        idempotent: handling a request twice has the same effect as once, so callers may retry.
        replayable: recorded requests may be handled again by a new version before it serves.
        thread: the handler must be a `def`, which runs in a thread.
    """

    name: str
    description: str = ""
    tags: list[str] = Field(default_factory=list)
    version: str = "0.1.0"
    idempotent: bool = False
    replayable: bool = False
    thread: bool = False


class CatalogEntry(BaseModel):
    """One entry of the catalog."""

    name: str
    description: str = ""
    version: str = "0.1.0"
    tags: list[str] = Field(default_factory=list)
    invocable: bool = True
    streaming: bool = False


class AgentContract(BaseModel):
    """An agent's published form (protocol §4).

    Schemas are JSON Schema; None where the agent has no input, output or chunk.
    """

    name: str
    description: str = ""
    version: str = "0.1.0"
    capabilities: dict[str, Any] = Field(default_factory=dict)
    skills: list[dict[str, Any]] = Field(default_factory=list)
    subject: str = ""
    tags: list[str] = Field(default_factory=list)
    invocable: bool = True
    streaming: bool = False
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    chunk_schema: dict[str, Any] | None = None
    mcp: dict[str, Any] | bool | None = None
    idempotent: bool = False
    registered_at: datetime

    @classmethod
    def declare(  # noqa: PLR0913 - one parameter per part of the contract
        cls,
        spec: AgentSpec,
        *,
        invocable: bool,
        streaming: bool,
        input_schema: dict[str, Any] | None,
        output_schema: dict[str, Any] | None,
        chunk_schema: dict[str, Any] | None,
        mcp: dict[str, Any] | bool | None = None,
    ) -> Self:
        """The contract of an agent that is declared now."""
        skill = {
            "id": spec.name,
            "name": spec.name,
            "description": spec.description,
            "tags": spec.tags,
            "inputSchema": input_schema,
            "outputSchema": output_schema,
        }
        # All values have the right types already; validating 10,000 contracts costs a second.
        return cls.model_construct(
            name=spec.name,
            description=spec.description,
            version=spec.version,
            capabilities={"streaming": streaming, "invocable": invocable},
            skills=[{key: value for key, value in skill.items() if value is not None}],
            subject=subjects.agent(spec.name),
            tags=spec.tags,
            invocable=invocable,
            streaming=streaming,
            input_schema=input_schema,
            output_schema=output_schema,
            chunk_schema=chunk_schema,
            mcp=mcp,
            idempotent=spec.idempotent,
            registered_at=datetime.now(UTC),
        )

    @classmethod
    def from_document(cls, document: bytes) -> Self:
        """A contract from its published document; unknown keys are ignored.

        Raises:
            MeshError: the document is malformed.
        """
        try:
            found = from_json(document)
            own = found.get("x-agentmesh") or {}
            capabilities = found.get("capabilities") or {}
            skills = found.get("skills") or []
            skill = skills[0] if skills else {}
            return cls(
                name=found["name"],
                description=found.get("description") or "",
                version=found.get("version") or "0.1.0",
                capabilities=capabilities,
                skills=skills,
                subject=own.get("subject") or subjects.agent(found["name"]),
                tags=own.get("tags") or skill.get("tags") or [],
                invocable=capabilities.get("invocable", True),
                streaming=capabilities.get("streaming", False),
                input_schema=skill.get("inputSchema"),
                output_schema=skill.get("outputSchema"),
                chunk_schema=own.get("chunk_schema"),
                mcp=own.get("mcp"),
                idempotent=own.get("idempotent") is True,
                registered_at=own.get("registered_at") or datetime.fromtimestamp(0, UTC),
            )
        except (ValueError, AttributeError, LookupError, TypeError) as exc:
            raise MeshError(
                f"A peer published a malformed contract ({type(exc).__name__}: {exc}): {document[:120]!r}"
            ) from exc

    def to_document(self) -> dict[str, Any]:
        """The document that is published (protocol §4)."""
        own = {
            "subject": self.subject,
            "tags": self.tags,
            "registered_at": self.registered_at.isoformat(),
            "chunk_schema": self.chunk_schema,
            "mcp": self.mcp,
            "idempotent": self.idempotent or None,
        }
        return {
            "name": self.name,
            "description": self.description,
            "version": self.version,
            "capabilities": self.capabilities,
            "skills": self.skills,
            "x-agentmesh": {key: value for key, value in own.items() if value is not None},
        }

    def equals(self, other: "AgentContract") -> bool:
        """Whether both are equal apart from `registered_at`."""
        return self == other.model_copy(update={"registered_at": self.registered_at})

    def to_registry_json(self) -> str:
        """The published document as JSON."""
        return to_json(self.to_document(), inf_nan_mode="null").decode()

    def to_catalog_entry(self) -> CatalogEntry:
        """The contract's entry in the catalog."""
        return CatalogEntry.model_validate(self, from_attributes=True)

    def to_tool_schema(self) -> dict[str, Any]:
        """The agent as a tool: `{name, description, input_schema}`; the schema is always an object's.

        Input that is not an object is wrapped as `{"value": …}`; `tool_input` unwraps it.

        Raises:
            ValueError: the agent is not invocable, or its name cannot be a tool's name.
        """
        if not self.invocable:
            mismatch = _mismatch("call", invocable=False, streaming=self.streaming)
            raise ValueError(f"Agent '{self.name}' cannot be a tool: it {mismatch}")
        return tools.tool(self.name, self.description, self.input_schema, self.output_schema)

    def to_openai_tool(
        self, *, api: Literal["chat", "responses"] = "chat", strict: bool = False
    ) -> dict[str, Any]:
        """The agent as a tool for OpenAI's chat completions or responses API.

        With `strict` the API enforces the schema. Optional fields then accept null, which `tool_input`
        removes.

        Raises:
            ValueError: as `to_tool_schema`; an unknown API; or input that strict mode cannot express.
        """
        return tools.openai_tool(self.to_tool_schema(), api=api, strict=strict)

    def to_anthropic_tool(self) -> dict[str, Any]:
        """The agent as a tool for Anthropic's messages API.

        Raises:
            ValueError: as `to_tool_schema`.
        """
        return self.to_tool_schema()

    def tool_input(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
        """The payload for the agent, from the arguments of a model's tool call."""
        return tools.tool_input(self.input_schema, arguments)

    def to_agent_card(self, url: str | None = None) -> dict[str, Any]:
        """The agent's A2A card; `url` is where it can be reached."""
        return tools.agent_card(self.to_document(), url)

    def check_verb(self, verb: Verb) -> None:
        """Check that the agent supports a verb (protocol §7).

        Raises:
            InvocationMismatch: it does not; the message names the verb to use instead.
        """
        suffix = _mismatch(verb, invocable=self.invocable, streaming=self.streaming)
        if suffix:
            raise InvocationMismatch(f"Agent '{self.name}' {suffix}", agent=self.name)


def decode_catalog(document: bytes | None) -> list[CatalogEntry]:
    """The entries in the value of the catalog's key; malformed ones are left out."""
    entries = list[CatalogEntry]()
    for found in catalog_objects(document):
        with suppress(ValidationError):
            entries.append(CatalogEntry.model_validate(found))
    return entries


def catalog_objects(document: bytes | None) -> list[dict[str, Any]]:
    """The JSON objects in the value of the catalog's key, with unknown keys."""
    try:
        found = from_json(document or b"[]")
    except ValueError:
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def encode_catalog(entries: list[dict[str, Any]]) -> bytes:
    """The value of the catalog's key for these entries."""
    return to_json(entries, inf_nan_mode="null")
