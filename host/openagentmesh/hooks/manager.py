"""The plugins of one mesh, in their order: asked one by one, so that whoever fails is named."""

import asyncio
import logging
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import isasyncgenfunction, iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel, ValidationError

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Middleware
from openagentmesh.agent.client_middleware import Border
from openagentmesh.hooks import specs as hooks
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.protocol.errors import MeshError, PluginFailed, error_text

if TYPE_CHECKING:
    from typer import Typer

log = logging.getLogger(__name__)

# How long a plugin may take to stop, in seconds.
_GRACE = 5.0
Tables = Mapping[str, dict[str, Any]]


@dataclass(slots=True, eq=False)
class Plugin:
    """One plugin: its name, and the object that implements hooks; `settings` are those in force."""

    name: str
    implementation: object
    settings: BaseModel | None = None


class Plugins:
    """Plugins in the order of their middlewares, the first one outermost.

    Args:
        implementations: objects that implement hooks, by their names; a class is called without arguments.

    Raises:
        PluginFailed: one implements no hook, or one that there is not.

    """

    def __init__(self, implementations: Mapping[str, object] | None = None) -> None:
        self._asked_about: set[str] = set()
        self.all = [
            Plugin(name, self._registered(name, each)) for name, each in (implementations or {}).items()
        ]

    @cached_property
    def _manager(self) -> pluggy.PluginManager:
        # Made for the first plugin only: meshes in a host's modules have none, and making one would
        # take a fifth of the time of a reload.
        manager = pluggy.PluginManager(hooks.NAME)
        manager.add_hookspecs(hooks.Hooks)
        return manager

    @classmethod
    def of(cls, implementations: Iterable[object]) -> "Plugins":
        """Plugins that bring their settings along, as `AgentMesh(plugins=[…])` takes them."""
        return cls(cls.named(implementations))

    @staticmethod
    def named(implementations: Iterable[object]) -> dict[str, object]:
        """ObjectStore that implement hooks by names for people: of their classes, or modules."""
        found: dict[str, object] = {}
        for each in implementations:
            name = getattr(each, "__name__", type(each).__name__).rpartition(".")[2].lower()
            found[name if name not in found else f"{name}-{len(found) + 1}"] = each
        return found

    def check_includes(self, others: Sequence[object], origin: str) -> None:
        """Check that what a module brings for itself is in force here anyway.

        Raises:
            PluginFailed: it is not, so what it would protect would not be protected.

        """
        missing = self.named(others).keys() - {plugin.name for plugin in self.all}
        if missing:
            name = min(missing)
            raise PluginFailed(
                f"{origin} brings the plugin '{name}', but in a host only those of mesh.toml are in force. "
                "Enable it there: [host] plugins.",
                details={"plugin": name},
            )

    def _registered(self, name: str, implementation: object) -> object:
        try:
            made = implementation() if isinstance(implementation, type) else implementation
            self._manager.register(made, name)
            self._manager.check_pending()
        # A plugin's code may raise anything; the start ends here.
        except Exception as exc:
            raise PluginFailed(
                f"The plugin '{name}' cannot be used: {error_text(exc)}", details={"plugin": name}
            ) from exc
        if why := self._why_no_plugin(made):
            raise PluginFailed(f"The plugin '{name}' {why}.", details={"plugin": name})
        return made

    def _why_no_plugin(self, made: object) -> str:
        """Why something would not do what it looks like; empty when it would."""
        if not self._manager.get_hookcallers(made):
            return "implements no hook: put @hookimpl above a function named mesh_…"
        for name in dir(made):
            hook = getattr(made, name, None) if name.startswith("mesh_") else None
            options = self._manager.parse_hookimpl_opts(made, name) if callable(hook) else None
            if callable(hook) and options is None:
                return f"has {name} without @hookimpl above it, so it would never be asked"
            if options is not None and (options.get("wrapper") or options.get("hookwrapper")):
                return f"has {name} as a wrapper, but each plugin is asked for itself: give what it is to do"
            if iscoroutinefunction(hook) or isasyncgenfunction(hook):
                return f"has {name} as an `async def`, but hooks are plain functions"
        return ""

    def hooks_of(self, plugin: Plugin) -> list[str]:
        """The names of the hooks that a plugin implements."""
        return sorted(caller.name for caller in self._manager.get_hookcallers(plugin.implementation) or ())

    def _ask(self, plugin: Plugin, hook: str, **given: object) -> Any:  # noqa: ANN401 - each hook has its own
        """What one plugin answers to a hook; None when it does not implement it.

        Raises:
            PluginFailed: it raised something.

        """
        others = [each.implementation for each in self.all if each is not plugin]
        try:
            found = self._manager.subset_hook_caller(hook, others)(**given)
        except PluginFailed:
            raise
        # A plugin's code may raise anything; what it was asked for ends here.
        except Exception as exc:
            raise PluginFailed(
                f"The plugin '{plugin.name}' failed in {hook}: {error_text(exc)}",
                details={"plugin": plugin.name},
            ) from exc
        return (found[0] if found else None) if isinstance(found, list) else found

    def configure(self, tables: Tables, folder: Path) -> None:
        """Give each plugin its validated settings; when one refuses, all have those from before.

        Relative paths in them are within the folder.

        Raises:
            pydantic.ValidationError: a table does not fit its plugin's model.
            PluginFailed: a plugin cannot work with its settings.

        """
        wanted = [(plugin, self.validated(plugin, tables.get(plugin.name, {}))) for plugin in self.all]
        before = self.in_force
        try:
            for plugin, settings in wanted:
                if settings != plugin.settings:
                    self._configure(plugin, settings, folder)
        except BaseException:
            self.restore(before, folder)
            raise

    @property
    def in_force(self) -> list[BaseModel | None]:
        """The settings of all plugins, for `restore`."""
        return [plugin.settings for plugin in self.all]

    def restore(self, settings: Iterable[BaseModel | None], folder: Path) -> None:
        """Give settings back that were in force before; a plugin that fails then is named in the log."""
        for plugin, before in zip(self.all, settings, strict=True):
            if plugin.settings is not before:
                try:
                    self._configure(plugin, before, folder)
                except PluginFailed as exc:
                    plugin.settings = None  # nobody knows, so it is asked again whatever is wanted next
                    log.exception("what was in force before is not again: %s", exc.message)

    def _configure(self, plugin: Plugin, settings: BaseModel | None, folder: Path) -> None:
        plugin.settings = settings  # also when it refuses: then it is asked again for those before
        if settings is not None:
            self._ask(plugin, "mesh_configure", settings=settings, folder=folder)

    def validated(self, plugin: Plugin, table: dict[str, Any]) -> BaseModel | None:
        """A plugin's own table by its model; None when it has no model."""
        model = self.settings_model(plugin)
        if model is None and table:
            raise PluginFailed(f"The plugin '{plugin.name}' takes no settings.")
        return None if model is None else model.model_validate(table)

    def settings_model(self, plugin: Plugin) -> type[BaseModel] | None:
        """The model of a plugin's own table."""
        return self._model(plugin, "mesh_settings")

    def _model(self, plugin: Plugin, hook: str) -> type[BaseModel] | None:
        model = self._ask(plugin, hook)
        if model is None or (isinstance(model, type) and issubclass(model, BaseModel)):
            return model
        raise PluginFailed(
            f"The plugin '{plugin.name}' gives {model!r} in {hook}, where a pydantic model is wanted.",
            details={"plugin": plugin.name},
        )

    def around(self, agent: Agent, tables: Tables) -> Agent:
        """An agent within the middlewares of all plugins; `tables` are its own settings of them.

        Raises:
            PluginFailed: a plugin cannot protect or watch this agent, so it must not serve.

        """
        self._asked_about.add(agent.name)
        for plugin in reversed(self.all):
            settings = self.agent_settings(plugin, agent.name, tables.get(plugin.name, {}))
            middleware = self._ask(plugin, "mesh_middleware", agent=agent, settings=settings)
            if middleware is not None:
                agent = _within(agent, plugin, middleware)
        return agent

    def agent_settings(self, plugin: Plugin, agent: str, table: dict[str, Any]) -> BaseModel | None:
        """One agent's settings of one plugin.

        Raises:
            PluginFailed: they do not fit the plugin's model, or it takes none.

        """
        model = self._model(plugin, "mesh_agent_settings")
        where = f'[agents."{agent}".plugins.{plugin.name}]'
        if model is None and table:
            raise PluginFailed(f"{where}: the plugin '{plugin.name}' takes no settings of agents.")
        try:
            return None if model is None else model.model_validate(table)
        except ValidationError as exc:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
            raise PluginFailed(f"{where} does not fit: {wrong}") from exc

    def border(self) -> Border:
        """What all that leaves passes."""
        asked = [(plugin.name, self._ask(plugin, "mesh_client_middleware")) for plugin in self.all]
        return Border([(name, middleware) for name, middleware in asked if middleware is not None])

    @asynccontextmanager
    async def lifespan(self, instance: hooks.Instance) -> AsyncIterator[None]:
        """Run what plugins run beside the agents.

        Raises:
            PluginFailed: one cannot start; those before it are stopped again.

        """
        # No error is thrown into them: whatever ends the mesh, they just end.
        running = AsyncExitStack()
        try:
            for plugin in self.all:
                lifespan = self._ask(plugin, "mesh_lifespan", instance=instance)
                if lifespan is not None:
                    await self._begin(running, plugin, lifespan)
            yield
        finally:
            await running.aclose()

    async def _begin(
        self, running: AsyncExitStack, plugin: Plugin, lifespan: AbstractAsyncContextManager[None]
    ) -> None:
        try:
            await lifespan.__aenter__()
        except PluginFailed:
            raise
        # As `_ask`.
        except Exception as exc:
            why = f"The plugin '{plugin.name}' cannot start: {error_text(exc)}"
            raise PluginFailed(why, details={"plugin": plugin.name}) from exc

        async def leave() -> None:
            try:
                async with asyncio.timeout(_GRACE):
                    await lifespan.__aexit__(None, None, None)
            # The stop goes on, whatever a plugin raises; a task that it has cancelled may be its own.
            except BaseException:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                log.exception("the plugin '%s' did not stop as it should", plugin.name)

        running.push_async_callback(leave)

    def add_commands(self, app: "Typer") -> None:
        """Let plugins add commands to `oam`; one that fails is named, and the others still do."""
        for plugin in self.all:
            try:
                self._ask(plugin, "mesh_cli", app=app)
            except MeshError as exc:
                log.warning("%s", exc.message)

    def redactor(self, agent: Agent) -> hooks.Redactor | None:
        """What takes secrets out of what is kept of an agent's requests."""
        asked = (self._ask(plugin, "mesh_redactor", agent=agent) for plugin in self.all)
        return next((redactor for redactor in asked if redactor is not None), None)

    def tell_unloaded(self, served: Container[str]) -> None:
        """Tell of all agents that they were asked about, and that are not served, or not any more."""
        for name in [name for name in self._asked_about if name not in served]:
            self._asked_about.discard(name)
            self._tell("mesh_agent_unloaded", name=name)

    def tell_reload(self, outcome: Outcome) -> None:
        """Tell of a reload, or of one that was refused."""
        self._tell("mesh_reload_failed" if outcome.error else "mesh_reloaded", outcome=outcome)

    def _tell(self, hook: str, **given: object) -> None:
        for plugin in self.all:
            try:
                self._ask(plugin, hook, **given)
            except MeshError as exc:  # what it was told of has happened
                log.exception("%s", exc.message)


def _within(agent: Agent, plugin: Plugin, middleware: Middleware) -> Agent:
    try:
        return agent.within(plugin.name, middleware)
    # A plugin's code may raise anything; the agent does not serve without it.
    except Exception as exc:
        why = f"The plugin '{plugin.name}' cannot be put around '{agent.name}': {error_text(exc)}"
        raise PluginFailed(why, details={"plugin": plugin.name}) from exc
