"""What changes while the mesh runs: files, and the keys that the issuer publishes."""

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

# Keys are fetched at most this often, whatever tokens arrive.
_MIN_FETCH_INTERVAL_S: Final = 10.0
# Requests that wait for a fetch; further ones are verified with the known keys.
_MAX_WAITING: Final = 100
_DEBOUNCE_MS: Final = 100
# How often files are checked without an event.
_SWEEP_MS: Final = 5_000

Stamps = tuple[tuple[int, ...], ...]


class Issuer:
    """The issuer of tokens; `keys` is replaced by another list when its keys have changed."""

    def __init__(self, settings: TokenSettings | None) -> None:
        self.url = settings.jwks_url if settings else None
        self.keys: list[Key] = []
        self._next_fetch = 0.0
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0

    async def fetch(self) -> None:
        """Fetch the keys, unless that was done recently; ValueError if that fails, and the keys are kept."""
        if self.url is None:
            return
        if self._fetching is None or self._fetching.done():
            now = asyncio.get_running_loop().time()
            if self.keys and now < self._next_fetch:
                return
            self._next_fetch = now + _MIN_FETCH_INTERVAL_S
            self._fetching = asyncio.create_task(self._fetch(self.url))
        # Shielded: a cancelled request must not cancel the fetch for the others.
        await asyncio.shield(self._fetching)

    async def _fetch(self, url: str) -> None:
        fetched = await asyncio.to_thread(fetch_keys, url)
        if [key.as_dict() for key in fetched] != [key.as_dict() for key in self.keys]:
            self.keys = fetched

    async def fetch_for_request(self) -> None:
        """Fetch the keys for a request with an unknown one, unless too many requests wait already."""
        if self._waiting >= _MAX_WAITING:
            return
        self._waiting += 1
        try:
            await self.fetch()
        except ValueError as exc:
            log.warning("auth: %s; the previous keys stay in force", exc)
        finally:
            self._waiting -= 1


def stamps(files: Sequence[Path]) -> Stamps:
    """Identifies the content of files; an empty stamp for one that cannot be read."""
    return tuple(map(_stamp, files))


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except (OSError, RuntimeError):  # a cyclic link is a RuntimeError
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def changes(files: Callable[[], Sequence[Path]], last: Stamps) -> AsyncGenerator[None, None]:
    """Yield each time that the stamps of the files differ from the last ones; the list of files may vary."""
    while True:
        folders = _folders(files())
        async with aclosing(_ticks(folders)) as ticks:
            async for _ in ticks:
                if (found := stamps(files())) != last:
                    last = found
                    yield
                if _folders(files()) != folders:
                    break


async def _ticks(folders: set[Path]) -> AsyncGenerator[None, None]:
    """Yield at once, after each event in a folder, and every few seconds: some changes cause no event."""
    yield
    if not folders:
        await asyncio.sleep(_SWEEP_MS / 1000)
        return
    async for _ in awatch(
        *folders, recursive=False, watch_filter=None, debounce=_DEBOUNCE_MS, step=_DEBOUNCE_MS // 2,
        rust_timeout=_SWEEP_MS, yield_on_timeout=True,
    ):  # fmt: skip
        yield


def _folders(files: Sequence[Path]) -> set[Path]:
    """The folders of files and of their link targets."""
    found: set[Path] = set()
    for file in files:
        try:
            found |= {folder for folder in (file.parent, file.resolve().parent) if folder.is_dir()}
        except (OSError, RuntimeError):  # as in `_stamp`
            continue
    return found
