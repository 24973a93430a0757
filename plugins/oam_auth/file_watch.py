"""What changes while the mesh is up: files, and the keys that the issuer publishes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final

from joserfc.jwk import Key
from watchfiles import awatch

from oam_auth.keys import fetch_keys
from oam_auth.settings import TokenSettings

log = logging.getLogger(__name__)

# The issuer is not asked more often than this, in seconds, whatever strangers send.
_PAUSE: Final = 10.0
# So many requests wait for it; the others are answered by the keys that are there.
_MOST_WAITING: Final = 100
# Milliseconds of quiet after a change; and until the files are looked at without one.
_QUIET: Final = 100
_LOOK: Final = 5_000

Stamps = tuple[tuple[int, ...], ...]


class Issuer:
    """Who issues tokens, and the keys fetched from there: another list when they are others."""

    def __init__(self, settings: TokenSettings | None) -> None:
        self.url = settings.jwks_url if settings else None
        self.keys: list[Key] = []
        self._next_fetch = 0.0
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0

    async def fetch(self) -> None:
        """Fetch the keys, unless that was done just now.

        Raises:
            ValueError: they cannot be fetched; those from before stay.

        """
        loop = asyncio.get_running_loop()
        if self.url is None:
            return
        if self._fetching is None or self._fetching.done():
            if self.keys and loop.time() < self._next_fetch:
                return
            self._next_fetch = loop.time() + _PAUSE
            self._fetching = asyncio.create_task(self._fetch(self.url))
        # Shielded: who waits may go, and what is fetched counts for all.
        await asyncio.shield(self._fetching)

    async def _fetch(self, url: str) -> None:
        fetched = await asyncio.to_thread(fetch_keys, url)
        if [key.as_dict() for key in fetched] != [key.as_dict() for key in self.keys]:
            self.keys = fetched

    async def fetch_for_request(self) -> None:
        """Have the newest keys for a request that names an unknown one, as long as few wait for them."""
        if self._waiting >= _MOST_WAITING:
            return
        self._waiting += 1
        try:
            await self.fetch()
        except ValueError as exc:
            log.warning("auth: %s; the keys from before still count", exc)
        finally:
            self._waiting -= 1


def stamps(files: Sequence[Path]) -> Stamps:
    """What identifies all that is in files; nothing for one that cannot be read."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except (OSError, RuntimeError):  # a link that leads to itself is the latter
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def changes(files: Callable[[], Sequence[Path]], seen: Stamps) -> AsyncGenerator[None, None]:
    """Tell each time that the files are not as they were `seen`; there may be others after each time."""
    while True:
        folders = _folders(files())
        async with aclosing(_looks(folders)) as looks:
            async for _ in looks:
                found = stamps(files())
                if found != seen:
                    seen = found
                    yield
                if _folders(files()) != folders:
                    break


async def _looks(folders: set[Path]) -> AsyncGenerator[None, None]:
    """When to look: at once, when something happens in a folder, and every few seconds without."""
    yield
    if not folders:
        await asyncio.sleep(_LOOK / 1000)
        return
    # A folder that was put in another's place tells of nothing.
    watching = awatch(
        *folders, recursive=False, watch_filter=None, debounce=_QUIET, step=_QUIET // 2,
        rust_timeout=_LOOK, yield_on_timeout=True,
    )  # fmt: skip
    async for _ in watching:
        yield


def _folders(files: Sequence[Path]) -> set[Path]:
    """Where files and what they link to are."""
    found: set[Path] = set()
    for file in files:
        try:
            found |= {place for place in (file.parent, file.resolve().parent) if place.is_dir()}
        except (OSError, RuntimeError):  # as `_stamp`
            continue
    return found
