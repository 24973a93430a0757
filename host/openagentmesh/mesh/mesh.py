"""AgentMesh: the handle a user holds. Every verb is one call into its node."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar, overload

from pydantic import BaseModel

from openagentmesh.bus import address
from openagentmesh.bus.connection import Target
from openagentmesh.bus.server import EmbeddedServer
from openagentmesh.mesh.loading import current_loading
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.running import run, stop_event, until_stopped
from openagentmesh.protocol.codec import new_id
from openagentmesh.protocol.contract import AgentContract, AgentSpec, CatalogEntry
from openagentmesh.protocol.errors import ConnectionFailed, InvalidAgent
from openagentmesh.protocol.subjects import in_channel
from openagentmesh.serving.agent import Agent, declare
from openagentmesh.serving.handler import Types

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


class AgentMesh:
    """A mesh of agents: declare some, find others, call them by name.

    Construction does no input or output. In a module that a host loads, the mesh is the
    host's: `url` and credentials are the host's too, and `run()` returns at once.

    Args:
        url: the NATS server.
        creds: a credentials file; else OAM_CREDS, else what the nearest `.oam-url` says.
        tls_cert: our certificate's file.
        tls_key: its key's file.
        tls_ca: the file of the authority that signed the server's certificate.

    """

    local = _LocalMesh()
    """An async context manager: the mesh with an embedded server of its own, for tests and
    for trying things. `AgentMesh.local()` gives a new mesh, `mesh.local()` serves this one."""

    def __init__(
        self,
        url: str = address.DEFAULT_URL,
        *,
        creds: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
    ) -> None:
        self._target = Target(url, creds, tls_cert, tls_key, tls_ca)
        self._instance_id = new_id()
        self._agents: dict[str, Agent] = {}
        self._types = Types()
        self._node: Node | None = None
        self._hosted = False
        loading = current_loading()
        if loading is not None:
            self._hosted = True
            self._node = loading.node
            if url not in {address.DEFAULT_URL, loading.node.bus.target.url}:
                log.warning(
                    "%s asks for %s; it is served on the host's %s",
                    loading.origin, self._target.shown, loading.node.bus.target.shown,
                )  # fmt: skip

    @property
    def instance_id(self) -> str:
        """This instance's id: 32 hexadecimal digits."""
        return self._node.instance_id if self._node else self._instance_id

    @property
    def url(self) -> str:
        """The address of the NATS server."""
        return self._node.bus.target.url if self._node else self._target.url

    def agent(self, spec: AgentSpec) -> Callable[[HandlerT], HandlerT]:
        """Declare the decorated function as an agent.

        On a connected mesh it is up before the next verb of that mesh returns. A name that
        was declared before gets the new handler.

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
            agent, loading = declare(spec, function, self._types), current_loading()
            if loading is not None:
                loading.declare(agent)
            elif self._node is not None:
                self._node.bind(agent)
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

    async def call(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 30.0,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Call an agent and return its reply, a JSON value (protocol §7).

        Args:
            name: the agent.
            payload: a pydantic model, bytes, or any JSON value; None sends nothing.
            timeout: seconds to wait; None for ever. The host stops the handler then too.
            headers: more headers for the request.

        Raises:
            MeshError: what went wrong, of the class for its code (protocol §8).

        """
        node = await self._ready()
        return await node.caller.call(name, payload, timeout, headers)

    async def stream(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 60.0,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Call a streamer and yield its chunks, JSON values (protocol §7).

        `timeout` is the seconds from one chunk to the next. A reader that stops reading
        stops the agent.

        Raises:
            ChunkSequenceError: a chunk was lost.
            MeshError: what else went wrong, of the class for its code.

        """
        node = await self._ready()
        async with aclosing(node.caller.stream(name, payload, timeout, headers)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def catalog(
        self,
        channel: str | None = None,
        tags: list[str] | None = None,
        streaming: bool | None = None,  # noqa: FBT001 - the published signature
        invocable: bool | None = None,  # noqa: FBT001 - the published signature
    ) -> list[CatalogEntry]:
        """The agents of the mesh, in the order they were registered.

        Args:
            channel: only this name and what lies below it.
            tags: only agents that have all of these.
            streaming: only agents that do, or do not, stream.
            invocable: only agents that can, or cannot, be called.

        """
        node = await self._ready()
        return [
            entry
            for entry in await node.directory.catalog()
            if (channel is None or in_channel(entry.name, channel))
            and (not tags or set(tags) <= set(entry.tags))
            and streaming in {None, entry.streaming}
            and invocable in {None, entry.invocable}
        ]

    async def contract(self, name: str) -> AgentContract:
        """An agent's full contract.

        Raises:
            NotFound: no agent has this name.

        """
        node = await self._ready()
        return await node.directory.contract(name)

    async def discover(self, channel: str | None = None) -> list[AgentContract]:
        """The full contracts of all agents, or of those of one channel."""
        node = await self._ready()
        contracts = await node.directory.discover()
        return [c for c in contracts if channel is None or in_channel(c.name, channel)]

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
        )
        # Its handlers may be called, and call others, before the start is complete.
        self._node = node
        try:
            await node.start(self._agents.values())
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
        await self._node.settled()
        return self._node

    async def _serve(self) -> None:
        async with self:
            node = await self._ready()
            stop = stop_event()
            log.info("serving %d agents on %s", len(node.router), node.bus.target.shown)
            await until_stopped(stop, node.bus.closed)


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
