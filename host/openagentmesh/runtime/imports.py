"""Imports of managed modules: executed from what is on disk now, recorded, and put back when it fails."""

import asyncio
import builtins
import importlib
import importlib.util
import linecache
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from itertools import count
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, cast

from openagentmesh.runtime.disk import digest_of
from openagentmesh.runtime.sources import INSTALLED, Folder, Source

_IMPORT_RE: Final = re.compile(
    r"^[ \t]*(?:from[ \t]+(\w[\w.]*)[ \t]+import\b|import[ \t]+(\w[\w., \t]*))", re.MULTILINE
)
_executing: ContextVar[Source | None] = ContextVar("executing", default=None)
Executing = Callable[[Source], AbstractContextManager[None]]


@dataclass(slots=True)
class Stage:
    """Modules that were taken out to be executed anew, and what it takes to put them back.

    Attributes:
        modules: the old modules by their full names.
        attributes: where else they hung: parent, name, module.
        sources: what they were made from.
        executed: what was executed since, failures among it.

    """

    modules: dict[str, ModuleType] = field(default_factory=dict)
    attributes: list[tuple[ModuleType, str, ModuleType]] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    executed: list[Source] = field(default_factory=list)


class Imports(MetaPathFinder):
    """The managed modules of one host; `executing` wraps the execution of each."""

    def __init__(self, executing: Executing) -> None:
        self.sources: dict[str, Source] = {}
        self.folders: list[Folder] = []
        self.executing = executing
        self.stage = Stage()
        self._import_module = importlib.import_module

    def open(self) -> None:
        """Find the managed modules from now on, unless that is done."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
            self._import_module = importlib.import_module
            importlib.import_module = self._import  # siblings are found by dynamic imports too
            _note_opened_files()

    def close(self) -> None:
        """Find nothing more, and forget what was loaded."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module = self._import_module
        for name in [*self.sources, *[folder.package for folder in self.folders if folder.bare]]:
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

    def package(self, name: str) -> Folder | None:
        """The package or module of this first name, when its files may be edited: not an installed one."""
        for folder in self.folders:
            if folder.package == name:
                return folder
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is None or not spec.origin or spec.origin.startswith(INSTALLED):
            return None
        self.folders.append(Folder(Path(spec.origin).parent, name, bare=False))
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
            source = Source(fullname, Path(spec.loader.path), folder)
            spec.loader = _FileLoader(source, self)
        return spec

    def _folder_of(self, fullname: str) -> Folder | None:
        package = fullname.partition(".")[0]
        return next((folder for folder in self.folders if folder.package == package), None)

    def _import(self, name: str, package: str | None = None) -> ModuleType:
        """`importlib.import_module`, which finds the siblings of the file that calls it."""
        asking = self.sources.get(sys._getframe(1).f_globals.get("__name__", ""))  # noqa: SLF001 - nobody else tells
        found = asking.import_module(name, package) if asking is not None else None
        return self._import_module(name, package) if found is None else found

    def take_out(self, names: set[str]) -> Stage:
        """Take modules out, so that the next import executes them anew.

        The old ones go on with what they have imported.
        """
        modules = {name: sys.modules[name] for name in names if name in sys.modules}
        self.stage = Stage(modules, sources={n: self.sources[n] for n in names if n in self.sources})
        for source in self.stage.sources.values():
            source.pinned = modules
        for name, module in modules.items():
            parent, child = _place(name)
            if parent is not None and vars(parent).get(child) is module:
                self.stage.attributes.append((parent, child, module))
                delattr(parent, child)
        for name in names:
            sys.modules.pop(name, None)
            self.sources.pop(name, None)
        return self.stage

    def put_back(self, stage: Stage) -> None:
        """Undo `take_out`, and all that was imported since."""
        for source in stage.executed:
            source.stopped = True
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

    def mend(self) -> None:
        """Put back what a load that was given up took out of `sys.modules` when it ended."""
        for name, source in self.sources.items():
            if source.module is not None:
                sys.modules.setdefault(name, source.module)


def imports_anew(path: Path) -> bool:
    """Whether a file seems to import what nobody has imported yet, which may take long."""
    try:
        found = _IMPORT_RE.findall(path.read_text(encoding="utf-8"))
        here = {entry.name.removesuffix(".py") for entry in path.parent.iterdir()}
    except (OSError, UnicodeDecodeError):
        return False  # loading it will say so
    names = {name.partition(" as ")[0].strip() for match in found for name in "".join(match).split(",")}
    return any(name not in sys.modules and name.partition(".")[0] not in here for name in names)


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
        # A package that is executed anew has those of its modules that are not.
        for name in imports.sources:
            parent, _, child = name.rpartition(".")
            if parent == source.name and name in sys.modules:
                setattr(module, child, sys.modules[name])
        source.module = module
        imports.sources[source.name] = source
        imports.stage.executed.append(source)
        token, began = _executing.set(source), time.perf_counter()
        try:
            with imports.executing(source):
                super().exec_module(module)
        except BaseException:
            if imports.sources.get(source.name) is source:
                del imports.sources[source.name]
            raise
        finally:
            source.took = time.perf_counter() - began
            _executing.reset(token)


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
def _note_opened_files() -> None:
    """Let every file that a managed module reads while it is executed be noted; once, for good."""

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and (source := _executing.get()) is not None:
            _executing.set(None)  # reading it here is not the module's doing
            try:
                source.note_read(*args)
            finally:
                _executing.set(source)

    sys.addaudithook(note)
