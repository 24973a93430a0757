"""When to look at the disk: the watcher is a doorbell, a scan of our own is the truth."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from watchfiles import Change, awatch

from openagentmesh.bus.tasks import end
from openagentmesh.runtime.changes import Places
from openagentmesh.runtime.disk import Stamp, is_skipped, stamp
from openagentmesh.runtime.reload import Reloader

log = logging.getLogger(__name__)

Scan = dict[Path, Stamp]
# How often the bell looks, in milliseconds.
_STEP: Final = 5
# Doorbells get lost, so without one we look this often, in seconds; at most this share of the time.
_SWEEP: Final = 1.0
_SWEEP_SHARE: Final = 0.004
# A file that is written in place is done when two looks this far apart see the same.
_SETTLED: Final = 0.03
# Several files are done when nothing changed for this long; nobody waits longer than the limit.
_QUIET: Final = 0.05
_QUIET_LIMIT: Final = 1.0
_MANY: Final = 500


async def watch(reloader: Reloader) -> None:
    """Reload what was saved, as soon as it is whole; runs until cancelled."""
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
    bell, seen = asyncio.Event(), await _scanned(reloader.places())
    while True:
        places = reloader.places()
        files = {str(file) for file in places.files}

        def concerns_us(_change: Change, path: str, files: set[str] = files) -> bool:
            return path in files or path.endswith(".py") or "." not in path.rpartition(os.sep)[2]

        ringing = [
            asyncio.create_task(_ring(places.roots, bell, concerns_us, recursive=True)),
            asyncio.create_task(_ring(places.folders, bell, concerns_us, recursive=False)),
        ]
        bell.set()  # what was saved before the bells were there
        try:
            while (reloader.places().roots, reloader.places().folders) == (places.roots, places.folders):
                await _until_rung(bell, seen)
                seen = await _look(reloader, seen)
        finally:
            await end(*ringing)


async def _look(reloader: Reloader, seen: Scan) -> Scan:
    """Scan, wait until what changed is whole, and reload it; returns what was seen last."""
    now = await _scanned(reloader.places())
    if now == seen:
        return seen
    now = await _settled(reloader.places(), seen, now)
    try:
        await reloader.reload()
    # The reload ends here: whatever went wrong in it, the next save is another one.
    except Exception:
        log.exception("a reload failed in a way that it should not")
    return now


async def _settled(places: Places, before: Scan, now: Scan) -> Scan:
    """Wait until nobody writes any more: a set of files changed together is one reload."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + _QUIET_LIMIT
    while loop.time() < limit:
        changed = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
        # A file with a new inode was written elsewhere and moved here whole.
        whole = all(path in now and path in before and before[path][0] != now[path][0] for path in changed)
        if len(changed) == 1 and whole and not _git_is_busy(places):
            return now
        await asyncio.sleep(_SETTLED if len(changed) == 1 else _QUIET)  # nothing tells that a writer is done
        again = await _scanned(places)
        if again == now and not _git_is_busy(places):
            return now
        now = again
    return now


async def _until_rung(bell: asyncio.Event, seen: Scan) -> None:
    # A scan takes about 4 us a file, so that many files are looked at less often.
    pause = max(_SWEEP, len(seen) * 4e-6 / _SWEEP_SHARE)
    try:
        async with asyncio.timeout(pause):
            await bell.wait()
    except TimeoutError:
        return
    bell.clear()


async def _ring(
    folders: Iterable[Path], bell: asyncio.Event, wanted: Callable[[Change, str], bool], *, recursive: bool
) -> None:
    """Set `bell` whenever something happens in one of these folders."""
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        return
    try:
        changes = awatch(*there, watch_filter=wanted, step=_STEP, debounce=_STEP, recursive=recursive)
        async with aclosing(changes):
            async for _ in changes:
                bell.set()
    # What the system's watcher raises is its own affair; without it there is still the scan.
    except Exception as exc:  # noqa: BLE001 - as above
        log.warning("saved files are noticed within %gs only: the system's watcher failed: %s", _SWEEP, exc)


async def _scanned(places: Places) -> Scan:
    # A few files are looked at in less time than a busy loop takes to let a thread in.
    return await asyncio.to_thread(_scan, places) if len(places.files) > _MANY else _scan(places)


def _scan(places: Places) -> Scan:
    found = {path: there for path in places.files if (there := stamp(path))}
    for root in places.roots:
        _scan_folder(str(root), found)
    return found


def _scan_folder(folder: str, found: Scan) -> None:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if entry.is_dir():
                if not is_skipped(entry.name):
                    _scan_folder(entry.path, found)
            elif entry.name.endswith(".py"):
                there = entry.stat()
                found[Path(entry.path)] = (
                    there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns,
                )  # fmt: skip
        except OSError:
            continue  # it went away while we looked


def _git_is_busy(places: Places) -> bool:
    """Whether git changes files right now."""
    return any(
        (folder / ".git" / "index.lock").exists() for root in places.roots for folder in (root, *root.parents)
    )
