"""Files on disk: what identifies their content."""

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

# Identifies a file's content without reading it: inode, size, modification and change time. The change
# time reveals a preserved modification time, the inode an atomic rename.
Stamp = tuple[int, int, int, int]
Digest = bytes | None
# Larger files, unless they are Python, are identified by their stamp alone. Bytes.
_MAX_HASHED: Final = 1024 * 1024
_IGNORED_FOLDERS: Final = frozenset({"__pycache__", "node_modules"})


def stamp(path: Path | str) -> Stamp | None:
    """A file's stamp; None when it does not exist."""
    try:
        found = os.stat(path)  # noqa: PTH116 - called for thousands of files, repeatedly
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(content: bytes) -> bytes:
    """The digest of some content."""
    return blake2b(content, digest_size=16).digest()


def is_being_written(path: str) -> bool | None:
    """Whether a process has a file open for writing: Linux then refuses a lease. None where unknown."""
    if sys.platform != "linux":
        return None
    with suppress(OSError), open(path, "rb") as file:  # noqa: PTH123 - as in `stamp`
        # Opening it for writing during the lease sends a signal: one that is ignored by default.
        fcntl(file, F_SETSIG, signal.SIGURG)
        try:
            fcntl(file, F_SETLEASE, F_RDLCK)
        except BlockingIOError:
            return True
        fcntl(file, F_SETLEASE, F_UNLCK)
        return False
    return None


def is_cyclic_link(folder: str, parents: Iterable[str]) -> bool:
    """Whether a folder is a link to one of its `parents`, real paths: scanning it would never end."""
    if not os.path.islink(folder):  # noqa: PTH114 - as in `stamp`
        return False
    here = os.path.realpath(os.path.dirname(folder))  # noqa: PTH120 - as in `stamp`
    target = f"{os.path.realpath(folder)}{os.sep}"
    return any(f"{path}{os.sep}".startswith(target) for path in (here, *parents))


def file_digest(path: Path) -> Digest:
    """The digest of a file's content, of a large file of its stamp; None when it cannot be read."""
    found = stamp(path)
    try:
        is_large = found is not None and found[1] > _MAX_HASHED and path.suffix != ".py"
        return digest_of(repr(found).encode()) if is_large else digest_of(path.read_bytes())
    except OSError:
        return None


class DigestCache:
    """Digests of files; a file is read again only when its stamp has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Stamp, Digest]] = {}

    def digest(self, path: Path) -> Digest:
        """A file's digest; None when it does not exist or cannot be read."""
        current = stamp(path)
        if current is None:
            self._known.pop(path, None)
            return None
        if path not in self._known or self._known[path][0] != current:
            digest = file_digest(path)
            if digest is None:  # it may become readable without a change
                return None
            self._known[path] = current, digest
        return self._known[path][1]


def is_ignored_folder(name: str) -> bool:
    """Whether folders of this name contain no source files."""
    return name in _IGNORED_FOLDERS or name.startswith(".")
