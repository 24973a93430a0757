"""The status of a node or a host: what `oam status`, metrics and other tools read (protocol §10).

Unknown keys are ignored and most missing ones have defaults, so that hosts of other versions can be read.
"""

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from openagentmesh.protocol.errors import valid_text
from openagentmesh.protocol.subjects import is_name

# Errors and file names may contain what is not valid Unicode.
Text = Annotated[str, AfterValidator(valid_text)]


class _Status(BaseModel):
    model_config = ConfigDict(frozen=True)


class HistoryEvent(_Status):
    """A past event, `at` in UTC."""

    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    what: Text


class BackgroundStatus(_Status):
    """A publisher or watcher: `state` is running, waiting (to be restarted), done or stopped."""

    state: Text
    restarts: int = 0
    error: Text = ""
    next_start: datetime | None = None


class AgentStatus(_Status):
    """One agent of a node, with the number of its requests since `since`.

    Attributes:
        source: file and line of its handler.
        in_flight: requests being answered, those waiting for a slot included.
        errors: requests answered with an error; `overloaded`: those with that code.
        seconds: the sum of the requests' durations.
        last_error: code and message of the last error, shortened.
        since: when counting began, in seconds since 1970.
        active: false while its condition is false.
        background: only of a publisher or watcher.
    """

    name: Text
    version: Text = ""
    kind: Text = ""
    source: Text = ""
    in_flight: int = 0
    waiting: int = 0
    requests: int = 0
    errors: int = 0
    overloaded: int = 0
    seconds: float = 0.0
    last_error: Text = ""
    since: float = 0.0
    limits: dict[Text, int | float] = Field(default_factory=dict)
    active: bool = True
    background: BackgroundStatus | None = None


class ThreadPoolStatus(_Status):
    """The threads of blocking handlers; abandoned ones run though their requests have ended."""

    max: int = 0
    busy: int = 0
    waiting: int = 0
    abandoned: int = 0


class ConnectionStatus(_Status):
    """The connection: `server` is the version of the NATS server."""

    url: Text = ""
    server: Text | None = None
    connected: bool = False
    reconnects: int = 0
    history: list[HistoryEvent] = Field(default_factory=list)


class NodeStatus(_Status):
    """One participant of the mesh.

    Attributes:
        started_at: in seconds since 1970.
        agents: the agents that it serves, or as many of them as fit into one message.
        refused: agents that are not served because of their contracts, with the reason.
    """

    instance_id: Text
    started_at: float = 0.0
    agent_count: int = 0
    agents: list[AgentStatus] = Field(default_factory=list)
    refused: dict[Text, Text] = Field(default_factory=dict)
    threads: ThreadPoolStatus = ThreadPoolStatus()
    connection: ConnectionStatus = ConnectionStatus()


class ModuleStatus(_Status):
    """One module of a host: `state` is serving, failed, or outdated: an older version serves."""

    origin: Text
    state: Text = "serving"
    agents: int = 0
    error: Text = ""
    line: Text = ""
    traceback: Text = ""


class ReloadStatus(_Status):
    """One reload, as `ReloadResult` describes it; `text` is the line for a terminal."""

    text: Text = ""
    error: Text = ""
    details: Text = ""
    line: Text = ""
    notes: list[Text] = Field(default_factory=list)
    files: list[Text] = Field(default_factory=list)
    agents: list[Text] = Field(default_factory=list)
    names: list[Text] = Field(default_factory=list)
    took_ms: float = 0.0
    in_flight: int = 0
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class ServerStatus(_Status):
    """The embedded NATS server of a host."""

    url: Text = ""
    pid: int = 0
    starts: int = 0
    websocket: Text = ""
    history: list[HistoryEvent] = Field(default_factory=list)


class HostStatus(NodeStatus):
    """A host: a node with modules."""

    host: Text = ""
    pid: int = 0
    version: Text = ""
    modules: list[ModuleStatus] = Field(default_factory=list)
    reloads: list[ReloadStatus] = Field(default_factory=list)
    embedded_server: ServerStatus | None = None


class ReloadReply(_Status):
    """A host's answer to `oam reload`; without `error` and `reload` nothing has changed."""

    host: Text = ""
    error: Text = ""
    reload: ReloadStatus | None = None
    not_loaded: list[Text] = Field(default_factory=list)


class InstanceRecord(_Status):
    """A record of the bucket `mesh-instances` (protocol §3); peers write `agents` alone."""

    agents: list[str]
    host: str = ""
    pid: int = 0
    version: str = ""
    answers_pings: bool = False

    @field_validator("agents", mode="before")
    @classmethod
    def _names_only(cls, agents: Any) -> Any:  # noqa: ANN401 - validated afterwards
        # Names become parts of subjects and keys, and records are not trusted.
        return [name for name in agents if is_name(name)] if isinstance(agents, list) else agents

    @field_validator("host", "pid", "version", "answers_pings", mode="wrap")
    @classmethod
    def _or_default(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:  # noqa: ANN401 - of the field's type
        """The default for an invalid value: peers may use these keys for something else."""
        try:
            return validate(value)
        except ValidationError:
            return cls.model_fields[info.field_name or ""].default
