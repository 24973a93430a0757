"""The host: a server when needed, modules, one node. Start, serve, stop."""

import logging
import os
import platform
from collections import deque
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from openagentmesh.bus import address
from openagentmesh.bus.connection import Target
from openagentmesh.bus.server import EmbeddedServer
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loader import Loader, Module
from openagentmesh.runtime.origins import find_origins
from openagentmesh.serving.agent import Agent

log = logging.getLogger(__name__)

# What `oam status` is told has to fit into one message; failed modules come first.
_MOST_MODULES: Final = 200
_MOST_TRACEBACK: Final = 2000


class StartFailed(MeshError):
    """The host was told to be strict, and a module failed to load."""

    code = "start_failed"


class Host:
    """Keeps the agents of one mesh.toml running.

    Use it as an async context manager, or call `start` and `stop`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.host.name or config.folder.name or platform.node()
        self.modules: list[Module] = []
        self.server: EmbeddedServer | None = None
        self._node: Node | None = None
        # What was started, to be stopped in the reverse order, whatever fails meanwhile.
        self._running = AsyncExitStack()
        self._server_events: deque[dict[str, str]] = deque(maxlen=20)

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
        self.modules.clear()
        origins = find_origins(self.config)
        target = await self._target()
        instance_id = new_id()
        about = {"host": self.name, "pid": os.getpid(), "version": version("openagentmesh")}
        self._node = Node(
            target,
            instance_id,
            about=about,
            limits=self.config.limits_of,
            contract_policy=self.config.host.contract,
        )
        self._node.describe = self.describe
        loader = Loader(self._node, self.config.settings, origins)
        self._running.callback(loader.close)
        self._running.push_async_callback(self._node.stop, self.config.host.drain_timeout)
        for origin in origins:
            self.modules.append(loader.load(origin))
        self._refuse_duplicates()
        self._report()
        agents = [agent for module in self.modules for agent in module.agents]
        await self._node.start([a for a in agents if self.config.enabled(a.name)], serves=True)

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

    def _refuse_duplicates(self) -> None:
        """The module that claims a name first has it; a later one is refused whole."""
        claimed: dict[str, Module] = {}
        for module in self.modules:
            names = [agent.name for agent in module.agents]
            twice = [agent for agent in module.agents if agent.name in claimed]
            if twice:
                name, first = twice[0].name, claimed[twice[0].name]
                sources = next(a.source for a in first.agents if a.name == name), twice[0].source
                module.fail(
                    f"agent '{name}' is declared twice: {_shown(sources[0])} has it, so {_shown(sources[1])} "
                    "is refused; rename one of them",
                    line=sources[1],
                )
            else:
                claimed |= dict.fromkeys(names, module)

    def _report(self) -> None:
        failed = [module for module in self.modules if module.state == "failed"]
        for module in failed:
            log.error("%s failed to load: %s\n%s", module.origin.shown, module.error, module.traceback)
        if failed and self.config.host.strict:
            listed = "\n".join(f"  {m.origin.shown}: {m.error} ({_shown(m.line)})" for m in failed)
            raise StartFailed(f"{len(failed)} of {len(self.modules)} modules failed to load:\n{listed}")
        known = {agent.name for module in self.modules for agent in module.agents}
        for name in self.config.agents.keys() - known:
            log.warning('mesh.toml has [agents."%s"], but no loaded module declares that agent', name)

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


def _shown(line: str) -> str:
    """A `file:line`, its file from the working folder on where it lies below it."""
    path = Path(line)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else line
