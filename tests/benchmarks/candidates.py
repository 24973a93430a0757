"""The measured candidates, and the environment of the published SDK."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.support.published_sdk import NotInstalled, install_published


class Unavailable(Exception):
    """A candidate cannot be measured here; the message is the reason."""


@dataclass(frozen=True)
class Candidate:
    """One way to call an agent.

    Attributes:
        name: its name in the table.
        program: the program that serves its agents and calls them.
        loop: the event loop of both processes.
        plugin: the key of its plugins; empty for none.
    """

    name: str
    program: str
    loop: str = "asyncio"
    plugin: str = ""


FLOOR: Final = Candidate("floor", "floor")
FLOOR_FAST: Final = Candidate("floor, uvloop", "floor", "uvloop")
OURS: Final = Candidate("ours", "mesh")
OURS_FAST: Final = Candidate("ours, uvloop", "mesh", "uvloop")
PEER: Final = Candidate("SDK 0.2.0", "mesh")
WITH_PLUGINS: Final = tuple(
    Candidate(f"ours, {name}", "with_plugins", plugin=plugin)
    for name, plugin in (
        ("three empty plugins", "empty"),
        ("metrics", "metrics"),
        ("auth", "auth"),
        ("tracing, no exporter", "tracing"),
        ("tracing, SDK", "recording"),
        ("limits", "limits"),
    )
)
HOST: Final = Candidate("our host", "host")


class Pythons:
    """The interpreter of each candidate; the peer's environment is created when it is first used.

    Args:
        folder: the folder of the peer's environment; None to skip the peer.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._peer: Path | Unavailable | None = None

    def of(self, candidate: Candidate) -> Path:
        """The interpreter that runs a candidate.

        Raises:
            Unavailable: it cannot run here.
        """
        if candidate.loop == "uvloop" and find_spec("uvloop") is None:
            raise Unavailable("uvloop is not installed (extra `fast`)")
        if candidate is not PEER:
            return Path(sys.executable)
        if self._peer is None:
            self._peer = _try_to_install(self._folder)
        if isinstance(self._peer, Unavailable):
            raise self._peer
        return self._peer


def _try_to_install(folder: Path | None) -> Path | Unavailable:
    if folder is None:
        return Unavailable("skipped (--no-peer)")
    try:
        return install_published(folder)
    except NotInstalled as exc:
        return Unavailable(str(exc))
