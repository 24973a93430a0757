"""The plugins of one mesh, in their order; called one by one, so that errors name the plugin."""

import asyncio
import logging
from collections.abc import AsyncIterator, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import isasyncgenfunction, iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy
from pydantic import BaseModel, ValidationError

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.client_middleware import ClientMiddlewares
from openagentmesh.hooks import specs
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.protocol.errors import MeshError, PluginFailed, error_text

if TYPE_CHECKING:
    from typer import Typer

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S: Final = 5.0
Tables = Mapping[str, dict[str, Any]]


@dataclass(slots=True, eq=False)
class Plugin:
    """One plugin: its name, the object that implements its hooks, and its settings in force."""

    name: str
    implementation: object
    settings: BaseModel | None = None


class Plugins:
    """Plugins in the order of their middlewares, the first one outermost.

    `implementations` are objects that implement hooks, by name; a class is called without arguments. One that
    implements no hook, or an unknown one, raises PluginFailed.
    """

    def __init__(self, implementations: Mapping[str, object] | None = None) -> None:
        # Agents that hooks were called for, until they are unloaded.
        self._known_agents: set[str] = set()
        self.all = [
            Plugin(name, self._registered(name, each)) for name, each in (implementations or {}).items()
        ]

    @cached_property
    def _manager(self) -> pluggy.PluginManager:
        # Created with the first plugin: meshes in a host's modules have none, and creating it takes
        # a fifth of the time of a reload.
        manager = pluggy.PluginManager(specs.NAME)
        manager.add_hookspecs(specs.Hooks)
        return manager

    @classmethod
    def of(cls, implementations: Iterable[object]) -> "Plugins":
        """Plugins with settings of their own, as `AgentMesh(plugins=[…])` takes them."""
        return cls(cls.named(implementations))

    @staticmethod
    def named(implementations: Iterable[object]) -> dict[str, object]:
        """Objects that implement hooks, by the names of their classes or modules."""
        found: dict[str, object] = {}
        for each in implementations:
            name = getattr(each, "__name__", type(each).__name__).rpartition(".")[2].lower()
            found[name if name not in found else f"{name}-{len(found) + 1}"] = each
        return found

    def check_includes(self, others: Sequence[object], origin: str) -> None:
        """Raise PluginFailed unless all plugins that a module passes to its mesh are in force here."""
        if missing := self.named(others).keys() - {plugin.name for plugin in self.all}:
            name = min(missing)
            raise PluginFailed(
                f"{origin} uses the plugin '{name}', but in a host only the plugins of mesh.toml are in "
                "force. Enable it there: [host] plugins.",
                details={"plugin": name},
            )

    def _registered(self, name: str, implementation: object) -> object:
        with _named(name, "cannot be used", unchanged=()):
            created = implementation() if isinstance(implementation, type) else implementation
            self._manager.register(created, name)
            self._manager.check_pending()
        if problem := self._problem_of(created):
            raise PluginFailed(f"The plugin '{name}' {problem}.", details={"plugin": name})
        return created

    def _problem_of(self, created: object) -> str:
        """Why a plugin would not work as it looks; empty when it would."""
        if not self._manager.get_hookcallers(created):
            return "implements no hook: put @hookimpl above a function named mesh_…"
        names = (name for name in dir(created) if name.startswith("mesh_"))
        return next(filter(None, (self._problem_of_hook(created, name) for name in names)), "")

    def _problem_of_hook(self, created: object, name: str) -> str:
        hook = getattr(created, name, None)
        if not callable(hook):
            return ""
        options = self._manager.parse_hookimpl_opts(created, name)
        if options is None:
            return f"has {name} without @hookimpl above it, so it would never be called"
        if options.get("wrapper") or options.get("hookwrapper"):
            return f"has {name} as a wrapper, but plugins are called one by one: return the result instead"
        if iscoroutinefunction(hook) or isasyncgenfunction(hook):
            return f"has {name} as an `async def`, but hooks are plain functions"
        return ""

    def hooks_of(self, plugin: Plugin) -> list[str]:
        """The names of the hooks that a plugin implements."""
        return sorted(caller.name for caller in self._manager.get_hookcallers(plugin.implementation) or ())

    def _call(self, plugin: Plugin, hook: str, **arguments: object) -> Any:  # noqa: ANN401 - as the hook returns
        """The result of one plugin's hook; None when it does not implement it."""
        others = [each.implementation for each in self.all if each is not plugin]
        with _named(plugin.name, f"failed in {hook}"):
            found = self._manager.subset_hook_caller(hook, others)(**arguments)
        return (found[0] if found else None) if isinstance(found, list) else found

    def configure(self, tables: Tables, folder: Path) -> None:
        """Validate and apply settings, with paths relative to `folder`; when one fails, restore all.

        Raises:
            pydantic.ValidationError: a table does not match its plugin's model.
            PluginFailed: a plugin cannot use its settings.
        """
        wanted = [(plugin, self.validated(plugin, tables.get(plugin.name, {}))) for plugin in self.all]
        previous = self.current_settings
        try:
            for plugin, settings in wanted:
                if settings != plugin.settings:
                    self._configure(plugin, settings, folder)
        except BaseException:
            self.restore(previous, folder)
            raise

    @property
    def current_settings(self) -> list[BaseModel | None]:
        """The settings of all plugins, for `restore`."""
        return [plugin.settings for plugin in self.all]

    def restore(self, settings: Iterable[BaseModel | None], folder: Path) -> None:
        """Restore previous settings; a plugin that fails is named in the log."""
        for plugin, previous in zip(self.all, settings, strict=True):
            if plugin.settings is not previous:
                try:
                    self._configure(plugin, previous, folder)
                except PluginFailed as exc:
                    plugin.settings = None  # unknown, so the next settings are applied in any case
                    log.exception("previous settings not restored: %s", exc.message)

    def _configure(self, plugin: Plugin, settings: BaseModel | None, folder: Path) -> None:
        plugin.settings = settings  # also when it fails: it is then configured with the previous ones
        if settings is not None:
            self._call(plugin, "mesh_configure", settings=settings, folder=folder)

    def validated(self, plugin: Plugin, table: dict[str, Any]) -> BaseModel | None:
        """A plugin's own table, validated by its model; None when it has no model."""
        model = self.settings_model(plugin)
        if model is None and table:
            raise PluginFailed(f"The plugin '{plugin.name}' has no settings.")
        return None if model is None else model.model_validate(table)

    def settings_model(self, plugin: Plugin) -> type[BaseModel] | None:
        """The model of a plugin's own table."""
        return self._model(plugin, "mesh_settings")

    def _model(self, plugin: Plugin, hook: str) -> type[BaseModel] | None:
        model = self._call(plugin, hook)
        if model is None or (isinstance(model, type) and issubclass(model, BaseModel)):
            return model
        raise PluginFailed(
            f"The plugin '{plugin.name}' returned {model!r} from {hook}; expected a pydantic model.",
            details={"plugin": plugin.name},
        )

    def wrap(self, agent: AgentVersion, tables: Tables) -> AgentVersion:
        """An agent within the middlewares of all plugins; `tables` are its own settings of them."""
        self._known_agents.add(agent.name)
        redactors = (self._call(plugin, "mesh_redactor", agent=agent) for plugin in self.all)
        if redactor := next((each for each in redactors if each is not None), None):
            agent = replace(agent, redactor=redactor)
        for plugin in self._innermost_first:
            settings = self.agent_settings(plugin, agent.name, tables.get(plugin.name, {}))
            middleware = self._call(plugin, "mesh_middleware", agent=agent, settings=settings)
            if middleware is not None:
                with _named(plugin.name, f"cannot be applied to '{agent.name}'", unchanged=()):
                    agent = agent.with_middleware(plugin.name, middleware)
        return agent

    @cached_property
    def _innermost_first(self) -> list[Plugin]:
        """The reverse order; with `trylast` a plugin is next to the handler, wherever it is listed."""
        in_reverse, hooks = self.all[::-1], self._manager.hook.mesh_middleware.get_hookimpls()
        last = [id(each.plugin) for each in hooks if each.trylast]
        return sorted(in_reverse, key=lambda plugin: id(plugin.implementation) not in last)

    def agent_settings(self, plugin: Plugin, agent: str, table: dict[str, Any]) -> BaseModel | None:
        """One agent's settings of one plugin, validated by its model; None when it has no model."""
        model = self._model(plugin, "mesh_agent_settings")
        where = f'[agents."{agent}".plugins.{plugin.name}]'
        if model is None and table:
            raise PluginFailed(f"{where}: the plugin '{plugin.name}' has no settings of agents.")
        try:
            return None if model is None else model.model_validate(table)
        except ValidationError as exc:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
            raise PluginFailed(f"{where} is invalid: {problems}") from exc

    def client_middlewares(self) -> ClientMiddlewares:
        """The client middlewares of all plugins."""
        found = [(plugin.name, self._call(plugin, "mesh_client_middleware")) for plugin in self.all]
        return ClientMiddlewares([(name, middleware) for name, middleware in found if middleware is not None])

    @asynccontextmanager
    async def lifespan(self, instance: specs.Instance) -> AsyncIterator[None]:
        """Run the lifespans of all plugins; when one cannot start, those before it are stopped."""
        async with AsyncExitStack() as running:
            for plugin in self.all:
                lifespan = self._call(plugin, "mesh_lifespan", instance=instance)
                if lifespan is not None:
                    with _named(plugin.name, "cannot start"):
                        await lifespan.__aenter__()
                    running.push_async_callback(_exit, plugin.name, lifespan)
            yield

    async def check_candidate(
        self, agent: AgentVersion, serving: AgentVersion | None, limit_s: float
    ) -> list[str] | None:
        """The notes of all plugins on a new version that does not serve yet; None when none checks it.

        A MeshError refuses it.
        """
        notes: list[str] | None = None
        for plugin in self.all:
            check = self._call(plugin, "mesh_check_candidate", agent=agent, serving=serving)
            if check is None:
                continue
            problem = f"failed in mesh_check_candidate ([host] load_timeout is {limit_s:g} s)"
            with _named(plugin.name, problem, unchanged=MeshError):
                async with asyncio.timeout(limit_s):
                    notes = [*(notes or []), *await check]
        return notes

    def add_commands(self, app: "Typer") -> None:
        """Let plugins add commands to `oam`; one that fails is named in the log."""
        for plugin in self.all:
            try:
                self._call(plugin, "mesh_cli", app=app)
            except MeshError as exc:
                log.warning("%s", exc.message)

    def notify_unloaded(self, served: Container[str]) -> None:
        """Notify plugins of agents that are not served any more, or that never were."""
        for name in [name for name in self._known_agents if name not in served]:
            self._known_agents.discard(name)
            self._notify("mesh_agent_unloaded", name=name)

    def notify_reload(self, result: ReloadResult) -> None:
        """Notify plugins of a reload, completed or refused."""
        self._notify("mesh_reload_failed" if result.error else "mesh_reloaded", result=result)

    def _notify(self, hook: str, **arguments: object) -> None:
        for plugin in self.all:
            try:
                self._call(plugin, hook, **arguments)
            except MeshError as exc:  # the event has happened anyway
                log.exception("%s", exc.message)


async def _exit(plugin: str, lifespan: AbstractAsyncContextManager[None]) -> None:
    """Exit a plugin's lifespan without an error, whatever ends the mesh."""
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await lifespan.__aexit__(None, None, None)
    # The stop continues, whatever a plugin raises; a task that it has cancelled may be its own.
    except BaseException:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        log.exception("plugin '%s' did not stop cleanly", plugin)


@contextmanager
def _named(
    plugin: str, problem: str, *, unchanged: type[Exception] | tuple[()] = PluginFailed
) -> Iterator[None]:
    """Raise errors of a plugin's code as PluginFailed with its name, except those that are `unchanged`."""
    try:
        yield
    except unchanged:
        raise
    # A plugin's code may raise anything.
    except Exception as exc:
        message = f"The plugin '{plugin}' {problem}: {error_text(exc)}"
        raise PluginFailed(message, details={"plugin": plugin}) from exc
