"""Imports of managed modules: executed from what is on disk now, recorded, and put back when it fails."""

import asyncio
import builtins
import importlib
import importlib.util
import linecache
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib._bootstrap import _module_locks  # type: ignore[attr-defined]
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from itertools import accumulate, count
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from openagentmesh.runtime.loading.files import digest_of
from openagentmesh.runtime.loading.modules import INSTALLED, Folder, Source, note_written, reached

_executing: ContextVar[Source | None] = ContextVar("executing", default=None)
_staged: ContextVar["Stage | None"] = ContextVar("staged", default=None)
Executing = Callable[[Source], AbstractContextManager[None]]


@dataclass(slots=True)
class Stage:
    """Modules that were taken out to be executed anew, and what it takes to put them back.

    Attributes:
        modules: the old modules by their full names.
        attributes: where else they hung: parent, name, module.
        sources: what they were made from.
        executed: what was executed since, failures among it.
        given_up: nothing more is to be executed for it.

    """

    modules: dict[str, ModuleType] = field(default_factory=dict)
    attributes: list[tuple[ModuleType, str, ModuleType]] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    executed: list[Source] = field(default_factory=list)
    given_up: bool = False


class Imports(MetaPathFinder):
    """The managed modules of one host; `executing` wraps the execution of each."""

    def __init__(self, executing: Executing) -> None:
        self.sources: dict[str, Source] = {}
        self.folders: list[Folder] = []
        self.executing = executing
        self.stage = Stage()
        self._closed = False

    def open(self) -> None:
        """Find the managed modules from now on, unless that is done."""
        if self not in sys.meta_path and not self._closed:
            sys.meta_path.insert(0, self)
            _find_siblings_dynamically()
            _note_opened_files()

    def close(self) -> None:
        """Find nothing more, and forget what was loaded."""
        self._closed = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        ours = {folder.package for folder in self.folders if folder.bare}
        for name in [*self.sources, *[name for name in sys.modules if name.partition(".")[0] in ours]]:
            sys.modules.pop(name, None)
        self.sources.clear()

    def folder(self, path: Path) -> Folder:
        """The folder of agent files at `path`, with a package name that nothing else has."""
        for folder in self.folders:
            if folder.bare and folder.path == path:
                return folder
        stem = "".join(c if c.isalnum() else "_" for c in path.name) or "agents"
        names = (f"oam_{stem}{number or ''}" for number in count())
        package = next(name for name in names if name not in sys.modules)
        self.folders.append(Folder(path, package, bare=True))
        parent = sys.modules[package] = ModuleType(package)
        parent.__path__ = [str(path)]
        return self.folders[-1]

    def package(self, module: str) -> Folder | None:
        """What a module is part of, when its files may be edited: not an installed package."""
        found = self._folder_of(module)
        spec = None if found else _outermost(module)
        if spec is None or not spec.origin or not spec.has_location or spec.origin.startswith(INSTALLED):
            return found
        self.folders.append(Folder(Path(spec.origin).parent, spec.name, bare=False))
        return self.folders[-1]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a managed module as everybody would, but execute it in our way."""
        folder = self._folder_of(fullname)
        if folder is None:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, Imports))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            source = Source(fullname, Path(spec.loader.path), folder, outside=self._outside)
            spec.loader = _FileLoader(source, self)
        elif spec is not None and spec.origin is None and spec.submodule_search_locations:
            place = Path(next(iter(spec.submodule_search_locations)))
            spec.loader = _FolderLoader(Source(fullname, place, folder), self)
        return spec

    def _folder_of(self, fullname: str) -> Folder | None:
        return next((folder for folder in self.folders if folder.holds(fullname)), None)

    @contextmanager
    def loading(self, stage: Stage) -> Iterator[None]:
        """Take what is executed meanwhile, in this context, for part of a stage."""
        token = _staged.set(stage)
        try:
            yield
        finally:
            _staged.reset(token)

    def _outside(self) -> Mapping[str, ModuleType]:
        """The modules that are being replaced, for who is not part of that and would have to wait."""
        return self.stage.modules if _staged.get() is not self.stage else {}

    def take_out(self, names: set[str]) -> Stage:
        """Take modules out, so that the next import executes them anew.

        The old ones go on with what they have imported.
        """
        modules = {name: sys.modules[name] for name in names if name in sys.modules}
        self.stage = Stage(modules, sources={n: self.sources[n] for n in names if n in self.sources})
        theirs = reached(self.sources, self.stage.sources)
        pinned = {name: sys.modules[name] for name in theirs if name in sys.modules}
        for source in self.stage.sources.values():
            source.pinned = pinned
        self._forget_listings()
        for name, module in modules.items():
            parent, child = _place(name)
            # A package that is replaced, too, keeps its modules: requests in flight run on it.
            if (
                parent is not None
                and name.rpartition(".")[0] not in names
                and vars(parent).get(child) is module
            ):
                self.stage.attributes.append((parent, child, module))
                delattr(parent, child)
        for name in names:
            sys.modules.pop(name, None)
            self.sources.pop(name, None)
        return self.stage

    def _forget_listings(self) -> None:
        """Let Python look at our folders again: it goes by their times, which two changes may share."""
        ours = tuple(f"{folder.path}{os.sep}" for folder in self.folders)
        for place in [place for place in sys.path_importer_cache if f"{place}{os.sep}".startswith(ours)]:
            del sys.path_importer_cache[place]

    def put_back(self, stage: Stage) -> None:
        """Undo `take_out`, and all that was imported since."""
        stage.given_up = True
        for source in stage.executed:
            source.stopped = True
            # A thread that was left may hold it for long yet.
            _module_locks.pop(source.name, None)
            self.sources.pop(source.name, None)
            module = sys.modules.pop(source.name, None)
            parent, child = _place(source.name)
            if module is not None and parent is not None and vars(parent).get(child) is module:
                delattr(parent, child)
        sys.modules.update(stage.modules)
        for parent, child, module in stage.attributes:
            setattr(parent, child, module)
        self.sources.update(stage.sources)
        for source in stage.sources.values():
            source.pinned = {}

    def adopt(self, package: ModuleType) -> None:
        """Give a package that is made anew those of its modules that are not."""
        for name in self.sources:
            parent, _, child = name.rpartition(".")
            if parent == package.__name__ and name in sys.modules:
                setattr(package, child, sys.modules[name])

    def mend(self) -> None:
        """Put back what a load that was given up took out of `sys.modules` when it ended."""
        for name, source in self.sources.items():
            if source.module is not None:
                sys.modules.setdefault(name, source.module)


def _outermost(module: str) -> ModuleSpec | None:
    """The first on the way to a module that is more than a folder, unless it is imported already."""
    for name in accumulate(module.split("."), "{}.{}".format):
        imported = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if imported is None else imported.__spec__
        if spec is None or spec.origin:
            return spec if imported is None else None
    return None


def _place(name: str) -> tuple[ModuleType | None, str]:
    """Where a module hangs: its parent and its name there."""
    parent, _, child = name.rpartition(".")
    return sys.modules.get(parent), child


class _FileLoader(SourceFileLoader):
    """Executes a managed file: compiled from what is on disk now, what it needs recorded."""

    def __init__(self, source: Source, imports: Imports) -> None:
        super().__init__(source.name, str(source.path))
        self._source = source
        self._imports = imports

    def get_code(self, fullname: str) -> CodeType | None:
        """The file's code, never that of a cached .pyc, which misses quick edits."""
        path = self.get_filename(fullname)
        linecache.checkcache(path)
        content = self.get_data(path)
        self._source.digest = digest_of(content)
        return self.source_to_code(content, path)

    def exec_module(self, module: ModuleType) -> None:
        """Execute it, with an `__import__` of its own."""
        source, imports = self._source, self._imports
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": source.import_}
        if self.is_package(source.name):
            imports.adopt(module)
        stage = _staged.get()
        if stage is not None and stage.given_up:
            raise SystemExit("the load that this belongs to was given up")
        source.module = module
        imports.sources[source.name] = source
        if stage is not None:
            stage.executed.append(source)
        token, began = _executing.set(source), time.perf_counter()
        try:
            with imports.executing(source):
                super().exec_module(module)
        except BaseException:
            if imports.sources.get(source.name) is source:
                del imports.sources[source.name]
            # Python would take away the module that was put back. Who imported this one ends by itself.
            if not source.stopped:
                raise
        finally:
            source.took = time.perf_counter() - began
            _executing.reset(token)


