"""Who is measured, and the environment of the published SDK."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_PEER: Final = "openagentmesh==0.2.0"
_INSTALL_TIMEOUT: Final = 300
_CHECK: Final = (
    f"import importlib.metadata as m; assert m.version('openagentmesh') == {_PEER.partition('==')[2]!r}"
)


class Unavailable(Exception):
    """A competitor cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Competitor:
    """One way to call an agent.

    Attributes:
        name: how the table calls it.
        program: the program that serves its agents and calls them.
        loop: the event loop of both its processes.

    """

    name: str
    program: str
    loop: str = "asyncio"


FLOOR: Final = Competitor("floor", "floor")
FLOOR_FAST: Final = Competitor("floor, uvloop", "floor", "uvloop")
OURS: Final = Competitor("ours", "mesh")
OURS_FAST: Final = Competitor("ours, uvloop", "mesh", "uvloop")
PEER: Final = Competitor("SDK 0.2.0", "mesh")
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
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            _run(sys.executable, "-m", "venv", folder)
        if not _runs(python, "-c", _CHECK):
            _run(python, "-m", "pip", "install", "--quiet", _PEER)
    except (OSError, subprocess.SubprocessError):
        return Unavailable(f"{_PEER} could not be installed from PyPI")
    return python


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_TIMEOUT)


def _runs(*command: str | Path) -> bool:
    return subprocess.run(command, check=False, capture_output=True, timeout=_INSTALL_TIMEOUT).returncode == 0
