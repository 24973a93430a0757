"""From an origin to a module with its agents. Never touches NATS."""

import builtins
import importlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from itertools import count
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, Literal

from pydantic import ValidationError

from openagentmesh.mesh.loading import Loading, reset_loading, set_loading
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import MeshError, text_of
from openagentmesh.runtime.origins import Origin
from openagentmesh.serving.agent import Agent

_LOOP_STARTED: Final = (
    "cannot be called from a running event loop",
    "event loop is already running",
    "while another loop is running",
    "Already running asyncio",
)
_GUARD: Final = (
    "it starts its own event loop while it is imported; put that under "
    '`if __name__ == "__main__":`, so that the file still runs alone and the host can load it'
)
_OUR_FRAMES: Final = (__file__, "<frozen importlib", importlib.__file__ or "importlib")
_OURSELVES: Final = str(Path(__file__).parents[1])


@dataclass(slots=True)
class Module:
    """One loaded source with the agents it declares, or why it could not be loaded."""

    origin: Origin
    state: Literal["serving", "failed"] = "serving"
    agents: list[Agent] = field(default_factory=list)
    error: str = ""
    traceback: str = ""
    line: str = ""

    def fail(self, error: str, details: str = "", line: str = "") -> None:
        """Serve nothing of this module, and say why."""
        self.state, self.error, self.traceback, self.line = "failed", error, details, line
        self.agents.clear()


class Loader:
    """Loads modules for one node, with `settings` as in `[settings.<module>]`.

    The files of one folder import each other by their bare names, as when one of them is run
    alone, and are kept apart from those of other folders.
    """

    def __init__(self, node: Node, settings: Mapping[str, dict[str, Any]], origins: Iterable[Origin]) -> None:
        self._node = node
        self._origins = {origin.path for origin in origins}
        self._settings = settings
        self._folders: dict[Path, _Folder] = {}
        self._finder = _Finder(self)

    def load(self, origin: Origin) -> Module:
        """Load one origin; what goes wrong is told by the module, never raised.

        Only a Ctrl-C leaves it: a module that hangs can be left.
        """
        module = Module(origin)
        if self._finder not in sys.meta_path:
            sys.meta_path.insert(0, self._finder)
        try:
            if origin.path is not None:
                self._load_path(origin.path, module)
            else:
                self._load_dotted(origin, module)
        except KeyboardInterrupt:
            raise
        # Code of others may raise anything while it is imported, SystemExit among it.
        except BaseException as exc:  # noqa: BLE001 - a load ends here, and is told
            module.fail(_explain(exc), _readable_traceback(exc), _line(exc) or str(origin.path or ""))
        return module

    def close(self) -> None:
        """Find nothing more for the modules that were loaded."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for name in [name for name in sys.modules if self.folder_of(name) is not None]:
            del sys.modules[name]

    def _load_path(self, path: Path, module: Module) -> None:
        if "." in path.stem:
            raise ImportError(f"'{path.name}' cannot be imported with a dot in its name; rename it")
        folder = self.folder(path.parent)
        with self.declaring(module.origin.shown, module.origin.key, module.agents):
            importlib.import_module(f"{folder.package}.{path.stem}")
        module.agents += folder.declared.get(path, [])

    def _load_dotted(self, origin: Origin, module: Module) -> None:
        with self.declaring(origin.shown, origin.key, module.agents):
            loaded = importlib.import_module(origin.module)
        if origin.attribute:
            getattr(loaded, origin.attribute.partition(".")[0])

    def is_origin(self, path: Path) -> bool:
        """Whether a file, or a package's folder, is loaded for its own sake."""
        return path in self._origins

    def folder(self, path: Path) -> "_Folder":
        """The folder at `path`, with a package name that nothing else has."""
        if path not in self._folders:
            stem = "".join(c if c.isalnum() else "_" for c in path.name) or "agents"
            names = (f"oam_{stem}{number or ''}" for number in count())
            package = next(name for name in names if name not in sys.modules)
            self._folders[path] = _Folder(path, package)
            parent = sys.modules[package] = ModuleType(package)
            parent.__path__ = [str(path)]
        return self._folders[path]

    def folder_of(self, fullname: str) -> "_Folder | None":
        """The folder to which a module of this full name belongs."""
        package = fullname.partition(".")[0]
        return next((folder for folder in self._folders.values() if folder.package == package), None)

    @contextmanager
    def declaring(self, shown: str, key: str, agents: list[Agent]) -> Iterator[None]:
        """Collect in `agents` what is declared meanwhile."""
        settings = self._settings.get(key, {})
        token = set_loading(Loading(shown, self._node, agents.append, settings))
        try:
            yield
        finally:
            reset_loading(token)


