"""What changes while the mesh is up: files, and the keys that the issuer publishes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from joserfc.jwk import Key
from watchfiles import awatch

from oam_auth.keys import fetch_keys
from oam_auth.settings import TokenSettings

# The issuer is not asked more often than this, in seconds, whatever strangers send.
_PAUSE: Final = 10.0
# Milliseconds of quiet after a change; and until the files are looked at without one.
_QUIET: Final = 100
_LOOK: Final = 5_000


class Issuer:
    """Who issues tokens, and the keys fetched from there."""

    def __init__(self, settings: TokenSettings | None) -> None:
        self.url = settings.jwks_url if settings else None
        self.keys: list[Key] = []
        self._next_fetch = 0.0
        self._fetching: asyncio.Task[list[Key]] | None = None

    async def fetch(self) -> bool:
        """Fetch the keys, unless that was done just now; gives whether they are others than before.

        Raises:
            ValueError: they cannot be fetched; those from before stay.

        """
        loop = asyncio.get_running_loop()
        if self.url is None:
            return False
        if self._fetching is None or self._fetching.done():
            if loop.time() < self._next_fetch:
                return False
            self._next_fetch = loop.time() + _PAUSE
            self._fetching = asyncio.create_task(asyncio.to_thread(fetch_keys, self.url))
        # Shielded: who waits may go, and others wait for the same.
        fetched = await asyncio.shield(self._fetching)
        is_new = [key.as_dict() for key in fetched] != [key.as_dict() for key in self.keys]
        self.keys = fetched
        return is_new


async def changes(files: Callable[[], Sequence[Path]]) -> AsyncIterator[None]:
    """Tell each time that what is in the files has changed; there may be others after each time."""
    seen = _stamps(files())
    while True:
        folders = _folders(files())
        if not folders:
            return
        # Looked at without an event too: a folder that was put in another's place gives none.
        watching = awatch(
            *folders, recursive=False, watch_filter=None, debounce=_QUIET, step=_QUIET // 2,
            rust_timeout=_LOOK, yield_on_timeout=True,
        )  # fmt: skip
        async for _ in watching:
            found = _stamps(files())
            if found != seen:
                seen = found
                yield
            if _folders(files()) != folders:
                break


def _folders(files: Sequence[Path]) -> set[Path]:
    """Where files and what they link to are."""
    return {place for file in files for place in (file.parent, file.resolve().parent) if place.is_dir()}


def _stamps(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """What identifies all that is in the files; nothing for one that cannot be read."""
    found: list[tuple[int, ...]] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found.append(())
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return found
