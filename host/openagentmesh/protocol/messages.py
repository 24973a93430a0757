"""Messages other than requests and replies (protocol §5, §6, §9)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from openagentmesh.protocol.subjects import publisher_of

T = TypeVar("T")
LogLevel = Literal["debug", "info", "warn", "error"]
LOG_LEVELS: Final[tuple[LogLevel, ...]] = ("debug", "info", "warn", "error")


class DeathNotice(BaseModel):
    """The last instance serving an agent is gone; `detected_at` is ISO 8601 with an offset."""

    agent: str
    reason: Literal["disconnect", "graceful_shutdown"]
    detected_at: str
    instance_id: str


class LogEvent(BaseModel):
    """An event of an agent or of one of its requests.

    `timestamp` is ISO 8601 with an offset; `data` holds facts for programs.
    """

    timestamp: str
    level: LogLevel
    agent: str
    event: str
    request_id: str = ""
    message: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class ObserveConfig(BaseModel):
    """The lowest level of an agent's log events that is published."""

    log_level: LogLevel = "info"


class Usage(BaseModel):
    """What a request cost: tokens, the model, and an estimate in US dollars."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    model: str | None = None
    estimated_cost_usd: float | None = None

    def plus(self, other: "Usage") -> "Usage":
        """The sum of both; the model is the other's if it has one."""
        one, two = self.model_dump(exclude_none=True), other.model_dump(exclude_none=True)
        sums = {key: one[key] + two[key] for key in one.keys() & two.keys() - {"model"}}
        return Usage.model_validate({**one, **two, **sums, "model": other.model or self.model})


@dataclass(slots=True, frozen=True)
class KVEntry(Generic[T]):
    """One key of the shared state at one revision.

    A handler that takes `KVEntry[Model | None]` also receives deletions, with the value None.
    """

    key: str
    value: T
    revision: int


@dataclass(slots=True, frozen=True)
class MeshMessage(Generic[T]):
    """One message: its subject, its data and its headers."""

    subject: str
    data: T
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def agent(self) -> str:
        """The publisher that emitted it; empty when it is not a publisher's event."""
        return publisher_of(self.subject) or ""
