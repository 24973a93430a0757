"""Statistics of one route: requests, errors and durations."""

from dataclasses import dataclass, field
from time import time
from typing import Final

from openagentmesh.protocol.errors import MeshError, Overloaded, valid_text

_MAX_ERROR: Final = 500


@dataclass(slots=True)
class RouteStats:
    """What a route has done since it was created; the fields are those of `AgentStatus`."""

    requests: int = 0
    errors: int = 0
    overloaded: int = 0
    seconds: float = 0.0
    last_error: str = ""
    since: float = field(default_factory=time)

    def add_error(self, error: MeshError) -> None:
        """Count a request that was answered by an error."""
        self.errors += 1
        self.overloaded += error.code == Overloaded.code
        # Texts of authors may have any content and length.
        self.last_error = valid_text(f"{error.code}: {error.message}"[:_MAX_ERROR])
