"""The published SDK in an environment of its own, as its users install it."""

import subprocess
import sys
from pathlib import Path
from typing import Final

PUBLISHED: Final = "openagentmesh==0.2.0"
_CHECK: Final = (
    f"import importlib.metadata as m; assert m.version('openagentmesh') == {PUBLISHED.partition('==')[2]!r}"
)


class NotInstalled(Exception):
    """The published SDK cannot be had here; the message says why."""


def install_published(folder: Path, timeout: float = 300) -> Path:
    """Make a virtual environment with the published SDK, unless it is there; returns its interpreter.

    Raises:
        NotInstalled: PyPI cannot be reached within `timeout` seconds, or no environment can be made.
    """
    return install(folder, PUBLISHED, _CHECK, timeout)


def install(folder: Path, what: str | Path, check: str, timeout: float = 300, *more: str | Path) -> Path:
    """Make a virtual environment in which `check` runs by installing `what`; returns its interpreter.

    `more` is what is to be installed besides.

    Raises:
        NotInstalled: PyPI cannot be reached within `timeout` seconds, or no environment can be made.
    """
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            _uv("venv", "--allow-existing", "--python", sys.executable, folder, timeout=timeout)
        if subprocess.run([python, "-c", check], check=False, capture_output=True).returncode:
            # It keeps what it built of a folder, whatever has changed in there since.
            _uv("pip", "install", "--refresh", "--python", python, what, *more, timeout=timeout)
    except (OSError, subprocess.SubprocessError) as exc:
        raise NotInstalled(f"{what} could not be installed from PyPI: {_reason(exc)}") from exc
    return python


def _reason(exc: Exception) -> str:
    said = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else None
    return " ".join((said or str(exc)).split())


def _uv(*arguments: str | Path, timeout: float) -> None:
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
