"""From an origin to a module with its agents. Never touches NATS."""

import importlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.mesh.module_context import (
    Generation,
    LoadingModule,
    current_module,
    reset_current_module,
    set_current_module,
)
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import MeshError, error_text, valid_text
from openagentmesh.protocol.status import ModuleStatus
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.imports import Imports, ImportTransaction, no_running_loop
from openagentmesh.runtime.loading.modules import ManagedModule
from openagentmesh.runtime.loading.origins import Origin

_LOOP_STARTED: Final = (
    "cannot be called from a running event loop",
    "event loop is already running",
    "while another loop is running",
    "Already running asyncio",
)
_LOOP_ADVICE: Final = (
    "it starts its own event loop while it is imported; put that under "
    '`if __name__ == "__main__":`, so that the file still runs alone and the host can load it'
)
_RUNTIME: Final = str(Path(__file__).parents[1])
_PACKAGE: Final = str(Path(__file__).parents[2])
_IMPORT_FRAMES: Final = (_RUNTIME, "<frozen importlib", importlib.__file__ or "importlib")
# What `oam status` shows of a traceback.
_MAX_TRACEBACK: Final = 2000
Prepare = Callable[[AgentVersion, Config], AgentVersion]
"""Adds limits and middlewares to an agent."""


@dataclass(slots=True, eq=False)
class Module:
    """One loaded origin with the agents it declares, or why it could not be loaded.

    Attributes:
        name: the full name of the Python module; empty before it was imported.
        state: `outdated` when an older version serves, because the newer one could not be loaded.
        unmanaged: what modules declare that are not executed again, such as installed packages.
        error: why it could not be loaded; `traceback` and `line`, as `file:line`, are of that error.
    """

    origin: Origin
    name: str = ""
    state: Literal["serving", "failed", "outdated"] = "serving"
    agents: list[AgentVersion] = field(default_factory=list)
    unmanaged: Generation = field(default_factory=Generation)
    error: str = ""
    traceback: str = ""
    line: str = ""

    def fail(self, error: str, details: str = "", line: str = "") -> None:
        """Serve nothing of this module."""
        self.set_error("failed", error, details, line)
        self.agents.clear()

    def set_error(
        self, state: Literal["failed", "outdated"], error: str, details: str = "", line: str = ""
    ) -> None:
        """Set the state and its reason."""
        self.state, self.error, self.traceback, self.line = state, error, details, line

    def clear_error(self) -> None:
        """It serves what is on disk."""
        self.state, self.error, self.traceback, self.line = "serving", "", "", ""

    def take_over(self, old: "Module") -> None:
        """Take over the declarations of unmanaged modules, which are not executed again."""
        own = {agent.name for agent in self.unmanaged.agents}
        self.unmanaged.agents[:0] = [agent for agent in old.unmanaged.agents if agent.name not in own]
        if not own:
            self.unmanaged.disposals[:0] = old.unmanaged.disposals

    def status(self) -> ModuleStatus:
        """Its state, for `oam status`."""
        return ModuleStatus(
            origin=self.origin.display_name,
            state=self.state,
            agents=len(self.agents),
            error=self.error,
            line=self.line,
            traceback=self.traceback[-_MAX_TRACEBACK:],
        )


