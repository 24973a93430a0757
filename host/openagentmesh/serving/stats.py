"""What a route has done: how many requests, how many errors, how long that took."""

from dataclasses import dataclass, field
from time import time
from typing import Final

from openagentmesh.protocol.errors import MeshError, Overloaded

_LONGEST: Final = 500


@dataclass(slots=True)
class Counts:
    """What a route has done since it was made.

    Attributes:
        requests: those that were taken.
        errors: those that were answered by an error.
        refused: those of the errors that say `overloaded`.
        seconds: from a request to its answer, all together; of a stream to its end.
        last_error: the code and the message of the last error, cut.
        since: when the route was made, in seconds since 1970.

    """

    requests: int = 0
    errors: int = 0
    refused: int = 0
    seconds: float = 0.0
    last_error: str = ""
    since: float = field(default_factory=time)

    def add_error(self, error: MeshError) -> None:
        """Count a request that was answered by an error."""
        self.errors += 1
        self.refused += error.code == Overloaded.code
        # Its author's words may hold anything, and be as long as anything.
        text = f"{error.code}: {error.message}"[:_LONGEST]
        self.last_error = text.encode("utf-8", "replace").decode()
