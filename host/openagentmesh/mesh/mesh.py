"""AgentMesh: the handle a user holds, to declare agents and to use those of the mesh."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel

from openagentmesh.agent.agent import AgentVersion, declare
from openagentmesh.agent.handler import TypeCache
from openagentmesh.agent.sources import (
    Condition,
    KVCondition,
    KVSource,
    Source,
    SubjectCondition,
    SubjectSource,
)
from openagentmesh.hooks.manager import Plugins
from openagentmesh.mesh.module_context import current_module
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.reload_api import ReloadAPI
from openagentmesh.mesh.runner import run, stop_event, wait_for_stop
from openagentmesh.mesh.typed import set_reference
from openagentmesh.mesh.verbs import Verbs
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.contract import AgentSpec
from openagentmesh.protocol.errors import ConnectionFailed, InvalidAgent
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S: Final = 30.0
# What `@mesh.agent` decorates: a function of at most one parameter, which stays what it is.
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], Any] | Callable[[], Any])
SettingsT = TypeVar("SettingsT", bound=BaseModel)


class _Local:
    """`AgentMesh.local` creates a new mesh, `mesh.local` uses that one."""

    def __get__(
        self, mesh: "AgentMesh | None", owner: type["AgentMesh"]
    ) -> Callable[[], AbstractAsyncContextManager["AgentMesh"]]:
        return lambda: _local(mesh or owner())


class AgentMesh(Verbs, ReloadAPI):
    """A mesh of agents: declare agents, find others, call them by name.

    Construction does no input or output. In a module that a host loads, the mesh is the host's: `url` and
    credentials are the host's too, and `run()` returns at once.

    Args:
        url: the NATS server.
        creds: a credentials file; else OAM_CREDS, else that of the nearest `.oam-url`.
        tls_cert: the file of the client's certificate.
        tls_key: the file of its key.
        tls_ca: the file of the authority that signed the server's certificate.
        plugins: objects that implement hooks, the first one outermost; a host has its own.
    """

    local = _Local()
    """An async context manager: the mesh with an embedded server of its own, for tests and experiments.
    `AgentMesh.local()` creates a new mesh, `mesh.local()` serves this one."""

    def __init__(  # noqa: PLR0913 - the published signature, and plugins
        self,
        url: str = address.DEFAULT_URL,
        *,
        creds: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        plugins: Sequence[object] = (),
    ) -> None:
        super().__init__()
        self._target = Target(url, creds, tls_cert, tls_key, tls_ca)
        self._instance_id = new_id()
        self._agents: dict[str, AgentVersion] = {}
        self._names: set[str] = set()
        self._types = TypeCache()
        self._node: Node | None = None
        self._plugins = Plugins.of(plugins)
        module = current_module()
        self._hosted = module is not None
        if module is not None:
            module.node.plugins.check_includes(plugins, module.origin)
            self._node = module.node
            target = module.node.connection.target
            if url not in {address.DEFAULT_URL, target.url}:
                log.warning(
                    "%s connects to %s; it is served on the host's %s instead",
                    module.origin, self._target.display_url, target.display_url,
                )  # fmt: skip

    @property
    def instance_id(self) -> str:
        """This instance's id: 32 hexadecimal digits."""
        return self._node.instance_id if self._node else self._instance_id

    @property
    def url(self) -> str:
        """The address of the NATS server."""
        return self._node.connection.target.url if self._node else self._target.url

    def agent(
        self,
        spec: AgentSpec,
        *,
        sources: Sequence[Source] | None = None,
        active_when: Condition | None = None,
        mcp: dict[str, Any] | bool | None = None,
    ) -> Callable[[HandlerT], HandlerT]:
        """Declare the decorated function as an agent.

        On a connected mesh it is served before the next verb of that mesh returns. A name that was declared
        before gets the new handler.

        Args:
            spec: name, description, tags, version.
            sources: what triggers it besides requests, see `subject_source` and `kv_source`.
            active_when: when it is active, see `kv_condition` and `subject_condition`; otherwise always.
                While it is not, it stays in the catalog, and calls get `not_available`.
            mcp: published in the contract for MCP bridges.

        Raises:
            InvalidAgent: the spec, the name or the function is invalid, or the decorator is used without
                parentheses.
        """
        if not isinstance(spec, AgentSpec):
            shown = getattr(spec, "__name__", repr(spec))
            raise InvalidAgent(
                "@mesh.agent needs a spec: "
                f"write @mesh.agent(AgentSpec(name=..., description=...)) above '{shown}'."
            )

        def decorate(function: HandlerT) -> HandlerT:
            agent = declare(
                spec, function, self._types, sources=sources or (), active_when=active_when, mcp=mcp
            )
            module = current_module()
            if module is not None:
                module.declare(agent)
            elif self._node is not None:
                self._node.serve(agent)
            self._names.add(agent.name)
            if not self._hosted:
                self._agents[agent.name] = agent
            set_reference(function, agent)
            return function

        return decorate

    def settings(self, model: type[SettingsT]) -> SettingsT:
        """This module's `[settings.<module>]` table of mesh.toml, validated.

        Without a host there is no mesh.toml: the model's own defaults.

        Raises:
            pydantic.ValidationError: the table does not match the model.
        """
        module = current_module()
        return model.model_validate(module.settings if module is not None else {})

    def subject_source(self, subject: str, *, queue_group: str | None = None) -> SubjectSource:
        """For `sources=`: every message on a subject, which may have wildcards."""
        return SubjectSource(subject, queue_group)

    def kv_source(
        self, pattern: str, *, queue_group: str | None = None, on_init: Literal["replay", "skip"] = "replay"
    ) -> KVSource:
        """For `sources=`: every change of the keys of the shared state that match a pattern."""
        return KVSource(pattern, queue_group, on_init)

    def kv_condition(
        self,
        key: str,
        predicate: Callable[[str], bool],
        *,
        initial: bool = False,
        drain_timeout: float = 30.0,
    ) -> KVCondition:
        """For `active_when=`: active while the predicate of a key's text is true."""
        return KVCondition(key, predicate, initial, drain_timeout)

    def subject_condition(
        self,
        subject: str,
        predicate: Callable[[Any], bool],
        *,
        initial: bool = False,
        drain_timeout: float = 30.0,
    ) -> SubjectCondition:
        """For `active_when=`: active while the predicate of the last message on a subject is true."""
        return SubjectCondition(subject, predicate, initial, drain_timeout)

    def run(self) -> None:
        """Connect, serve until SIGINT or SIGTERM, drain, return.

        In a module that a host loads this does nothing: the host serves it.
        """
        if current_module() is None:
            # A program's main; unless it configured logging, events go to stderr.
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
            run(self._serve())

    async def __aenter__(self) -> Self:
        """Connect and serve the declared agents."""
        if self._hosted:
            return self
        if self._node is not None:
            raise ConnectionFailed("This mesh is already connected; leave its `async with` block first.")
        target, plugins = self._target, self._plugins
        # Handlers may be called, and call other agents, before the start is complete.
        node = self._node = Node(
            replace(target, creds=address.creds_or_none(target.creds)),
            self._instance_id,
            prepare=lambda agent: plugins.wrap(agent, {}),
            plugins=plugins,
        )
        try:
            await node.start([node.prepare(agent) for agent in self._agents.values()])
        except BaseException:
            self._node = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish what runs, deregister, close."""
        if not self._hosted and self._node is not None:
            try:
                await self._node.stop(DRAIN_TIMEOUT_S)  # running handlers may still call other agents
            finally:
                self._node = None

    async def _ready(self) -> Node:
        node = self._node
        if node is None:
            raise ConnectionFailed("This mesh is not connected. Use it inside `async with mesh:`.")
        if not node.reconciler.is_done:
            await node.wait_served(self._names)
        return node

    async def _serve(self) -> None:
        async with self:
            node = await self._ready()
            stop, count, url = stop_event(), len(node.router), node.connection.target.display_url
            log.info("serving %d %s on %s", count, "agent" if count == 1 else "agents", url)
            await wait_for_stop(stop, node.connection.closed)


@asynccontextmanager
async def _local(mesh: AgentMesh) -> AsyncIterator[AgentMesh]:
    # Only here: most programs start no server.
    from openagentmesh.transport.server import EmbeddedServer  # noqa: PLC0415

    server = EmbeddedServer()
    await server.start()
    previous, mesh._target = mesh._target, Target(server.url)  # noqa: SLF001 - part of this class
    try:
        async with mesh:
            yield mesh
    finally:
        mesh._target = previous  # noqa: SLF001
        await server.stop()
