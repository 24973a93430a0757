"""Triggers reloads: after an event of the system's file watcher, a scan finds what has changed."""

import asyncio
import logging
import math
import os
from collections.abc import Collection, Iterable
from contextlib import aclosing, suppress
from itertools import takewhile
from pathlib import Path
from typing import Final

from watchfiles import Change, awatch

from openagentmesh.runtime.loading.files import (
    Stamp,
    is_being_written,
    is_cyclic_link,
    is_ignored_folder,
    stamp,
)
from openagentmesh.runtime.reload.changes import WatchedPaths
from openagentmesh.runtime.reload.checks import UnstableFiles
from openagentmesh.runtime.reload.reloader import Reloader
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

Scan = dict[str, Stamp]
# How often the system's watcher looks: during an editing session, and after so many seconds without a change.
_ACTIVE_STEP_MS: Final = 3
_IDLE_STEP_MS: Final = 20
_SESSION_S: Final = 600.0
# Its events get lost, so without one everything is scanned this often; at most this share of the time.
_SWEEP_S: Final = 1.0
_MAX_SWEEP_SHARE: Final = 0.001
_SCAN_S_PER_FILE: Final = 4e-6
# A file that is written in place is complete when two scans at this distance are equal.
_SETTLE_S: Final = 0.03
# The same when no process has it open for writing.
_CLOSED_SETTLE_S: Final = 0.01
# Several files are complete when nothing changed for this long; at most this long is waited.
_QUIET_S: Final = 0.05
_MAX_QUIET_S: Final = 1.0
# What may be an incomplete save counts when nothing has changed for this long.
_UNSTABLE_S: Final = 0.25
_MANY_FILES: Final = 500


class ChangeSignal(asyncio.Event):
    """Set when something may have changed."""

    _last_change = -math.inf

    def notify(self) -> None:
        """Set it, because something has changed."""
        self._last_change = asyncio.get_running_loop().time()
        self.set()

    @property
    def step_ms(self) -> int:
        """How often the system's watcher looks, in milliseconds."""
        is_active = asyncio.get_running_loop().time() - self._last_change < _SESSION_S
        return _ACTIVE_STEP_MS if is_active else _IDLE_STEP_MS


async def watch(reloader: Reloader) -> None:
    """Reload saved files, as soon as they are complete; runs until cancelled."""
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs every change
    signal = ChangeSignal()
    seen: Scan = {}  # the first scan finds what was saved since the start
    while True:
        paths = reloader.watched_paths()
        watching = asyncio.create_task(_watch_system(paths, signal))
        try:
            seen = await _watch_paths(reloader, paths, seen, signal)
        finally:
            await cancel_and_wait(watching)


async def _watch_paths(reloader: Reloader, paths: WatchedPaths, seen: Scan, signal: ChangeSignal) -> Scan:
    """Reload until other paths have to be watched; returns the last scan."""
    current, inodes = paths, _inodes(paths)
    # The system does not watch a folder that has replaced another one of its name.
    while current == paths and inodes == _inodes(paths):
        await _wait_for_change(signal, paths, seen)
        try:
            scan = await _scan_paths(paths)
            if scan == seen:
                continue
            seen = await _reload(reloader, paths, await _settled(paths, seen, scan), signal)
            current = reloader.watched_paths()
        # The reload ends here: whatever failed, the next scan repeats it.
        except Exception:
            seen = {}
            log.exception("unexpected error during reload")
    return seen


def _inodes(paths: WatchedPaths) -> list[int | None]:
    return [found and found[0] for found in map(stamp, sorted(paths.roots))]


async def _reload(reloader: Reloader, paths: WatchedPaths, seen: Scan, signal: ChangeSignal) -> Scan:
    """Reload what was saved, once it is complete; returns the last scan."""
    is_stable = False
    while True:
        try:
            await reloader.reload(is_stable=is_stable, scanned=seen)
            return seen
        except UnstableFiles:
            scan = await _wait_while_unstable(paths, seen, signal)
            is_stable = scan == seen
            seen = seen if is_stable else await _settled(paths, seen, scan)


