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
    """A package cannot be installed here; the message is the reason."""


def install_published(folder: Path, timeout: float = 300) -> Path:
    """Create a virtual environment with the published SDK, unless it exists; returns its interpreter.

    Raises:
        NotInstalled: PyPI cannot be reached within `timeout` seconds, or no environment can be created.
    """
    return install(folder, PUBLISHED, _CHECK, timeout)


def install(folder: Path, package: str | Path, check: str, timeout: float = 300, *more: str | Path) -> Path:
    """Create a virtual environment with a package, and with more of them; returns its interpreter.

    Nothing is installed if the program `check` succeeds in it.

    Raises:
        NotInstalled: PyPI cannot be reached within `timeout` seconds, or no environment can be created.
    """
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            _uv("venv", "--allow-existing", "--python", sys.executable, folder, timeout=timeout)
        if subprocess.run([python, "-c", check], check=False, capture_output=True).returncode:
            # Without a refresh, uv would reuse an earlier build of a folder that has changed since.
            _uv("pip", "install", "--refresh", "--python", python, package, *more, timeout=timeout)
    except (OSError, subprocess.SubprocessError) as exc:
        raise NotInstalled(f"{package} could not be installed from PyPI: {_reason(exc)}") from exc
    return python


def _reason(exc: Exception) -> str:
    output = exc.stderr if isinstance(exc, subprocess.CalledProcessError) else None
    return " ".join((output or str(exc)).split())


def _uv(*arguments: str | Path, timeout: float) -> None:
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
