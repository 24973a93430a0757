"""When to look at the disk: the watcher is a doorbell, a scan of our own is the truth."""

import asyncio
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final

from watchfiles import Change, awatch

from openagentmesh.runtime.loading.files import (
    Stamp,
    is_being_written,
    is_skipped,
    leads_back,
    stamp,
    stamp_of,
)
from openagentmesh.runtime.reload.changes import Places
from openagentmesh.runtime.reload.checks import Doubtful
from openagentmesh.runtime.reload.reloader import Reloader
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

Scan = dict[str, Stamp]
# How often the bell looks, in milliseconds: while somebody edits, and when nobody has for so many seconds.
_LIVELY: Final = 3
_CALM: Final = 20
_SESSION: Final = 600.0
# Doorbells get lost, so without one we look this often, in seconds; at most this share of the time.
_SWEEP: Final = 1.0
_SWEEP_SHARE: Final = 0.001
# A file that is written in place is done when two looks this far apart see the same.
_SETTLED: Final = 0.03
# As long when nobody has it open any more: who writes it in several goes comes back at once.
_CLOSED: Final = 0.01
# Several files are done when nothing changed for this long; nobody waits longer than the limit.
_QUIET: Final = 0.05
_QUIET_LIMIT: Final = 1.0
# What may be half a save is one until nothing has changed for this long.
_DOUBT: Final = 0.25
_MANY: Final = 500


class Bell(asyncio.Event):
    """Set when something may have changed.

    Attributes:
        rung_at: when something had, last, in seconds of the event loop's clock.

    """

    def __init__(self) -> None:
        super().__init__()
        self.rung_at = -math.inf

    def ring(self) -> None:
        """Tell that something has changed."""
        self.rung_at = asyncio.get_running_loop().time()
        self.set()

    @property
    def step(self) -> int:
        """How often to look, in milliseconds."""
        return _LIVELY if asyncio.get_running_loop().time() - self.rung_at < _SESSION else _CALM


async def watch(reloader: Reloader) -> None:
    """Reload what was saved, as soon as it is whole; runs until cancelled."""
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
    bell = Bell()
    seen: Scan = {}  # what was saved since it was loaded is found by the first look
    while True:
        places = reloader.places()
        files = {str(file) for file in places.files}

        def concerns_us(_change: Change, path: str, files: set[str] = files) -> bool:
            return path in files or path.endswith(".py") or "." not in path.rpartition(os.sep)[2]

        # A second bell for mesh.toml and the like would double the cost of an idle host: the
        # regular look finds them soon enough, unless there is nothing else to watch.
        ringing = asyncio.create_task(
            _ring(places.roots or places.folders, bell, concerns_us, recursive=bool(places.roots))
        )
        try:
            seen = await _watch_places(reloader, places, seen, bell)
        finally:
            await cancel_and_wait(ringing)


async def _watch_places(reloader: Reloader, places: Places, seen: Scan, bell: Bell) -> Scan:
    """Reload until there are other places to look at; returns what was seen last."""
    now, roots = places, _identity(places)
    # A folder that was made anew has no bell yet.
    while now == places and roots == _identity(places):
        await _until_rung(bell, places, seen)
        try:
            scan = await _scanned(places)
            if scan == seen:
                continue
            seen = await _reload(reloader, places, await _settled(places, seen, scan), bell)
            now = reloader.places()
        # The reload ends here: whatever went wrong in it, it is tried again at the next look.
        except Exception:
            seen = {}
            log.exception("a reload failed in a way that it should not")
    return seen


def _identity(places: Places) -> list[int | None]:
    """What tells folders from others of the same names."""
    return [found and found[0] for found in map(stamp, sorted(places.roots))]


async def _reload(reloader: Reloader, places: Places, seen: Scan, bell: Bell) -> Scan:
    """Reload what was saved, once it is no half of a save; returns what was seen last."""
    sure = False
    while True:
        try:
            await reloader.reload(sure=sure, settled=seen)
        except Doubtful:
            scan = await _until_changed(places, seen, bell)
            sure = scan == seen
            seen = seen if sure else await _settled(places, seen, scan)
        else:
            return seen


