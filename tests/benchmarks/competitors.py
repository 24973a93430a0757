"""Who is measured, and the environment of the published SDK."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.support.published_sdk import NotInstalled, install_published


class Unavailable(Exception):
    """A competitor cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Competitor:
    """One way to call an agent.

    Attributes:
        name: how the table calls it.
        program: the program that serves its agents and calls them.
        loop: the event loop of both its processes.
        plugin: what is put around its agents and its calls.
    """

    name: str
    program: str
    loop: str = "asyncio"
    plugin: str = ""


FLOOR: Final = Competitor("floor", "floor")
FLOOR_FAST: Final = Competitor("floor, uvloop", "floor", "uvloop")
OURS: Final = Competitor("ours", "mesh")
OURS_FAST: Final = Competitor("ours, uvloop", "mesh", "uvloop")
PEER: Final = Competitor("SDK 0.2.0", "mesh")
PLUGGED: Final = tuple(
    Competitor(f"ours, {name}", "plugged", plugin=plugin)
    for name, plugin in (
        ("three that pass", "passing"),
        ("metrics", "metrics"),
        ("auth", "auth"),
        ("tracing, no exporter", "tracing"),
        ("tracing, SDK", "recording"),
        ("limits", "limits"),
    )
)
HOST: Final = Competitor("our host", "host")


class Pythons:
    """The interpreter of each competitor; the peer's is made when it is first asked for.

    Args:
        folder: where the peer's environment is, or will be; None when it is not wanted.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._peer: Path | Unavailable | None = None

    def of(self, competitor: Competitor) -> Path:
        """The interpreter that runs a competitor.

        Raises:
            Unavailable: there is none.
        """
        if competitor.loop == "uvloop" and find_spec("uvloop") is None:
            raise Unavailable("uvloop is not installed (extra `fast`)")
        if competitor is not PEER:
            return Path(sys.executable)
        if self._peer is None:
            self._peer = _try_to_install(self._folder)
        if isinstance(self._peer, Unavailable):
            raise self._peer
        return self._peer


def _try_to_install(folder: Path | None) -> Path | Unavailable:
    if folder is None:
        return Unavailable("not wanted (--no-peer)")
    try:
        return install_published(folder)
    except NotInstalled as exc:
        return Unavailable(str(exc))
