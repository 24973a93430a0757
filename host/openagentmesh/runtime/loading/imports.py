"""Importing managed modules: executed from what is on disk, recorded, and restored after a failure."""

import asyncio
import builtins
import importlib.util
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib._bootstrap import _module_locks  # type: ignore[attr-defined]
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from itertools import accumulate, count
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from openagentmesh.runtime.loading.files import digest_of
from openagentmesh.runtime.loading.modules import (
    INSTALLED,
    ManagedModule,
    ModuleRoot,
    imported_by,
    record_written,
)

_executing: ContextVar[ManagedModule | None] = ContextVar("executing", default=None)
_finding_lock = threading.Lock()
_current: ContextVar["ImportTransaction | None"] = ContextVar("import_transaction", default=None)
Executing = Callable[[ManagedModule], AbstractContextManager[None]]


@dataclass(slots=True)
class ImportTransaction:
    """The replacement of some modules, and what it takes to undo it.

    Attributes:
        modules: the old Python modules by their full names.
        attributes: the attributes of packages that were removed: package, name, module.
        executed: the managed modules executed since, failed ones included.
        is_abandoned: nothing more is executed for it.
    """

    modules: dict[str, ModuleType] = field(default_factory=dict)
    attributes: list[tuple[ModuleType, str, ModuleType]] = field(default_factory=list)
    replaced: dict[str, ManagedModule] = field(default_factory=dict)
    executed: list[ManagedModule] = field(default_factory=list)
    is_abandoned: bool = False

    def clear(self) -> None:
        """Hold no modules any more; timers and tasks of the authors may keep the object in their contexts."""
        for each in (self.modules, self.attributes, self.replaced, self.executed):
            each.clear()