@dataclass(slots=True)
class _Folder:
    """A folder of modules that import each other by their bare names."""

    path: Path
    package: str
    declared: dict[Path, list[Agent]] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        if (self.path / f"{name}.py").is_file() or (self.path / name / "__init__.py").is_file():
            return True
        # A folder without __init__ comes after everything that is installed, as in Python itself.
        return (self.path / name).is_dir() and importlib.util.find_spec(name) is None

    def importer(self) -> Callable[..., ModuleType]:
        """An `__import__` that looks in this folder first."""

        def import_(
            name: str,
            globals: Mapping[str, object] | None = None,  # noqa: A002 - the built-in's own names
            locals: Mapping[str, object] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> ModuleType:
            top = name.partition(".")[0]
            if level or not self.has(top):
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            found = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist or (), 0)
            return found if fromlist else sys.modules[f"{self.package}.{top}"]

        return import_


class _Finder(MetaPathFinder):
    """Finds the modules of the loader's folders."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self._loader.folder_of(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if folder is not None else None
        if folder is None or spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        spec.loader = _FileLoader(fullname, spec.loader.path, self._loader, folder)
        return spec


class _FileLoader(SourceFileLoader):
    """Executes a file of a folder: compiled from what is on disk now, its agents collected."""

    def __init__(self, fullname: str, path: str, loader: Loader, folder: _Folder) -> None:
        super().__init__(fullname, path)
        self._loader = loader
        self._folder = folder

    def get_code(self, fullname: str) -> CodeType | None:
        # A cached .pyc is keyed by whole seconds and size, and misses quick edits.
        path = self.get_filename(fullname)
        linecache.checkcache(path)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": self._folder.importer()}
        path = Path(self.path)
        origin = path.parent if path.name == "__init__.py" else path
        if not self._loader.is_origin(origin):
            # A helper: what it declares belongs to the module that is being loaded.
            super().exec_module(module)
            return
        agents = self._folder.declared[origin] = []
        with self._loader.declaring(self.path, origin.stem, agents):
            super().exec_module(module)


def _explain(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return exc.message
    if isinstance(exc, RuntimeError) and any(text in str(exc) for text in _LOOP_STARTED):
        return _GUARD
    if isinstance(exc, SystemExit):
        return f"it ends the program while it is imported (sys.exit({exc.code!r}))"
    kind = type(exc).__name__
    if isinstance(exc, SyntaxError):
        return f"{kind}: {exc.msg}"
    if isinstance(exc, ValidationError):
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors(include_url=False)]
        return f"{exc.title}: {'; '.join(wrong)}"
    text = text_of(exc).partition("\n")[0]
    return text if text == kind else f"{kind}: {text}"


def _readable_traceback(exc: BaseException) -> str:
    """The traceback from the author's own code on, without the import machinery's frames."""
    # What we refuse in our own words needs no look inside us.
    inside = (*_OUR_FRAMES, _OURSELVES) if isinstance(exc, MeshError) else _OUR_FRAMES
    shown = traceback.TracebackException.from_exception(exc)
    shown.stack = traceback.StackSummary.from_list(
        [frame for frame in shown.stack if not frame.filename.startswith(inside)]
    )
    return "".join(shown.format()).rstrip()


def _line(exc: BaseException) -> str:
    """`file:line` where it went wrong: in a file that does not parse, or where the author's code begins."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{exc.filename}:{exc.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith(_OUR_FRAMES)
    ]
    return f"{frames[0].filename}:{frames[0].lineno}" if frames else ""
