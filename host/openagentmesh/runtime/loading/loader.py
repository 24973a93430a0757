"""From an origin to a module with its agents. Never touches NATS."""

import importlib
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from openagentmesh.agent.agent import Agent
from openagentmesh.mesh.module_context import (
    Generation,
    Loading,
    current_loading,
    reset_loading,
    set_loading,
)
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import MeshError, error_text
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.imports import Imports, Stage, without_loop
from openagentmesh.runtime.loading.modules import Source
from openagentmesh.runtime.loading.origins import Origin

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
_OUR_FRAMES: Final = (str(Path(__file__).parents[1]), "<frozen importlib", importlib.__file__ or "importlib")
_OURSELVES: Final = str(Path(__file__).parents[2])


@dataclass(slots=True, eq=False)
class Module:
    """One loaded origin with the agents it declares, or why it could not be loaded.

    Attributes:
        name: the full name that it was imported by; empty before that.
        state: `outdated` is serving still, though what is on disk could not be loaded.
        loose: what it declared past all managed files: it is installed, or imports what is.

    """

    origin: Origin
    name: str = ""
    state: Literal["serving", "failed", "outdated"] = "serving"
    agents: list[Agent] = field(default_factory=list)
    loose: Generation = field(default_factory=Generation)
    error: str = ""
    traceback: str = ""
    line: str = ""

    def fail(self, error: str, details: str = "", line: str = "") -> None:
        """Serve nothing of this module, and say why."""
        self.state, self.error, self.traceback, self.line = "failed", error, details, line
        self.agents.clear()

    def take_over(self, old: "Module") -> None:
        """Go on with what modules that are not managed have declared: they were not executed again."""
        again = {agent.name for agent in self.loose.agents}
        self.loose.agents[:0] = [agent for agent in old.loose.agents if agent.name not in again]
        if not again:
            self.loose.disposals[:0] = old.loose.disposals

    def fail_of(self, exc: BaseException, folders: tuple[str, ...]) -> None:
        """Serve nothing of this module, for an error that its import raised; `folders` are the author's."""
        line = _line(exc, folders) or str(self.origin.path or "")
        self.fail(_explain(exc), _readable_traceback(exc), line)