class Imports(MetaPathFinder):
    """The managed modules of one host; `executing` wraps the execution of each.

    With `tracks_changes` modules may be reloaded, so imports by others and opened files are recorded.
    Otherwise no hook of Python stays installed.
    """

    def __init__(self, executing: Executing, *, tracks_changes: bool = True) -> None:
        self.modules: dict[str, ManagedModule] = {}
        self.roots: list[ModuleRoot] = []
        self.executing = executing
        self.transaction = ImportTransaction()
        self._tracks_changes = tracks_changes
        self._is_closed = False

    def open(self) -> None:
        """Install the hooks that stay, once."""
        if self._tracks_changes and self not in sys.meta_path and not self._is_closed:
            sys.meta_path.insert(0, self)
            _record_opened_files()

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Let Python find managed modules in the block, when that is not always the case."""
        if self._tracks_changes:
            yield
            return
        # New lists: other threads may be iterating over the one in use, and would skip a finder.
        with _finding_lock:
            sys.meta_path = [self, *sys.meta_path]
        try:
            yield
        finally:
            with _finding_lock:
                rest = list(sys.meta_path)
                rest.remove(self)  # once: another thread may be finding, too
                sys.meta_path = rest

    def close(self) -> None:
        """Remove the hooks and all managed modules."""
        self._is_closed = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        packages = {root.package for root in self.roots if root.is_folder}
        for name in list(sys.modules):
            if name in self.modules or name.partition(".")[0] in packages:
                sys.modules.pop(name, None)
        self.modules.clear()

    def folder(self, path: Path) -> ModuleRoot:
        """The folder of agent files at `path`, with a unique package name."""
        for root in self.roots:
            if root.is_folder and root.path == path:
                return root
        stem = "".join(c if c.isalnum() else "_" for c in path.name) or "agents"
        names = (f"oam_{stem}{number or ''}" for number in count())
        package = next(name for name in names if name not in sys.modules)
        self.roots.append(ModuleRoot(path, package, is_folder=True))
        parent = sys.modules[package] = ModuleType(package)
        parent.__path__ = [str(path)]
        return self.roots[-1]

    def package(self, module: str) -> ModuleRoot | None:
        """The package of a module, when its files may be edited; None for an installed package."""
        found = self._root_of(module)
        spec = None if found else _outermost_spec(module)
        if spec is None or not spec.origin or not spec.has_location or spec.origin.startswith(INSTALLED):
            return found
        self.roots.append(ModuleRoot(Path(spec.origin).parent, spec.name, is_folder=False))
        return self.roots[-1]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a managed module as Python does, with a loader of our own."""
        root = self._root_of(fullname)
        if root is None:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, Imports))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _FileLoader(ManagedModule(fullname, Path(spec.loader.path), root, self), self)
        elif spec is not None and spec.origin is None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            spec.loader = _NamespaceLoader(ManagedModule(fullname, folder, root, self), self)
        return spec

    def _root_of(self, fullname: str) -> ModuleRoot | None:
        return next((root for root in self.roots if root.contains(fullname)), None)

    @contextmanager
    def loading(self, transaction: ImportTransaction) -> Iterator[None]:
        """Record what is executed in the block as part of a transaction."""
        token = _current.set(transaction)
        try:
            yield
        finally:
            _current.reset(token)

    def replaced_modules(self) -> Mapping[str, ModuleType]:
        """The modules that a running reload replaces, for importers that are not part of it."""
        return self.transaction.modules if _current.get() is not self.transaction else {}

    @contextmanager
    def staged(self, names: set[str]) -> Iterator[ImportTransaction]:
        """Take modules out, so that imports in the block execute them again; an error restores them."""
        transaction = self.transaction = self._take_out(names)
        try:
            with self.loading(transaction):
                yield transaction
        except BaseException:
            self._restore(transaction)
            raise
        finally:
            self.transaction = ImportTransaction()  # holds no modules

    def revert(self, transaction: ImportTransaction) -> ImportTransaction:
        """Undo a completed transaction; returns the transaction of what it had loaded."""
        executed, transaction.executed = transaction.executed, []
        undone = self._take_out({managed.name for managed in executed})
        self._restore(transaction)
        return ImportTransaction(undone.modules, replaced=undone.replaced)

    def _take_out(self, names: set[str]) -> ImportTransaction:
        modules = {name: sys.modules[name] for name in names if name in sys.modules}
        replaced = {name: self.modules[name] for name in names if name in self.modules}
        transaction = ImportTransaction(modules, replaced=replaced)
        imported = imported_by(self.modules, replaced)
        pinned = {name: sys.modules[name] for name in imported if name in sys.modules}
        for managed in replaced.values():
            managed.pinned = pinned
        self._clear_path_caches()
        for name, module in modules.items():
            # A package that is replaced, too, keeps its modules: running requests use it.
            if name.rpartition(".")[0] not in names and (attribute := _attribute(name, module)):
                transaction.attributes.append((*attribute, module))
                delattr(*attribute)
        for name in names:
            sys.modules.pop(name, None)
            self.modules.pop(name, None)
        return transaction

    def _clear_path_caches(self) -> None:
        """Make Python list these folders once more: it compares their times, which two changes may share."""
        own = tuple(f"{root.path}{os.sep}" for root in self.roots)
        for path in list(sys.path_importer_cache):  # a copy: other threads may import meanwhile
            if f"{path}{os.sep}".startswith(own):
                sys.path_importer_cache.pop(path, None)

    def _restore(self, transaction: ImportTransaction) -> None:
        """Undo `_take_out`, and all imports since."""
        transaction.is_abandoned = True
        for managed in transaction.executed:
            managed.is_abandoned = True
            # An abandoned thread may hold it for long.
            _module_locks.pop(managed.name, None)
            self.modules.pop(managed.name, None)
            module = sys.modules.pop(managed.name, None)
            if module is not None and (attribute := _attribute(managed.name, module)):
                delattr(*attribute)
        sys.modules.update(transaction.modules)
        for parent, child, module in transaction.attributes:
            setattr(parent, child, module)
        self.modules.update(transaction.replaced)
        for managed in transaction.replaced.values():
            managed.pinned = {}

    def adopt(self, package: ModuleType) -> None:
        """Set the modules of a package that is executed again and that stay as they are."""
        for name in self.modules:
            parent, _, child = name.rpartition(".")
            if parent == package.__name__ and name in sys.modules:
                setattr(package, child, sys.modules[name])

    def repair(self) -> None:
        """Restore what an abandoned load removed from `sys.modules` when it ended."""
        for name, managed in self.modules.items():
            if managed.module is not None:
                sys.modules.setdefault(name, managed.module)