class _FolderLoader(Loader):
    """Makes a package of a folder without `__init__.py`."""

    def __init__(self, source: Source, imports: Imports) -> None:
        self._source = source
        self._imports = imports

    def exec_module(self, module: ModuleType) -> None:
        """Execute nothing, for there is nothing, but know that it is there."""
        self._imports.adopt(module)
        if (stage := _staged.get()) is not None:
            stage.executed.append(self._source)


@contextmanager
def without_loop() -> Iterator[None]:
    """Let nothing run or start an event loop meanwhile: a program's main would never end."""
    before = asyncio._get_running_loop()  # noqa: SLF001 - made for those who implement loops
    asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", _ImportTime()))  # noqa: SLF001 - as above
    try:
        yield
    finally:
        asyncio._set_running_loop(before)  # noqa: SLF001 - as above


class _ImportTime:
    """Stands for the running loop while a module is imported."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as of any object
        if name.startswith("run_"):
            raise RuntimeError("This event loop is already running")
        raise RuntimeError(
            "no task can be started while a module is imported: it would outlive the module's next version. "
            "Make it a watcher, an agent without input and output"
        )


@cache
def _find_siblings_dynamically() -> None:
    """Let `importlib.import_module` find the siblings of the managed file that calls it; for good."""
    import_module = importlib.import_module

    @wraps(import_module)
    def find(name: str, package: str | None = None) -> ModuleType:
        # Not by its name: it may have been replaced.
        asking = sys._getframe(1).f_builtins.get("__import__")  # noqa: SLF001 - nobody else tells
        source = getattr(asking, "__self__", None)
        found = source.import_module(name, package) if isinstance(source, Source) else None
        return import_module(name, package) if found is None else found

    importlib.import_module = find


@cache
def _note_opened_files() -> None:
    """Let every file be noted that a managed module reads while executed, and that is written; for good."""

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, _, flags = args
        if flags & (os.O_WRONLY | os.O_RDWR):
            note_written(path)
        elif (source := _executing.get()) is not None:
            _executing.set(None)  # reading it here is not the module's doing
            try:
                source.note_read(path)
            finally:
                _executing.set(source)

    sys.addaudithook(note)
