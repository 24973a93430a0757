"""The host: a server when needed, modules, one node. Start, serve, stop."""

import asyncio
import logging
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from pydantic_core import from_json, to_json

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.threads import pool
from openagentmesh.hooks.manager import Plugins
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError, NotFound
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.loader import Loader, Module, shown_line
from openagentmesh.runtime.loading.origins import find_origins
from openagentmesh.runtime.loading.plugin_loader import load_plugins
from openagentmesh.runtime.reload.changes import Changes
from openagentmesh.runtime.reload.reloader import Reloader
from openagentmesh.runtime.reload.replay import Replays
from openagentmesh.runtime.reload.watcher import watch
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target
from openagentmesh.transport.server import EmbeddedServer
from openagentmesh.transport.tasks import cancel_and_wait

log = logging.getLogger(__name__)

# What `oam status` is told has to fit into one message; failed modules come first.
_MOST_MODULES: Final = 200
_MOST_TRACEBACK: Final = 2000
_MOST_RELOADS: Final = 10


class StartFailed(MeshError):
    """The host was told to be strict, and a module failed to load."""

    code = "start_failed"


class Host:
    """Keeps the agents of one mesh.toml running.

    Use it as an async context manager, or call `start` and `stop`.

    Args:
        config: what mesh.toml says.
        config_file: where that is; a change of it is taken over while the host runs.
        read_config: reads it again.
        watch: whether a file is reloaded as soon as it is saved.
        plugins: objects or modules that implement hooks of `hooks/specs.py`.

    """

    def __init__(
        self,
        config: Config,
        *,
        config_file: Path | None = None,
        read_config: Callable[[], Config] | None = None,
        watch: bool = False,
        plugins: Iterable[object] = (),
    ) -> None:
        self.name = config.host.name or config.folder.name or platform.node()
        self._config = config
        self._config_file = config_file
        self._read_config = read_config or (lambda: config)
        self._watch = watch
        self._given = list(plugins)
        self.plugins = Plugins()
        self._reloader: Reloader | None = None
        self.server: EmbeddedServer | None = None
        self._node: Node | None = None
        # What was started, to be stopped in the reverse order, whatever fails meanwhile.
        self._running = AsyncExitStack()
        self._server_events: deque[dict[str, str]] = deque(maxlen=20)

    @property
    def config(self) -> Config:
        """What is in force now."""
        return self._reloader.config if self._reloader else self._config

    @property
    def modules(self) -> list[Module]:
        """What was loaded, or could not be, in the order of mesh.toml."""
        return self._reloader.modules if self._reloader else []

    @property
    def _history(self) -> Iterable[Outcome]:
        return self._reloader.history if self._reloader else ()

    @property
    def node(self) -> Node:
        """The one node that all modules share; only while the host runs."""
        assert self._node is not None, "the host is not started"
        return self._node

    @property
    def agents(self) -> list[Agent]:
        """The agents served now."""
        return [route.agent for route in self.node.router] if self._node else []

    async def start(self) -> None:
        """Start everything; when anything fails, stop what was started.

        Raises:
            MeshError: in words for the person who started it.

        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        origins = find_origins(self._config)
        plugins = load_plugins(self._config, self._given)
        reloader = self._assembled(plugins, await self._target())
        node = self.node
        node.describe = self.describe
        node.controls["reload"] = self._on_reload_request
        reloader.on_outcome = self._tell
        self._running.push_async_callback(lambda: node.stop(self.config.host.drain_timeout))
        self._running.push_async_callback(reloader.close)
        agents = reloader.load_all(origins)
        self._report()
        await node.start(agents, serves=True)
        if self._watch:
            watching = asyncio.create_task(watch(reloader))
            self._running.push_async_callback(cancel_and_wait, watching)

    def _assembled(self, plugins: Plugins, target: Target) -> Reloader:
        """Make all the parts, without starting any."""
        config, self.plugins = self._config, plugins
        about = {"host": self.name, "pid": os.getpid(), "version": version("openagentmesh")}
        pool.resize(config.host.threads)
        replays = Replays(config.host.replay, plugins.redactor)

        def ready(agent: Agent, config: Config) -> Agent:
            recorded = replays.recorded(agent.limited(config.limits_of(agent.name)))
            return plugins.around(recorded, config.options_of(agent.name))

        node = self._node = Node(
            target,
            new_id(),
            about=about,
            ready=lambda agent: ready(agent, self.config),
            plugins=plugins,
            contract_policy=config.host.contract,
        )
        loader = Loader(node, config)
        self._running.callback(loader.close)
        changes = Changes(loader.imports, self._config_file, self._read_config)
        self._reloader = Reloader(loader, node, changes, config, ready, replays)
        return self._reloader

    async def check(self) -> list[str]:
        """What would fail at a start, in words: plugins, their settings, modules; connects to nothing.

        Raises:
            ConfigError: mesh.toml cannot be used.
            PluginFailed: a plugin cannot be used.

        """
        try:
            origins = find_origins(self._config)
            plugins = load_plugins(self._config, self._given)
            self._assembled(plugins, Target(address.DEFAULT_URL)).load_all(origins)
            return [f"{m.origin.shown}: {m.error}\n{m.traceback}" for m in self.modules if m.error]
        finally:
            await self.stop()

    async def reload(self, module: str = "") -> Outcome | None:
        """Load what differs from disk, or one module anyway; None when nothing does.

        Raises:
            NotFound: there is no such module.

        """
        assert self._reloader is not None, "the host is not started"
        if module and not self._reloader.knows(module):
            raise NotFound(f"The host '{self.name}' has no module '{module}'.", details={"module": module})
        return await self._reloader.reload(module)

    async def _on_reload_request(self, body: bytes) -> bytes:
        """Answer `oam reload`: what came of it, or why there was nothing to do."""
        try:
            asked = from_json(body) if body else {}
            outcome = await self.reload(str(asked.get("module") or ""))
        except (ValueError, AttributeError) as exc:
            return to_json({"host": self.name, "error": f"the request is none: {exc}"})
        except NotFound as exc:
            return to_json({"host": self.name, "error": exc.message})
        return to_json(
            {
                "host": self.name,
                "outcome": outcome and outcome.description(),
                "not_loaded": [m.origin.shown for m in self.modules if m.state != "serving"],
            }
        )

    async def _tell(self, outcome: Outcome) -> None:
        """Tell observers and plugins of a reload, or of one that was refused."""
        event = "reload_failed" if outcome.error else "agent_reloaded"
        level: LogLevel = "error" if outcome.error else "info"
        for name in outcome.names:
            data: dict[str, object] = {"files": outcome.files, "took_ms": round(outcome.took_ms, 3)}
            if outcome.line:
                data["line"] = outcome.line
            message = outcome.error or outcome.text
            await self.node.router.events.emit(level, name, event, message=message, data=data)
        self.plugins.tell_reload(outcome)

    async def stop(self) -> None:
        """Drain, deregister, close the connection, then stop the server."""
        await self._running.aclose()
        self._node = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _target(self) -> Target:
        mesh, path = self.config.mesh, self.config.path
        if mesh.url:
            creds = path(mesh.creds) or address.creds_or_none()
            return Target(mesh.url, creds, path(mesh.tls_cert), path(mesh.tls_key), path(mesh.tls_ca))
        server = self.config.server
        self.server = EmbeddedServer(
            server.port, path(server.store) or "", websocket=server.websocket, on_event=self._on_server_event
        )
        self._running.push_async_callback(self.server.stop)
        await self.server.start()
        return Target(self.server.url)

    def _on_server_event(self, what: str) -> None:
        log.warning("%s", what)
        self._server_events.append({"at": datetime.now(UTC).isoformat(), "what": what})

    def _report(self) -> None:
        failed = [module for module in self.modules if module.state == "failed"]
        for module in failed:
            log.error("%s failed to load: %s\n%s", module.origin.shown, module.error, module.traceback)
        if failed and self.config.host.strict:
            listed = "\n".join(f"  {m.origin.shown}: {m.error} ({shown_line(m.line)})" for m in failed)
            raise StartFailed(f"{len(failed)} of {len(self.modules)} modules failed to load:\n{listed}")
        agents = {agent.name for module in self.modules for agent in module.agents}
        for warning in self.config.unread({module.origin.key for module in self.modules}, agents):
            log.warning("%s", warning)

    def describe(self) -> dict[str, Any]:
        """What the host does, for `oam status`; JSON."""
        server = self.server
        return self.node.description() | {
            "host": self.name,
            "pid": os.getpid(),
            "version": version("openagentmesh"),
            "modules": [
                {
                    "origin": module.origin.shown,
                    "state": module.state,
                    "agents": len(module.agents),
                    "error": module.error,
                    "line": module.line,
                    "traceback": module.traceback[-_MOST_TRACEBACK:],
                }
                for module in sorted(self.modules, key=lambda module: module.state)[:_MOST_MODULES]
            ],
            "reloads": [outcome.description() for outcome in list(self._history)[-_MOST_RELOADS:]],
            "embedded_server": None
            if server is None
            else {
                "url": server.url,
                "pid": server.pid,
                "starts": server.starts,
                "websocket": server.websocket_url,
                "history": list(self._server_events),
            },
        }
