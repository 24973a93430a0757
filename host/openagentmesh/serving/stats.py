"""Statistics of one route: requests, errors and durations."""

from dataclasses import dataclass, field
from time import time
from typing import Final

from openagentmesh.protocol.errors import MeshError, Overloaded

_MAX_ERROR: Final = 500


@dataclass(slots=True)
class RouteStats:
    """What a route has done since it was created.

    Attributes:
        requests: received requests.
        errors: those answered by an error.
        overloaded: those of the errors with the code `overloaded`.
        seconds: the sum of their durations; a stream's until its end.
        last_error: code and message of the last error, shortened.
        since: when the route was created, in seconds since 1970.
    """

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
        text = f"{error.code}: {error.message}"[:_MAX_ERROR]
        self.last_error = text.encode("utf-8", "replace").decode()
