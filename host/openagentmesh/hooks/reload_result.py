"""What came of a reload, in words and in JSON."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(slots=True)
class Outcome:
    """One reload, carried out or refused.

    Attributes:
        files: what had changed, as people call it.
        agents: what changed of the agents, in words.
        error: why it was refused; empty when it was not.
        details: the traceback of that, or the excerpt with a caret.
        line: `file:line` of that.
        notes: what to know besides: breaking changes, differences of a replay, what was left behind.
        names: the agents of the modules concerned.
        took_ms: milliseconds from the first step to the swap, or to the verdict.
        in_flight: requests that were running on the old version then.
        at: when, in UTC.

    """

    files: list[str]
    agents: list[str] = field(default_factory=list)
    error: str = ""
    details: str = ""
    line: str = ""
    notes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    took_ms: float = 0.0
    in_flight: int = 0
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def text(self) -> str:
        """The one line for a terminal."""
        files = ", ".join(self.files[:_MOST_SHOWN])
        if len(self.files) > _MOST_SHOWN:
            files += f" and {len(self.files) - _MOST_SHOWN} more"
        if self.error:
            return f"{files} not reloaded: {self.error}"
        agents = ", ".join(self.agents[:_MOST_SHOWN])
        if len(self.agents) > _MOST_SHOWN:
            agents += f" and {len(self.agents) - _MOST_SHOWN} more"
        text = f"reloaded {files}" + (f" ({agents})" if agents else "") + f" {self.took_ms:.0f} ms"
        return text + (f" · {self.in_flight} in flight on the old version" if self.in_flight else "")

    def description(self) -> dict[str, Any]:
        """All of it, as far as it fits beside others into one message; JSON."""
        shortened = {
            "error": self.error[:_MOST_TEXT],
            "details": self.details[-_MOST_TEXT:],
            "text": self.text[:_MOST_TEXT],
            "notes": [note[:_MOST_TEXT] for note in self.notes[:_MOST_LISTED]],
            "files": self.files[:_MOST_LISTED],
            "agents": self.agents[:_MOST_LISTED],
            "names": self.names[:_MOST_LISTED],
        }
        return asdict(self) | shortened | {"at": self.at.isoformat()}


_MOST_SHOWN = 5
_MOST_LISTED = 50
_MOST_TEXT = 2000
