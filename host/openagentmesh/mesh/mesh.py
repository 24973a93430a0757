"""AgentMesh: the handle a user holds, to declare agents and to be on the mesh."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, overload

from pydantic import BaseModel

from openagentmesh.agent.agent import Agent, declare
from openagentmesh.agent.handler import Types
from openagentmesh.agent.sources import (
    Condition,
    KVCondition,
    KVSource,
    Source,
    SubjectCondition,
    SubjectSource,
)
from openagentmesh.hooks.manager import Plugins
from openagentmesh.mesh.module_context import current_loading
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.reload_api import Reloading
from openagentmesh.mesh.runner import run, stop_event, until_stopped
from openagentmesh.mesh.verbs import Verbs
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.contract import AgentSpec
from openagentmesh.protocol.errors import ConnectionFailed, InvalidAgent
from openagentmesh.transport import address
from openagentmesh.transport.connection import Target
from openagentmesh.transport.server import EmbeddedServer

log = logging.getLogger(__name__)

DRAIN_TIMEOUT: Final = 30.0
# Handlers are coroutine functions or async generator functions, and stay what they are.
HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
SettingsT = TypeVar("SettingsT", bound=BaseModel)


class _LocalMesh:
    """`local` of a class makes a new mesh, `local` of a mesh uses that one."""

    @overload
    def __get__(
        self, mesh: None, owner: type["AgentMesh"]
    ) -> Callable[[], AbstractAsyncContextManager["AgentMesh"]]: ...
    @overload
    def __get__(
        self, mesh: "AgentMesh", owner: type["AgentMesh"]
    ) -> Callable[[], AbstractAsyncContextManager["AgentMesh"]]: ...
    def __get__(
        self, mesh: "AgentMesh | None", owner: type["AgentMesh"]
    ) -> Callable[[], AbstractAsyncContextManager["AgentMesh"]]:
        return lambda: _local(mesh or owner())


class AgentMesh(Verbs, Reloading):
    """A mesh of agents: declare some, find others, call them by name.

    Construction does no input or output. In a module that a host loads, the mesh is the
    host's: `url` and credentials are the host's too, and `run()` returns at once.

    Args:
        url: the NATS server.
        creds: a credentials file; else OAM_CREDS, else what the nearest `.oam-url` says.
        tls_cert: our certificate's file.
        tls_key: its key's file.
        tls_ca: the file of the authority that signed the server's certificate.
        plugins: objects that implement hooks, the first one outermost; a host has its own.

    """

    local = _LocalMesh()
    """An async context manager: the mesh with an embedded server of its own, for tests and
    for trying things. `AgentMesh.local()` gives a new mesh, `mesh.local()` serves this one."""

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
        self._agents: dict[str, Agent] = {}
        self._names: set[str] = set()
        self._types = Types()
        self._node: Node | None = None
        self._hosted = False
        self._plugins = Plugins.of(plugins)
        loading = current_loading()
        if loading is not None:
            self._hosted = True
            loading.node.plugins.check_includes(plugins, loading.origin)
            self._node = loading.node
            if url not in {address.DEFAULT_URL, loading.node.connection.target.url}:
                log.warning(
                    "%s asks for %s; it is served on the host's %s",
                    loading.origin, self._target.display_url, loading.node.connection.target.display_url,
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

        On a connected mesh it is up before the next verb of that mesh returns. A name that
        was declared before gets the new handler.

        Args:
            spec: name, description, tags, version.
            sources: what drives it besides requests, see `subject_source` and `kv_source`.
            active_when: when it is on, see `kv_condition` and `subject_condition`; otherwise
                always. While it is off it stays in the catalog, and calls get `not_available`.
            mcp: published in the contract for MCP bridges.

        Raises:
            InvalidAgent: the spec, the name or the function cannot be an agent; also when
                the decorator is used without its parentheses.

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
            loading = current_loading()
            if loading is not None:
                loading.declare(agent)
            elif self._node is not None:
                self._node.bind(agent)
            self._names.add(agent.name)
            if not self._hosted:
                self._agents[agent.name] = agent
            return function

        return decorate

    def settings(self, model: type[SettingsT]) -> SettingsT:
        """This module's `[settings.<module>]` table of mesh.toml, validated.

        Alone, without a host, there is no mesh.toml: the model's own defaults.

        Raises:
            pydantic.ValidationError: the table does not fit the model.

        """
        loading = current_loading()
        return model.model_validate(loading.settings if loading is not None else {})

    def subject_source(self, subject: str, *, queue_group: str | None = None) -> SubjectSource:
        """For `sources=`: every message on a subject, which may have wildcards."""
        return SubjectSource(subject, queue_group)

    def kv_source(
        self,
        pattern: str,
        *,
        queue_group: str | None = None,
        on_init: Literal["replay", "skip"] = "replay",
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
        """For `active_when=`: on while the predicate of a key's text holds."""
        return KVCondition(key, predicate, initial, drain_timeout)

    def subject_condition(
        self,
        subject: str,
        predicate: Callable[[Any], bool],
        *,
        initial: bool = False,
        drain_timeout: float = 30.0,
    ) -> SubjectCondition:
        """For `active_when=`: on or off as the predicate of the last message on a subject says."""
        return SubjectCondition(subject, predicate, initial, drain_timeout)

    def run(self) -> None:
        """Connect, serve until SIGINT or SIGTERM, drain, return.

        In a module that a host loads this does nothing: the host serves it.
        """
        if current_loading() is None:
            # This is a program's main; where it set up no logging, events go to stderr.
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
            run(self._serve())

    async def __aenter__(self) -> Self:
        """Connect and serve what is declared."""
        if self._hosted:
            return self
        if self._node is not None:
            raise ConnectionFailed("This mesh is connected already; leave its `async with` block first.")
        target = self._target
        node = Node(
            Target(
                target.url,
                address.creds_or_none(target.creds),
                target.tls_cert,
                target.tls_key,
                target.tls_ca,
            ),
            self._instance_id,
            ready=lambda agent: self._plugins.around(agent, {}),
            plugins=self._plugins,
        )
        # Its handlers may be called, and call others, before the start is complete.
        self._node = node
        try:
            await node.start([node.ready(agent) for agent in self._agents.values()])
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
                await self._node.stop(DRAIN_TIMEOUT)  # handlers that finish may still call others
            finally:
                self._node = None

    async def _ready(self) -> Node:
        if self._node is None:
            raise ConnectionFailed("This mesh is not connected. Use it inside `async with mesh:`.")
        await self._node.settled(self._names)
        return self._node

    async def _serve(self) -> None:
        async with self:
            node = await self._ready()
            stop = stop_event()
            log.info("serving %d agents on %s", len(node.router), node.connection.target.display_url)
            await until_stopped(stop, node.connection.closed)


@asynccontextmanager
async def _local(mesh: AgentMesh) -> AsyncIterator[AgentMesh]:
    server = EmbeddedServer()
    await server.start()
    before, mesh._target = mesh._target, Target(server.url)  # noqa: SLF001 - part of this class
    try:
        async with mesh:
            yield mesh
    finally:
        mesh._target = before  # noqa: SLF001
        await server.stop()