async def _until_changed(places: Places, seen: Scan, bell: Bell) -> Scan:
    """Look again for as long as there is doubt, or until something has changed; the last look."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DOUBT):
            while (scan := await _scanned(places)) == seen:
                await bell.wait()
                bell.clear()
            return scan
    return await _scanned(places)


async def _settled(places: Places, before: Scan, now: Scan) -> Scan:
    """Wait until nobody writes any more: a set of files changed together is one reload."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + _QUIET_LIMIT
    while loop.time() < limit:
        changed = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
        # A file with a new inode was written elsewhere and moved here whole.
        whole = all(path in now and path in before and before[path][0] != now[path][0] for path in changed)
        if len(changed) == 1 and whole and not _is_busy(places, changed):
            return now
        await asyncio.sleep(_pause(changed))  # nothing tells that a writer is done
        again = await _scanned(places)
        if again == now and not _is_busy(places, changed):
            return now
        now = again
    return now


def _pause(changed: Collection[str]) -> float:
    """Seconds until files that have changed are looked at again."""
    if len(changed) != 1:
        return _QUIET
    return _CLOSED if all(is_being_written(path) is False for path in changed) else _SETTLED


async def _until_rung(bell: Bell, places: Places, seen: Scan) -> None:
    """Wait for the bell, for a change of a single file, or for the time to look at everything."""
    loop = asyncio.get_running_loop()
    # A scan takes about 4 us a file, so that many files are looked at less often.
    sweep = loop.time() + max(_SWEEP, len(seen) * 4e-6 / _SWEEP_SHARE)
    while loop.time() < sweep:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SWEEP):
                await bell.wait()
                bell.clear()
                return
        if any(stamp(path) != seen.get(path) for path in places.elsewhere):
            return


async def _ring(
    folders: Iterable[Path], bell: Bell, wanted: Callable[[Change, str], bool], *, recursive: bool
) -> None:
    """Ring `bell` whenever something happens in one of these folders."""
    try:
        while there := {str(folder) for folder in folders if folder.is_dir()}:
            step = bell.step
            changes = awatch(
                *there,
                watch_filter=wanted,
                step=step,
                debounce=step,
                recursive=recursive,
                yield_on_timeout=True,
            )
            # For what happens before it looks, which it does from its first wait on.
            asyncio.get_running_loop().call_soon(bell.set)
            async with aclosing(changes):
                async for found in changes:
                    if found:
                        bell.ring()
                    # One was deleted, and may be another one now, of which nothing is told.
                    is_gone = any(path in there for _, path in found)
                    if is_gone or step != bell.step:
                        break
    # What the system's watcher raises is its own affair; without it there is still the scan.
    except Exception as exc:  # noqa: BLE001 - as above
        log.warning("saved files are noticed within %gs only: the system's watcher failed: %s", _SWEEP, exc)


async def _scanned(places: Places) -> Scan:
    # A few files are looked at in less time than a busy loop takes to let a thread in.
    return await asyncio.to_thread(_scan, places) if len(places.files) > _MANY else _scan(places)


def _scan(places: Places) -> Scan:
    found: Scan = {}
    for root in places.roots:
        _scan_folder(str(root), found, ())
    for path in places.elsewhere:
        if (there := stamp(path)) is not None:
            found[path] = there
    return found


def _scan_folder(folder: str, found: Scan, above: tuple[str, ...]) -> None:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.name.endswith(".py"):
                found[entry.path] = stamp_of(entry.stat())
            elif not is_skipped(entry.name) and entry.is_dir() and not leads_back(entry.path, above):
                _scan_folder(entry.path, found, (*above, os.path.realpath(entry.path)))
        except OSError:
            continue  # it went away while we looked


def _is_busy(places: Places, changed: Iterable[str]) -> bool:
    """Whether git changes files right now, or somebody still writes one of those that changed."""
    return any(map(is_being_written, changed)) or any(
        stamp(folder / ".git" / "index.lock") is not None
        for root in places.roots
        for folder in (root, *root.parents)
    )