class Loader:
    """Loads modules for one node, with the settings that a config has for them."""

    def __init__(self, node: Node, config: Config) -> None:
        self._config = config
        self.imports = Imports(self._executing)
        self._node = node
        self._origins: dict[Path, Origin] = {}

    def load(self, origin: Origin, stage: Stage, *, can_be_left: bool = True) -> Module:
        """Load one origin as part of a stage; what goes wrong is told by the module, never raised.

        Only a Ctrl-C leaves it, if it `can_be_left`: a module may hang.
        """
        module = Module(origin)
        self.imports.open()
        try:
            with without_loop():
                copy_context().run(self._import, module, stage)  # what it sets there is gone with it
        # Code of others may raise anything while it is imported, SystemExit among it.
        except BaseException as exc:
            if stage.given_up or (can_be_left and isinstance(exc, KeyboardInterrupt)):
                raise
            module.fail_of(exc, tuple(f"{folder.path}{os.sep}" for folder in self.imports.folders))
        return module

    def close(self) -> None:
        """Find nothing more for the modules that were loaded."""
        self.imports.close()

    def prepare(self, config: Config, origins: Iterable[Origin]) -> None:
        """Know the settings, and which files are loaded for their own sake; look at folders afresh."""
        importlib.invalidate_caches()
        self._config = config
        self._origins = {origin.path: origin for origin in origins if origin.path is not None}

    def name_of(self, origin: Origin) -> str:
        """The full name by which an origin is imported."""
        path = origin.path
        return origin.module if path is None else f"{self.imports.folder(path.parent).package}.{path.stem}"

    def _import(self, module: Module, stage: Stage) -> None:
        origin = module.origin
        if origin.path is None:
            self.imports.package(origin.module)
        elif "." in origin.path.stem:
            raise ImportError(f"'{origin.path.name}' cannot be imported with a dot in its name; rename it")
        module.name = self.name_of(origin)
        with (
            self.imports.loading(stage),
            self._declaring(origin.shown, origin.key, module.loose, module.loose),
        ):
            loaded = importlib.import_module(module.name)
        if origin.attribute:
            getattr(loaded, origin.attribute.partition(".")[0])

    def agents_of(self, modules: Iterable[Module]) -> dict[Module, list[Agent]]:
        """The agents that each module's own files declare; those of a helper go to the first one."""
        modules = list(modules)
        sources, taken = self.imports.sources, {module.name for module in modules}
        found: dict[Module, list[Agent]] = {}
        for module in modules:
            agents = found[module] = []
            if module.state != "failed":
                self._take(sources.get(module.name), agents, taken)
                agents += module.loose.agents
        return found

    def _take(self, source: Source | None, agents: list[Agent], taken: set[str]) -> None:
        if source is None:
            return
        for name in sorted(source.imports):
            if name not in taken:
                taken.add(name)
                self._take(self.imports.sources.get(name), agents, taken)
        agents += source.generation.agents

    @contextmanager
    def _executing(self, source: Source) -> Iterator[None]:
        """Collect what a file declares while it is executed."""
        path = source.path.parent if source.path.name == "__init__.py" else source.path
        origin, outer = self._origins.get(path), current_loading()
        before = self.imports.stage.sources.get(source.name)
        source.generation.before = before.generation if before else None
        if origin is None and outer is not None:
            # A helper: its settings are those of the module that is being loaded.
            with self._declaring(outer.origin, "", source.generation, outer.loose, outer.settings):
                yield
        else:
            key = origin.key if origin else source.path.stem
            loose = outer.loose if outer else source.generation
            with self._declaring(str(source.path), key, source.generation, loose):
                yield

    @contextmanager
    def _declaring(
        self,
        shown: str,
        key: str,
        own: Generation,
        loose: Generation,
        settings: dict[str, Any] | None = None,
    ) -> Iterator[None]:
        settings = self._config.settings.get(key, {}) if settings is None else settings
        token = set_loading(Loading(shown, self._node, own, loose, settings, self._is_managed))
        try:
            yield
        finally:
            reset_loading(token)

    def _is_managed(self, module: str) -> bool:
        return module in self.imports.sources or module in self.imports.stage.sources


def claimed_twice(
    modules: Iterable[Module], agents: dict[Module, list[Agent]]
) -> Iterator[tuple[Module, str, Agent, Agent]]:
    """Modules with a name that an earlier one has: which, why it is refused, its agent, the earlier one."""
    claimed: dict[str, Agent] = {}
    for module in modules:
        twice = next((agent for agent in agents[module] if agent.name in claimed), None)
        if twice is None:
            claimed |= {agent.name: agent for agent in agents[module]}
            continue
        first, second = shown_line(claimed[twice.name].source), shown_line(twice.source)
        why = f"agent '{twice.name}' is declared twice: {first} has it, so {second} is refused"
        yield module, f"{why}; rename one of them", twice, claimed[twice.name]


def shown_line(line: str) -> str:
    """A `file:line`, its file from the working folder on where it lies below it."""
    path = Path(line)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else line


def _explain(exc: BaseException) -> str:
    if isinstance(exc, MeshError):
        return exc.message
    if isinstance(exc, RuntimeError) and any(text in error_text(exc) for text in _LOOP_STARTED):
        return _GUARD
    if isinstance(exc, SystemExit):
        return f"it ends the program while it is imported (sys.exit({exc.code!r}))"
    kind = type(exc).__name__
    if isinstance(exc, SyntaxError):
        return f"{kind}: {exc.msg}"
    if isinstance(exc, ValidationError):
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors(include_url=False)]
        return f"{exc.title}: {'; '.join(wrong)}"
    text = error_text(exc).partition("\n")[0]
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


def _line(exc: BaseException, folders: tuple[str, ...]) -> str:
    """`file:line` where it went wrong: in a file that does not parse, or the last of the author's own."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{exc.filename}:{exc.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith(_OUR_FRAMES)
    ]
    where = [frame for frame in frames if frame.filename.startswith(folders)][-1:] or frames[:1]
    return f"{where[0].filename}:{where[0].lineno}" if where else ""