def _outermost_spec(module: str) -> ModuleSpec | None:
    """The outermost package of a module that is not a namespace, unless it is imported already."""
    for name in accumulate(module.split("."), "{}.{}".format):
        imported = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if imported is None else imported.__spec__
        if spec is None or spec.origin:
            return spec if imported is None else None
    return None


def _attribute(name: str, module: ModuleType) -> tuple[ModuleType, str] | None:
    """The package that has a module as an attribute, and the attribute's name."""
    parent, _, child = name.rpartition(".")
    package = sys.modules.get(parent)
    return (package, child) if package is not None and vars(package).get(child) is module else None


class _FileLoader(SourceFileLoader):
    """Executes a managed file: compiled from what is on disk, with its imports recorded."""

    def __init__(self, managed: ManagedModule, imports: Imports) -> None:
        super().__init__(managed.name, str(managed.path))
        self._managed = managed
        self._imports = imports

    def get_code(self, fullname: str) -> CodeType | None:
        """The file's code, never that of a cached .pyc, which misses quick edits."""
        path = self.get_filename(fullname)
        linecache.checkcache(path)
        content = self.get_data(path)
        self._managed.digest = digest_of(content)
        return self.source_to_code(content, path)

    def exec_module(self, module: ModuleType) -> None:
        """Execute it, with an `__import__` of its own."""
        managed, imports = self._managed, self._imports
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": managed.import_}
        if self.is_package(managed.name):
            imports.adopt(module)
        transaction = _current.get()
        if transaction is not None and transaction.is_abandoned:
            raise SystemExit("the load that this belongs to was abandoned")
        managed.module = module
        imports.modules[managed.name] = managed
        if transaction is not None:
            transaction.executed.append(managed)
        token, began = _executing.set(managed), time.perf_counter()
        try:
            with imports.executing(managed):
                super().exec_module(module)
        except BaseException:
            if imports.modules.get(managed.name) is managed:
                del imports.modules[managed.name]
            # Python would remove the restored module. The importing module ends by itself.
            if not managed.is_abandoned:
                raise
        finally:
            managed.took_s = time.perf_counter() - began
            _executing.reset(token)


class _NamespaceLoader(Loader):
    """Creates a package for a folder without `__init__.py`."""

    def __init__(self, managed: ManagedModule, imports: Imports) -> None:
        self._managed = managed
        self._imports = imports

    def exec_module(self, module: ModuleType) -> None:
        """Record it; there is nothing to execute."""
        self._imports.adopt(module)
        if (transaction := _current.get()) is not None:
            transaction.executed.append(self._managed)


@contextmanager
def no_running_loop() -> Iterator[None]:
    """Let code in the block neither use nor start an event loop: a program's main would never end."""
    previous = asyncio._get_running_loop()  # noqa: SLF001 - for implementations of loops
    asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", _ImportTimeLoop()))  # noqa: SLF001 - as above
    try:
        yield
    finally:
        asyncio._set_running_loop(previous)  # noqa: SLF001 - as above


class _ImportTimeLoop:
    """Stands for the running loop while a module is imported."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute
        if name.startswith("run_"):
            raise RuntimeError("This event loop is already running")
        raise RuntimeError(
            "no task can be started while a module is imported: it would outlive the module's next version. "
            "Make it a watcher, an agent without input and output"
        )


@cache
def _record_opened_files() -> None:
    """Record every file that a managed module reads while executed, and that managed code writes."""

    def record(event: str, args: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = args
        if flags & (os.O_WRONLY | os.O_RDWR):
            record_written(path)
        elif (managed := _executing.get()) is not None:
            _executing.set(None)  # so that reading it here is not recorded
            try:
                managed.record_read(path)
            finally:
                _executing.set(managed)

    sys.addaudithook(record)  # once: it cannot be removed