class Loader:
    """Loads modules for one node, with their settings in a config."""

    def __init__(self, node: Node, config: Config) -> None:
        self._config = config
        self.imports = Imports(self._executing, tracks_changes=config.host.reload)
        self._node = node
        self._origins: dict[Path, Origin] = {}

    def load(self, origin: Origin, transaction: ImportTransaction, *, may_interrupt: bool = True) -> Module:
        """Load one origin as part of a transaction; errors are stored in the module, never raised.

        A Ctrl-C is raised if it `may_interrupt`: a module may hang.
        """
        module = Module(origin)
        self.imports.open()
        try:
            with no_running_loop():
                copy_context().run(self._import, module, transaction)  # isolates context variables
        # An import may raise anything, SystemExit included.
        except BaseException as exc:
            if transaction.is_abandoned or (may_interrupt and isinstance(exc, KeyboardInterrupt)):
                raise
            folders = tuple(f"{root.path}{os.sep}" for root in self.imports.roots)
            line = _line(exc, folders) or str(origin.path or "")
            module.fail(_explain(exc), _readable_traceback(exc), line)
        return module

    def prepare(self, config: Config, origins: Iterable[Origin]) -> None:
        """Use these settings and origins for the following loads; list folders again."""
        importlib.invalidate_caches()
        self._config = config
        self._origins = {origin.path: origin for origin in origins if origin.path is not None}

    def _import(self, module: Module, transaction: ImportTransaction) -> None:
        origin = module.origin
        if origin.path is None:
            self.imports.package(origin.module)
            module.name = origin.module
        elif "." in origin.path.stem:
            raise ImportError(f"'{origin.path.name}' cannot be imported with a dot in its name; rename it")
        else:
            module.name = f"{self.imports.folder(origin.path.parent).package}.{origin.path.stem}"
        with (
            self.imports.loading(transaction),
            self.imports.finding(),
            self._declaring(
                origin.display_name, self._settings_of(origin.key), module.unmanaged, module.unmanaged
            ),
        ):
            imported = importlib.import_module(module.name)
        if origin.attribute:
            getattr(imported, origin.attribute.partition(".")[0])

    def agents_of(self, modules: Iterable[Module]) -> dict[Module, list[AgentVersion]]:
        """The agents that each module's own files declare; those of a helper belong to its first importer."""
        modules = list(modules)
        taken = {module.name for module in modules}
        found: dict[Module, list[AgentVersion]] = {}
        for module in modules:
            agents = found[module] = []
            if module.state != "failed":
                self._collect(self.imports.modules.get(module.name), agents, taken)
                agents += module.unmanaged.agents
        return found

    def _collect(self, managed: ManagedModule | None, agents: list[AgentVersion], taken: set[str]) -> None:
        if managed is None:
            return
        for name in sorted(managed.imports):
            if name not in taken:
                taken.add(name)
                self._collect(self.imports.modules.get(name), agents, taken)
        agents += managed.generation.agents

    @contextmanager
    def _executing(self, managed: ManagedModule) -> Iterator[None]:
        """Collect what a file declares while it is executed."""
        path = managed.path.parent if managed.path.name == "__init__.py" else managed.path
        origin, outer = self._origins.get(path), current_module()
        previous = self.imports.transaction.replaced.get(managed.name)
        managed.generation.previous = previous.generation if previous else None
        if origin is None and outer is not None:
            # A helper: its settings are those of the module that imports it.
            name, settings = outer.origin, outer.settings
        else:
            name, settings = str(managed.path), self._settings_of(origin.key if origin else managed.path.stem)
        unmanaged = outer.unmanaged if outer else managed.generation
        with self._declaring(name, settings, managed.generation, unmanaged):
            yield

    @contextmanager
    def _declaring(
        self, display_name: str, settings: dict[str, Any], own: Generation, unmanaged: Generation
    ) -> Iterator[None]:
        loading = LoadingModule(display_name, self._node, own, unmanaged, settings, self._is_managed)
        token = set_current_module(loading)
        try:
            yield
        finally:
            reset_current_module(token)

    def _settings_of(self, key: str) -> dict[str, Any]:
        return self._config.settings.get(key, {})

    def _is_managed(self, module: str) -> bool:
        return module in self.imports.modules or module in self.imports.transaction.replaced


@dataclass(slots=True, frozen=True)
class Duplicate:
    """A module with an agent whose name an earlier module declares."""

    module: Module
    agent: AgentVersion
    earlier: AgentVersion

    @property
    def error(self) -> str:
        """What is wrong and what to do."""
        first, second = display_line(self.earlier.source), display_line(self.agent.source)
        return (
            f"agent '{self.agent.name}' is declared twice: {first} has it, so {second} is refused; "
            "rename one of them"
        )


def find_duplicates(
    modules: Iterable[Module], agents: dict[Module, list[AgentVersion]]
) -> Iterator[Duplicate]:
    """The modules with an agent whose name an earlier module declares."""
    declared: dict[str, AgentVersion] = {}
    for module in modules:
        twice = next((agent for agent in agents[module] if agent.name in declared), None)
        if twice is None:
            declared |= {agent.name: agent for agent in agents[module]}
        else:
            yield Duplicate(module, twice, declared[twice.name])


def display_line(line: str) -> str:
    """A `file:line`, relative to the working folder where it lies below it."""
    path = Path(line)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else line


def _explain(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return exc.message
    if isinstance(exc, RuntimeError) and any(text in error_text(exc) for text in _LOOP_STARTED):
        return _LOOP_ADVICE
    if isinstance(exc, SystemExit):
        return f"it ends the program while it is imported (sys.exit({exc.code!r}))"
    kind = type(exc).__name__
    if isinstance(exc, SyntaxError):
        return f"{kind}: {exc.msg}"
    if isinstance(exc, ValidationError):
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors(include_url=False)]
        return f"{exc.title}: {'; '.join(problems)}"
    text = error_text(exc).partition("\n")[0]
    return text if text == kind else f"{kind}: {text}"


def authors_frames(
    stack: traceback.StackSummary, hidden: tuple[str, ...] = _IMPORT_FRAMES
) -> traceback.StackSummary:
    """A stack without the frames of the host's runtime and the import machinery."""
    return traceback.StackSummary.from_list(
        [frame for frame in stack if not frame.filename.startswith(hidden)]
    )


def _readable_traceback(exc: BaseException) -> str:
    shown = traceback.TracebackException.from_exception(exc)
    # Errors of the mesh are complete without its frames.
    hidden = (*_IMPORT_FRAMES, _PACKAGE) if isinstance(exc, MeshError) else _IMPORT_FRAMES
    shown.stack = authors_frames(shown.stack, hidden)
    return valid_text("".join(shown.format()).rstrip())


def _line(exc: BaseException, folders: tuple[str, ...]) -> str:
    """`file:line` of an error: in a file that does not parse, or the last frame of the author's own."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{exc.filename}:{exc.lineno}"
    frames = authors_frames(traceback.extract_tb(exc.__traceback__))
    own = [frame for frame in frames if frame.filename.startswith(folders)][-1:] or frames[:1]
    return f"{own[0].filename}:{own[0].lineno}" if own else ""
