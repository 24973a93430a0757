"""What is on disk now: files, by what identifies their content."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final

if sys.platform == "linux":
    import signal
    from fcntl import F_RDLCK, F_SETLEASE, F_SETSIG, F_UNLCK, fcntl

# What identifies a file's content without reading it. A preserved modification time is told by
# the change time, an atomic rename by the inode.
Stamp = tuple[int, int, int, int]
Digest = bytes | None
# Files with more bytes than this are not read to find out whether they have changed.
_LARGE: Final = 1024 * 1024
_SKIPPED: Final = frozenset({"__pycache__", "node_modules"})


def stamp(path: Path | str) -> Stamp | None:
    """What identifies a file's content; None when there is no such file."""
    try:
        return stamp_of(os.stat(path))  # noqa: PTH116 - thousands of files are looked at again and again
    except OSError:
        return None


def stamp_of(found: os.stat_result) -> Stamp:
    """What identifies the content of a file of which this is known."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(content: bytes) -> bytes:
    """What identifies some content."""
    return blake2b(content, digest_size=16).digest()


def is_being_written(path: str) -> bool | None:
    """Whether somebody has a file open for writing: Linux refuses a lease; None where nothing tells."""
    if sys.platform != "linux":
        return None
    with suppress(OSError), open(path, "rb") as file:  # noqa: PTH123 - as `stamp`
        # Who opens it for writing while we have the lease is told to us by a signal: one that does nothing.
        fcntl(file, F_SETSIG, signal.SIGURG)
        try:
            fcntl(file, F_SETLEASE, F_RDLCK)
        except BlockingIOError:
            return True
        fcntl(file, F_SETLEASE, F_UNLCK)
        return False
    return None


def leads_back(folder: str, above: Iterable[str]) -> bool:
    """Whether a folder is a link to one that it lies in, so that looking into it would never end.

    `above` are the real paths of the folders on the way to it.
    """
    if not os.path.islink(folder):  # noqa: PTH114 - as `stamp`
        return False
    here = os.path.realpath(os.path.dirname(folder))  # noqa: PTH120 - as `stamp`
    target = f"{os.path.realpath(folder)}{os.sep}"
    return any(f"{path}{os.sep}".startswith(target) for path in (here, *above))


def file_digest(path: Path) -> Digest:
    """What identifies a file's content, of large data its stamp; None when it cannot be read."""
    found = stamp(path)
    try:
        large = found is not None and found[1] > _LARGE and path.suffix != ".py"
        return digest_of(repr(found).encode()) if large else digest_of(path.read_bytes())
    except OSError:
        return None


class Disk:
    """Digests of files, read again only when their stamps have changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Stamp, Digest]] = {}

    def digest(self, path: Path) -> Digest:
        """A file's digest; None when there is none, or it cannot be read."""
        now = stamp(path)
        if now is None:
            self._known.pop(path, None)
            return None
        if path not in self._known or self._known[path][0] != now:
            digest = file_digest(path)
            if digest is None:  # it may be readable again without having changed
                return None
            self._known[path] = now, digest
        return self._known[path][1]


def is_skipped(name: str) -> bool:
    """Whether nothing in a folder of this name concerns us."""
    return name in _SKIPPED or name.startswith(".")
