"""The result of a reload, for logs, plugins and `oam reload`."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from openagentmesh.protocol.status import ReloadStatus

_MAX_SHOWN: Final = 5
_MAX_LISTED: Final = 50
_MAX_TEXT: Final = 2000


@dataclass(slots=True)
class ReloadResult:
    """One reload, completed or refused.

    Attributes:
        files: the changed files, relative where possible.
        agents: the changes of the agents, as text.
        error: why it was refused; empty when it was not.
        details: the error's traceback, or the source line with a caret.
        line: the error's `file:line`.
        notes: breaking changes, results of plugins' checks, and what the old version did not stop or release.
        names: the agents of the modules concerned.
        took_ms: milliseconds from the first step to the swap, or to the refusal.
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
        """The line for a terminal."""
        files = _listed(self.files)
        if self.error:
            return f"reload refused: {files}: {self.error}"
        agents = f" ({_listed(self.agents)})" if self.agents else ""
        text = f"reloaded {files}{agents} {self.took_ms:.0f} ms"
        return text + (f" · {self.in_flight} in flight on the old version" if self.in_flight else "")

    def status(self) -> ReloadStatus:
        """All of it, shortened so that several fit into one message."""
        return ReloadStatus(
            text=self.text[:_MAX_TEXT],
            error=self.error[:_MAX_TEXT],
            details=self.details[-_MAX_TEXT:],
            line=self.line,
            notes=[note[:_MAX_TEXT] for note in self.notes[:_MAX_LISTED]],
            files=self.files[:_MAX_LISTED],
            agents=self.agents[:_MAX_LISTED],
            names=self.names[:_MAX_LISTED],
            took_ms=self.took_ms,
            in_flight=self.in_flight,
            at=self.at,
        )


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MAX_SHOWN} more" if len(items) > _MAX_SHOWN else ""
    return ", ".join(items[:_MAX_SHOWN]) + more
