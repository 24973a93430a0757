"""Sources: the files that a host executes as modules, and who of them imported whom."""

import builtins
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import FrameType, ModuleType
from typing import Final
from weakref import WeakSet

from openagentmesh.mesh.module_context import Generation
from openagentmesh.runtime.loading.files import Digest, file_digest

# Where nobody edits: the standard library, and what was installed.
INSTALLED: Final = tuple({sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")})
# What is read from here is no input that somebody edits.
_NO_DATA: Final = (*INSTALLED, "/proc/", "/sys/", "/dev/")


@dataclass(slots=True, eq=False)
class Folder:
    """Modules that belong together: a folder of agent files, or an installed package.

    The files of an agent folder import each other by their bare names, as when one of them is
    run alone, and have a `package` of their own for a first name, so that those of other
    folders are kept apart. A package has the name that it has, with dots when it lies in
    folders without `__init__`, which are not part of it: others have packages there, too.
    """

    path: Path
    package: str
    bare: bool

    @property
    def is_package(self) -> bool:
        """Whether it is an installed package of several files."""
        return not self.bare and self.path.name == self.package.rpartition(".")[2]

    def holds(self, full: str) -> bool:
        """Whether a full name is the package's, or that of something in it."""
        return f"{full}.".startswith(f"{self.package}.")

    def has(self, name: str) -> bool:
        """Whether a bare name is one of this folder's modules."""
        if (self.path / f"{name}.py").is_file() or (self.path / name / "__init__.py").is_file():
            return True
        # A folder without __init__ comes after everything that is installed, as in Python itself.
        return (self.path / name).is_dir() and importlib.util.find_spec(name) is None


@dataclass(slots=True, weakref_slot=True, eq=False)
class Source:
    """One file as it was executed: what was read for it, and what it imported.

    Attributes:
        name: the module's full name.
        path: the file.
        folder: where it belongs.
        digest: of the file's content; None before it was read.
        data: the digests of the files that it read while it was executed, None of those it missed.
        imports: the full names of the managed modules that it imported.
        walked: those of them that it reaches as attributes of their packages.
        sought: bare names that it imported and its folder did not have.
        generation: what it declared.
        pinned: what it imports once it has been replaced: its modules, as they were then.
        stopped: its load was given up; it imports nothing more.
        module: what it was executed as.
        took: how long that took, in seconds.
        outside: for who is not part of the load that is going on, the modules that it replaces.

    """

    name: str
    path: Path
    folder: Folder
    digest: Digest = None
    data: dict[Path, Digest] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    walked: set[str] = field(default_factory=set)
    sought: set[str] = field(default_factory=set)
    generation: Generation = field(default_factory=Generation)
    pinned: dict[str, ModuleType] = field(default_factory=dict)
    stopped: bool = False
    module: ModuleType | None = None
    took: float = 0.0
    outside: Callable[[], Mapping[str, ModuleType]] = dict

    def import_(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - the built-in's own names
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The module's own `__import__`: looks in its folder first, and remembers who was imported."""
        self._end_if_stopped()
        full = self._relative(name, level) if level else self._absolute(name)
        if full is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        self._note(full)
        before = self.pinned or self.outside()
        if full in before:
            return self._of_its_time(full, fromlist, before) if fromlist else self._top(name, level, before)
        try:
            found = builtins.__import__(full, globals, locals, fromlist or (), 0)
        except ModuleNotFoundError as exc:
            self._note_missing(exc.name or "")
            raise
        finally:
            self._end_if_stopped()
        if not fromlist:
            words = full.split(".")
            walked = (".".join(words[: -back or None]) for back in range(name.count(".")))
            self.walked |= {step for step in walked if self.folder.holds(step.rpartition(".")[0])}
            return self._top(name, level, before)
        for item in getattr(found, "__all__", ()) if "*" in fromlist else fromlist:
            if f"{full}.{item}" in sys.modules:
                self._note(f"{full}.{item}")
            elif not hasattr(found, item):
                self._note_missing(f"{full}.{item}")
        return found

    def import_module(self, name: str, package: str | None) -> ModuleType | None:
        """What `importlib.import_module` gives this module; None when that is none of ours."""
        full = self._absolute(importlib.util.resolve_name(name, package))
        return self.import_(full, fromlist=("__name__",)) if full else None

    def note_read(self, path: object) -> None:
        """Remember a file that was opened while this one was executed."""
        if not isinstance(path, str | PathLike) or str(path).startswith(_NO_DATA):
            return
        file = Path(os.path.abspath(path))  # noqa: PTH100 - links are to stay what they are
        if file.suffix in {".py", ".pyc"} or str(file) in _written:
            return
        if file.is_file() or not file.exists():
            self.data.setdefault(file, file_digest(file))
            _readers.setdefault(str(file), WeakSet()).add(self)

    def _end_if_stopped(self) -> None:
        if self.stopped:
            raise SystemExit(f"loading {self.name} was given up")

    def _absolute(self, name: str) -> str | None:
        """The full name of an absolute import that means one of ours, or what ours lie in."""
        if self.folder.holds(name) or f"{self.folder.package}.".startswith(f"{name}."):
            return name
        top = name.partition(".")[0]
        # A function may import again and again; a file of that name is a reload.
        if not self.folder.bare or top in self.sought:
            return None
        ours = f"{self.folder.package}.{top}"
        # What is there already does not depend on the disk: editors take files away for a moment.
        if ours in self.pinned or ours in sys.modules or self.folder.has(top):
            return f"{self.folder.package}.{name}"
        self.sought.add(top)
        return None

    def _relative(self, name: str, level: int) -> str | None:
        """The full name of a relative import; None when it leads out of the package."""
        is_package = self.path.name == "__init__.py"
        words = self.name.split(".")
        kept = len(words) - level + is_package
        return ".".join([*words[:kept], name]).rstrip(".") if kept > 0 else None

    def _top(self, name: str, level: int, before: Mapping[str, ModuleType]) -> ModuleType:
        """What `import a.b` binds: the module of the first name."""
        assert not level, "a relative import names what it wants"
        first = self._absolute(name.partition(".")[0])
        assert first is not None
        return before.get(first) or sys.modules[first]

    def _of_its_time(
        self, full: str, fromlist: Sequence[str], before: Mapping[str, ModuleType]
    ) -> ModuleType:
        """A module as it was when this one was replaced, though its package may have newer modules now."""
        found = before[full]
        names = [(item, f"{full}.{item}") for item in fromlist]
        items = {item: before[name] for item, name in names if name in before}
        if all(vars(found).get(item) is module for item, module in items.items()):
            return found
        then = ModuleType(full)
        vars(then).update(vars(found) | items)
        return then

    def _note(self, full: str) -> None:
        words = full.split(".")
        self.imports |= {".".join(words[: end + 1]) for end in range(len(words))} - {self.name}

    def _note_missing(self, full: str) -> None:
        """Remember where a module would be that is not there."""
        parent, _, child = full.rpartition(".")
        if full in sys.modules or not self.folder.holds(full):
            return
        for place in getattr(sys.modules.get(parent), "__path__", ()):
            self.data |= {Path(place, f"{child}.py"): None, Path(place, child, "__init__.py"): None}


def note_written(path: object) -> None:
    """Take a file that managed code writes for no input of it: each write would be a reload."""
    if not isinstance(path, str | PathLike):
        return
    file = os.fspath(os.path.abspath(path))  # noqa: PTH100 - as above
    if (file in _readers or file.endswith(".py")) and _is_managed_code_running():
        _written.add(file)
        for source in _readers.pop(file, ()):
            source.data.pop(Path(file), None)


def is_written_by_code(path: str) -> bool:
    """Whether managed code has written a file itself."""
    return path in _written


def _is_managed_code_running() -> bool:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - nobody else tells
    while frame is not None:
        if isinstance(getattr(frame.f_builtins.get("__import__"), "__self__", None), Source):
            return True
        frame = frame.f_back
    return False


# Who read which file while executed, and which of these files managed code has written since.
_readers: dict[str, WeakSet[Source]] = {}
_written: set[str] = set()


def importers(sources: Mapping[str, Source], names: set[str]) -> set[str]:
    """These modules and all that have to be replaced with them: who imported them, directly or not.

    A package is, too, when somebody walks from it to one of them: the old package has to keep its
    old modules for those who still run on it.
    """
    found = set(names)
    walked = {name for source in sources.values() for name in source.walked}
    while more := (
        {name for name, source in sources.items() if name not in found and source.imports & found}
        | {name.rpartition(".")[0] for name in walked & found} - found
    ):
        found |= more
    return found


def reached(sources: Mapping[str, Source], names: Iterable[str]) -> set[str]:
    """These modules and all that they imported, directly or not."""
    ahead = list(names)
    found = set(ahead)
    while ahead:
        source = sources.get(ahead.pop())
        more = source.imports - found if source else set()
        found |= more
        ahead += more
    return found
