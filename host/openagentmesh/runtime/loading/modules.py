"""Managed modules: the files that a host executes as Python modules, and what each of them imported."""

import builtins
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from os import PathLike
from pathlib import Path
from types import FrameType, ModuleType
from typing import Final, Protocol
from weakref import WeakSet

from openagentmesh.mesh.module_context import Generation
from openagentmesh.runtime.loading.files import Digest, file_digest

# The standard library and installed packages, which are not edited.
INSTALLED: Final = tuple({sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")})
# Files below these are not inputs of a module.
_NO_DATA: Final = (*INSTALLED, "/proc/", "/sys/", "/dev/")


@dataclass(slots=True, eq=False)
class ModuleRoot:
    """Modules that belong together: a folder of agent files, or a package that is installed to be edited.

    The files of an agent folder import each other by bare names, as when one of them is run alone. They
    have a package name of their own, so that the files of other folders are kept apart. An installed package
    keeps its name, with dots when it lies in namespace packages, which are not part of it.
    """

    path: Path
    package: str
    is_folder: bool

    @property
    def is_package(self) -> bool:
        """Whether it is an installed package of several files."""
        return not self.is_folder and self.path.name == self.package.rpartition(".")[2]

    def contains(self, full: str) -> bool:
        """Whether a full name is the package's, or that of a module in it."""
        return f"{full}.".startswith(f"{self.package}.")

    def has(self, name: str) -> bool:
        """Whether a bare name is one of this folder's modules."""
        if (self.path / f"{name}.py").is_file() or (self.path / name / "__init__.py").is_file():
            return True
        # A folder without __init__ has a lower priority than installed modules, as in Python itself.
        return (self.path / name).is_dir() and importlib.util.find_spec(name) is None


class Importer(Protocol):
    """What executes managed modules: `Imports`."""

    def replaced_modules(self) -> Mapping[str, ModuleType]: ...  # noqa: D102 - as there

    def finding(self) -> AbstractContextManager[None]: ...  # noqa: D102


@dataclass(slots=True, weakref_slot=True, eq=False)
class ManagedModule:
    """One file as it was executed: its content, what it read, and what it imported.

    Attributes:
        digest: of the file's content; None before it was read.
        data: the digests of the files that it read while it was executed, None of missing ones.
        imports: the full names of the managed modules that it imported.
        reached: those of them that it reaches as attributes of their packages.
        missing: bare names that it imported and its folder did not have.
        generation: what it declared.
        pinned: once it is replaced, the modules that its code imports: the versions that it knew.
        is_abandoned: its load was abandoned; it imports nothing more.
    """

    name: str
    path: Path
    root: ModuleRoot
    importer: Importer
    digest: Digest = None
    data: dict[Path, Digest] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    generation: Generation = field(default_factory=Generation)
    pinned: dict[str, ModuleType] = field(default_factory=dict)
    is_abandoned: bool = False
    module: ModuleType | None = None
    took_s: float = 0.0

    def import_(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - the built-in's own names
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The module's own `__import__`: looks in its folder first, and records what was imported."""
        self._check_abandoned()
        full = self._relative(name, level) if level else self._absolute(name)
        if full is None:
            found = builtins.__import__(name, globals, locals, fromlist or (), level)
            # `importlib.import_module` has to find this module's siblings, too.
            return _OwnImportlib(self) if found is importlib and not level else found
        self._record(full)
        older = self.pinned or self.importer.replaced_modules()
        if full in older:
            return self._older(full, fromlist, older) if fromlist else self._first(name, older)
        found = self._import_managed(full, fromlist or ())
        if fromlist:
            self._record_names(found, full, fromlist)
            return found
        self._record_reached(name, full)
        return self._first(name, older)

    def _import_managed(self, full: str, fromlist: Sequence[str]) -> ModuleType:
        try:
            with self.importer.finding():
                return builtins.__import__(full, fromlist=fromlist)
        except ModuleNotFoundError as exc:
            self._record_missing(exc.name or "")
            raise
        finally:
            self._check_abandoned()

    def import_module(self, name: str, package: str | None) -> ModuleType:
        """This module's own `importlib.import_module`."""
        full = self._absolute(importlib.util.resolve_name(name, package))
        return self.import_(full, fromlist=("__name__",)) if full else importlib.import_module(name, package)

    def record_read(self, path: object) -> None:
        """Record a file that was opened while this module was executed."""
        if not isinstance(path, str | PathLike) or str(path).startswith(_NO_DATA):
            return
        file = Path(os.path.abspath(path))  # noqa: PTH100 - links are not resolved
        if file.suffix in {".py", ".pyc"} or str(file) in _written:
            return
        if file.is_file() or not file.exists():
            self.data.setdefault(file, file_digest(file))
            _readers.setdefault(str(file), WeakSet()).add(self)

    def _check_abandoned(self) -> None:
        if self.is_abandoned:
            raise SystemExit(f"loading {self.name} was abandoned")

    def _absolute(self, name: str) -> str | None:
        """The full name of an absolute import of a managed module, or of its namespace; None for others."""
        if self.root.contains(name) or f"{self.root.package}.".startswith(f"{name}."):
            return name
        top = name.partition(".")[0]
        # A function may import on each call; a new file of that name is a reload.
        if not self.root.is_folder or top in self.missing:
            return None
        sibling = f"{self.root.package}.{top}"
        # Loaded modules need no file: editors remove files for a moment.
        if sibling in self.pinned or sibling in sys.modules or self.root.has(top):
            return f"{self.root.package}.{name}"
        self.missing.add(top)
        return None

    def _relative(self, name: str, level: int) -> str | None:
        """The full name of a relative import; None when it leaves the package."""
        is_package = self.path.name == "__init__.py"
        words = self.name.split(".")
        kept = len(words) - level + is_package
        return ".".join([*words[:kept], name]).rstrip(".") if kept > 0 else None

    def _first(self, name: str, older: Mapping[str, ModuleType]) -> ModuleType:
        """What `import a.b` binds: the module of the first word."""
        first = self._absolute(name.partition(".")[0])
        assert first is not None, "a relative import always has a fromlist"
        return older.get(first) or sys.modules[first]

    def _older(self, full: str, fromlist: Sequence[str], older: Mapping[str, ModuleType]) -> ModuleType:
        """An older module; a copy with older submodules if it has newer ones now."""
        found = older[full]
        items = {item: older[f"{full}.{item}"] for item in fromlist if f"{full}.{item}" in older}
        if all(vars(found).get(item) is module for item, module in items.items()):
            return found
        copy = ModuleType(full)
        vars(copy).update(vars(found) | items)
        return copy

    def _record(self, full: str) -> None:
        self.imports |= {*accumulate(full.split("."), "{}.{}".format)} - {self.name}

    def _record_names(self, found: ModuleType, full: str, fromlist: Sequence[str]) -> None:
        """Record the modules among the names of `from … import …`."""
        for item in getattr(found, "__all__", ()) if "*" in fromlist else fromlist:
            if f"{full}.{item}" in sys.modules:
                self._record(f"{full}.{item}")
            elif not hasattr(found, item):
                self._record_missing(f"{full}.{item}")

    def _record_reached(self, name: str, full: str) -> None:
        """Record the modules that `import a.b.c` reaches as attributes of `a`."""
        for _ in range(name.count(".")):
            package = full.rpartition(".")[0]
            if self.root.contains(package):
                self.reached.add(full)
            full = package

    def _record_missing(self, full: str) -> None:
        """Record the files that would be a missing module."""
        parent, _, child = full.rpartition(".")
        if full in sys.modules or not self.root.contains(full):
            return
        for folder in getattr(sys.modules.get(parent), "__path__", ()):
            self.data |= {Path(folder, f"{child}.py"): None, Path(folder, child, "__init__.py"): None}


class _OwnImportlib(ModuleType):
    """`importlib` for one managed module: `import_module` finds the module's siblings."""

    def __init__(self, managed: ManagedModule) -> None:
        super().__init__("importlib")
        # The class has its own `import_module`.
        vars(self).update({name: value for name, value in vars(importlib).items() if name != "import_module"})
        self.managed = managed

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        return self.managed.import_module(name, package)


def record_written(path: object) -> None:
    """A file that managed code writes is not one of its inputs: each write would be a reload."""
    if not isinstance(path, str | PathLike):
        return
    file = os.fspath(os.path.abspath(path))  # noqa: PTH100 - as above
    if (file in _readers or file.endswith(".py")) and _is_managed_code_running():
        _written.add(file)
        for managed in _readers.pop(file, ()):
            managed.data.pop(Path(file), None)


def is_written_by_code(path: str) -> bool:
    """Whether managed code has written a file."""
    return path in _written


def _is_managed_code_running() -> bool:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - no public access
    while frame is not None:
        if isinstance(getattr(frame.f_builtins.get("__import__"), "__self__", None), ManagedModule):
            return True
        frame = frame.f_back
    return False


# Which modules read each file while executed, and which of these files managed code has written since.
_readers: dict[str, WeakSet[ManagedModule]] = {}
_written: set[str] = set()


def importers(modules: Mapping[str, ManagedModule], names: set[str]) -> set[str]:
    """These modules and all that must be replaced with them: their importers, direct or not.

    A package is replaced, too, when one of them is reached as its attribute: the old package must keep its
    old modules for code that still runs.
    """
    found = set(names)
    reached = {name for module in modules.values() for name in module.reached}
    while more := (
        {name for name, module in modules.items() if name not in found and module.imports & found}
        | {name.rpartition(".")[0] for name in reached & found} - found
    ):
        found |= more
    return found


def imported_by(modules: Mapping[str, ManagedModule], names: Iterable[str]) -> set[str]:
    """These modules and all that they imported, directly or not."""
    pending = list(names)
    found = set(pending)
    while pending:
        module = modules.get(pending.pop())
        more = module.imports - found if module else set()
        found |= more
        pending += more
    return found
