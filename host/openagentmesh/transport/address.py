"""The server's address when none is given: OAM_URL, OAM_CREDS and the nearest `.oam-url`."""

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from openagentmesh.protocol.errors import ConnectionFailed

DEFAULT_URL: Final = "nats://localhost:4222"
FILE_NAME: Final = ".oam-url"


@dataclass(slots=True, frozen=True)
class Address:
    """A server's url and a credentials file for it; None when not set."""

    url: str | None = None
    creds: str | None = None


def nearest(start: Path | None = None) -> Address:
    """The nearest `.oam-url`, from `start` (the working folder) upwards; ConnectionFailed if unreadable."""
    folder = (start or Path.cwd()).resolve()
    paths = [parent / FILE_NAME for parent in (folder, *folder.parents)]
    return next((_read(path) for path in paths if path.is_file()), Address())


def _read(path: Path) -> Address:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConnectionFailed(f"{path} cannot be read: {exc}") from exc
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        # Peers write a bare url, and read only the first line.
        first = text.partition("\n")[0].strip()
        if "=" not in first.partition("://")[0] and not first.startswith(("#", "[")):
            return Address(first or None)
        raise ConnectionFailed(
            f"{path} is neither a url nor TOML with `url` and `creds`: {exc}. "
            "Write it again with `oam mesh connect URL`."
        ) from exc
    url, creds = values.get("url"), values.get("creds")
    return Address(None if url is None else str(url), str(path.parent / str(creds)) if creds else None)


def write(folder: Path, url: str, creds: str | None = None) -> Path:
    """Write `.oam-url` into `folder`, readable by its owner alone: a url may contain a password."""
    path = folder / FILE_NAME
    # A bare url where possible: peers read nothing else.
    text = f"url = {json.dumps(url)}\ncreds = {json.dumps(creds)}\n" if creds else f"{url}\n"
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")
    return path


def url_or_default(given: str | None = None) -> str:
    """The given url, else OAM_URL, else that of the nearest `.oam-url`, else localhost:4222."""
    return given or os.environ.get("OAM_URL") or nearest().url or DEFAULT_URL


def creds_or_none(given: str | None = None) -> str | None:
    """The given credentials file, else OAM_CREDS, else that of the nearest `.oam-url`, else None."""
    return given or os.environ.get("OAM_CREDS") or nearest().creds
