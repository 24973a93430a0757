"""The host: a server when needed, modules, one node. Start, serve, stop."""

import asyncio
import logging
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic_core import from_json

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.threads import pool
from openagentmesh.hooks.manager import Plugins
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError, NotFound
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.protocol.status import HistoryEvent, HostStatus, ReloadReply, ServerStatus
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.loader import Loader, Module, display_line
from openagentmesh.runtime.loading.origins import find_origins
from openagentmesh.runtime.loading.plugin_loader import load_plugins
from openagentmesh.runtime.reload.changes import Changes
from openagentmesh.runtime.reload.reloader import Reloader
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target
from openagentmesh.transport.tasks import cancel_and_wait

if TYPE_CHECKING:
    from openagentmesh.transport.server import EmbeddedServer

log = logging.getLogger(__name__)

# The status has to fit into one message; failed modules come first.
_MAX_MODULES_IN_STATUS: Final = 200
_MAX_RELOADS_IN_STATUS: Final = 10
_MAX_SERVER_EVENTS: Final = 20
# How long `oam reload --find-references` waits for running requests; less than the command itself.
_FIND_TIMEOUT_S: Final = 50.0


class StartFailed(MeshError):
    """The host is strict, and a module failed to load."""

    code = "start_failed"


class Host:
    """Keeps the agents of one mesh.toml running.

    Use it as an async context manager, or call `start` and `stop`.

    Args:
        config_file: the file of the settings; a change of it is applied while the host runs.
        read_config: reads it again.
        watch: reload files as soon as they are saved.
        plugins: objects or modules that implement hooks, in addition to those of mesh.toml.
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
        self._given_plugins = list(plugins)
        self.plugins = Plugins()
        self._reloader: Reloader | None = None
        self.server: EmbeddedServer | None = None
        self._node: Node | None = None
        # What was started, to be stopped in reverse order.
        self._running = AsyncExitStack()
        self._server_events: deque[HistoryEvent] = deque(maxlen=_MAX_SERVER_EVENTS)

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._reloader.config if self._reloader else self._config

    @property
    def modules(self) -> list[Module]:
        """All modules, failed ones included, in the order of mesh.toml."""
        return self._reloader.modules if self._reloader else []

    @property
    def node(self) -> Node:
        """The node that all modules share; only while the host runs."""
        assert self._node is not None, "the host is not started"
        return self._node

    @property
    def agents(self) -> list[AgentVersion]:
        """The agents that serve now."""
        return [route.agent for route in self.node.router] if self._node else []

    async def start(self) -> None:
        """Start everything; a failure stops what was started.

        Raises:
            MeshError: with a message for the person who started it.
        """
        try:
            origins = find_origins(self._config)
            plugins = load_plugins(self._config, self._given_plugins)
            reloader = self._assemble(plugins, await self._target())
            node = self.node
            node.status = self.status
            node.controls["reload"] = self._on_reload_request
            reloader.on_result = self._publish_result
            self._running.push_async_callback(lambda: node.stop(self.config.host.drain_timeout))
            self._running.push_async_callback(reloader.close)
            self._running.enter_context(reloader.retirements.garbage)
            agents = reloader.load_all(origins)
            self._report_modules()
            await node.start(agents, is_host=True)
            if self._watch:
                # Only here: without reloads nothing watches.
                from openagentmesh.runtime.reload.watcher import watch  # noqa: PLC0415

                self._running.push_async_callback(cancel_and_wait, asyncio.create_task(watch(reloader)))
        except BaseException:
            await self.stop()
            raise

    def _assemble(self, plugins: Plugins, target: Target) -> Reloader:
        """Create all parts, without starting any."""
        config, self.plugins = self._config, plugins
        pool.resize(config.host.threads)

        def prepare(agent: AgentVersion, config: Config) -> AgentVersion:
            limited = agent.with_limits(config.limits_of(agent.name))
            return plugins.wrap(limited, config.plugin_tables_of(agent.name))

        node = self._node = Node(
            target,
            new_id(),
            about={"host": self.name, "pid": os.getpid(), "version": version("openagentmesh")},
            prepare=lambda agent: prepare(agent, self.config),
            plugins=plugins,
            contract_policy=config.host.contract,
        )
        loader = Loader(node, config)
        self._running.callback(loader.imports.close)
        changes = Changes(loader.imports, self._config_file, self._read_config)
        self._reloader = Reloader(loader, node, changes, config, prepare)
        return self._reloader

    async def check(self) -> list[str]:
        """What would fail at a start: plugins, their settings, modules. Connects to nothing.

        Raises:
            ConfigError: mesh.toml is invalid.
            PluginFailed: a plugin cannot be used.
        """
        try:
            origins = find_origins(self._config)
            plugins = load_plugins(self._config, self._given_plugins)
            self._assemble(plugins, Target(address.DEFAULT_URL)).load_all(origins)
            return [f"{m.origin.display_name}: {m.error}\n{m.traceback}" for m in self.modules if m.error]
        finally:
            await self.stop()

    async def reload(self, module: str = "", *, finds_references: bool = False) -> ReloadResult | None:
        """Load what differs from disk, or one module in any case; None when nothing does.

        With `finds_references` the result names what keeps the old version in memory; that search blocks
        the event loop.

        Raises:
            NotFound: there is no such module.
        """
        assert self._reloader is not None, "the host is not started"
        if module and not self._reloader.knows(module):
            raise NotFound(f"The host '{self.name}' has no module '{module}'.", details={"module": module})
        return await self._reloader.reload(module, finds_references=finds_references)

    async def wait_retired(self, timeout: float | None = None) -> bool:
        """Wait until replaced versions are retired, at most `timeout` seconds; returns whether they are."""
        return self._reloader is None or await self._reloader.retirements.wait(timeout)

    async def _on_reload_request(self, body: bytes) -> bytes:
        """Answer `oam reload`."""
        try:
            request = from_json(body) if body else {}
            module, finds_references = str(request.get("module") or ""), bool(request.get("find_references"))
            result = await self.reload(module, finds_references=finds_references)
            # Until then what was found is added to the notes.
            if result is not None and finds_references and not await self.wait_retired(_FIND_TIMEOUT_S):
                result.notes.append("requests still run on the old version: references to it are unknown")
        except (ValueError, AttributeError) as exc:
            reply = ReloadReply(host=self.name, error=f"malformed reload request: {exc}")
        except NotFound as exc:
            reply = ReloadReply(host=self.name, error=exc.message)
        else:
            not_loaded = [m.origin.display_name for m in self.modules if m.state != "serving"]
            reload = result.status() if result else None
            reply = ReloadReply(host=self.name, reload=reload, not_loaded=not_loaded)
        return reply.model_dump_json().encode()

    async def _publish_result(self, result: ReloadResult) -> None:
        """Publish log events of a reload, completed or refused, and notify plugins."""
        event = "reload_failed" if result.error else "agent_reloaded"
        level: LogLevel = "error" if result.error else "info"
        data: dict[str, Any] = {"files": result.files, "took_ms": round(result.took_ms, 3)}
        data |= {"line": result.line} if result.line else {}
        message = result.error or result.text
        for name in result.names:
            await self.node.router.logs.publish(level, name, event, message=message, data=data)
        self.plugins.notify_reload(result)

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
        # Only here: with a url no server is started.
        from openagentmesh.transport.server import EmbeddedServer  # noqa: PLC0415

        server = self.config.server
        self.server = EmbeddedServer(
            server.port, path(server.store) or "", websocket=server.websocket, on_event=self._on_server_event
        )
        self._running.push_async_callback(self.server.stop)
        await self.server.start()
        return Target(self.server.url)

    def _on_server_event(self, what: str) -> None:
        log.warning("%s", what)
        self._server_events.append(HistoryEvent(what=what))

    def _report_modules(self) -> None:
        failed = [module for module in self.modules if module.state == "failed"]
        for module in failed:
            log.error("%s failed to load: %s\n%s", module.origin.display_name, module.error, module.traceback)
        if failed and self.config.host.strict:
            listed = "\n".join(
                f"  {m.origin.display_name}: {m.error} ({display_line(m.line)})" for m in failed
            )
            raise StartFailed(f"{len(failed)} of {len(self.modules)} modules failed to load:\n{listed}")
        agents = {agent.name for module in self.modules for agent in module.agents}
        for warning in self.config.unused({module.origin.key for module in self.modules}, agents):
            log.warning("%s", warning)

    def status(self) -> HostStatus:
        """Its state, for `oam status`."""
        in_order = sorted(self.modules, key=lambda module: module.state)[:_MAX_MODULES_IN_STATUS]
        reloads = list(self._reloader.history)[-_MAX_RELOADS_IN_STATUS:] if self._reloader else []
        return HostStatus(
            **dict(self.node.node_status()),
            host=self.name,
            pid=os.getpid(),
            version=version("openagentmesh"),
            modules=[module.status() for module in in_order],
            reloads=[result.status() for result in reloads],
            embedded_server=self._server_status(self.server) if self.server else None,
        )

    def _server_status(self, server: "EmbeddedServer") -> ServerStatus:
        return ServerStatus(
            url=server.url,
            pid=server.pid,
            starts=server.starts,
            websocket=server.websocket_url,
            history=list(self._server_events),
        )