async def _wait_while_unstable(paths: WatchedPaths, seen: Scan, signal: ChangeSignal) -> Scan:
    """Wait until something has changed, or for as long as incomplete saves take; returns the last scan."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_UNSTABLE_S):
            while (scan := await _scan_paths(paths)) == seen:
                await signal.wait()
                signal.clear()
            return scan
    return await _scan_paths(paths)


async def _settled(paths: WatchedPaths, before: Scan, after: Scan) -> Scan:
    """Wait until nothing is written any more: files changed together are one reload."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _MAX_QUIET_S
    while loop.time() < deadline:
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        if len(changed) == 1 and _is_replaced(before, after, *changed) and not _is_busy(paths, changed):
            return after
        await asyncio.sleep(_settle_time(changed))  # no event announces the end of writing
        previous, after = after, await _scan_paths(paths)
        if after == previous and not _is_busy(paths, changed):
            break
    return after


def _is_replaced(before: Scan, after: Scan, path: str) -> bool:
    """Whether a file has a new inode: it was written elsewhere and moved here as a whole."""
    return path in after and path in before and before[path][0] != after[path][0]


def _settle_time(changed: Collection[str]) -> float:
    """Seconds until changed files are scanned again."""
    if len(changed) != 1:
        return _QUIET_S
    return _CLOSED_SETTLE_S if all(is_being_written(path) is False for path in changed) else _SETTLE_S


async def _wait_for_change(signal: ChangeSignal, paths: WatchedPaths, seen: Scan) -> None:
    """Wait for the system's watcher, for a change of a single file, or for the time of a full scan."""
    loop = asyncio.get_running_loop()
    # The more files, the rarer.
    sweep = loop.time() + max(_SWEEP_S, len(seen) * _SCAN_S_PER_FILE / _MAX_SWEEP_SHARE)
    while loop.time() < sweep:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SWEEP_S):
                await signal.wait()
                signal.clear()
                return
        if any(stamp(path) != seen.get(path) for path in paths.other_files):
            return


async def _watch_system(paths: WatchedPaths, signal: ChangeSignal) -> None:
    """Set `signal` whenever something changes below the roots, or without roots in the files' folders.

    A second watcher for single files would double the cost of an idle host: the regular scan finds their
    changes soon enough, unless there is nothing else to watch.
    """

    def is_relevant(_change: Change, path: str) -> bool:
        return path in paths.files or path.endswith(".py") or "." not in path.rpartition(os.sep)[2]

    try:
        while present := {str(folder) for folder in paths.roots or paths.folders if folder.is_dir()}:
            step = signal.step_ms
            changes = awatch(
                *present,
                watch_filter=is_relevant,
                step=step,
                debounce=step,
                recursive=bool(paths.roots),
                yield_on_timeout=True,
            )
            # For changes before it watches, which it does from its first wait on.
            asyncio.get_running_loop().call_soon(signal.set)
            async with aclosing(changes):
                async for found in changes:
                    if found:
                        signal.notify()
                    # A folder that replaces a deleted one is not watched.
                    is_deleted = any(path in present for _, path in found)
                    if is_deleted or step != signal.step_ms:
                        break
    # The system's watcher may raise anything; the regular scan continues.
    except Exception as exc:  # noqa: BLE001 - as above
        log.warning("the system's file watcher failed: %s; saved files are noticed within %gs", exc, _SWEEP_S)


async def _scan_paths(paths: WatchedPaths) -> Scan:
    # A few files are scanned in less time than a busy loop takes to switch to a thread.
    return await asyncio.to_thread(_scan, paths) if len(paths.files) > _MANY_FILES else _scan(paths)


def _scan(paths: WatchedPaths) -> Scan:
    found = {path: current for path in paths.other_files if (current := stamp(path))}
    for root in paths.roots:
        for folder, folders, files in os.walk(root, followlinks=True):
            sources = [f"{folder}{os.sep}{name}" for name in files if name.endswith(".py")]
            found |= {path: current for path in sources if (current := stamp(path))}
            folders[:] = [name for name in folders if _is_scanned(Path(folder, name), root)]
    return found


def _is_scanned(folder: Path, root: Path) -> bool:
    parents = map(os.path.realpath, takewhile(root.__ne__, folder.parents))
    return not is_ignored_folder(folder.name) and not is_cyclic_link(str(folder), parents)


def _is_busy(paths: WatchedPaths, changed: Iterable[str]) -> bool:
    """Whether git changes files now, or a process still writes one of the changed files."""
    folders = {folder for root in paths.roots for folder in (root, *root.parents)}
    locks = (folder / ".git" / "index.lock" for folder in folders)
    return any(map(is_being_written, changed)) or any(stamp(lock) is not None for lock in locks)
