"""What a user asks of a mesh. Every verb is one call into its node."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, overload

from pydantic import BaseModel

from openagentmesh.client import retry as again
from openagentmesh.client.requests import Callback
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.contract import AgentContract, CatalogEntry
from openagentmesh.protocol.messages import MeshMessage
from openagentmesh.protocol.subjects import in_channel
from openagentmesh.state.kv import KV
from openagentmesh.state.observe import Observe
from openagentmesh.state.workspace import Workspace
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.object_store import ObjectStore


class Verbs(ABC):
    """The verbs of a mesh, for those who use agents; all raise ConnectionFailed before connecting."""

    @abstractmethod
    async def _ready(self) -> Node:
        """The connected node, once all that was declared is up."""

    @property
    def kv(self) -> KV:
        """The shared state: texts and models under keys."""
        return KV(self._buckets)

    @property
    def workspace(self) -> Workspace:
        """The shared files, of any size."""
        return Workspace(self._objects)

    @property
    def observe(self) -> Observe:
        """Log events of agents, and how much they tell."""
        return Observe(self._ready)

    async def call(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 30.0,
        *,
        retry: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Call an agent and return its reply, a JSON value (protocol §7).

        Args:
            name: the agent.
            payload: a pydantic model, bytes, or any JSON value; None sends nothing.
            timeout: seconds to wait; None for ever. The host stops the handler then too.
            retry: how often it is asked again when it died, is not available or is overloaded;
                only for agents that declare themselves idempotent.
            headers: more headers for the request.

        Raises:
            MeshError: what went wrong, of the class for its code (protocol §8).

        """
        node = await self._ready()
        if not retry:
            return await node.caller.call(name, payload, timeout, headers)
        await again.check(node.directory, name)
        return await again.call(lambda left: node.caller.call(name, payload, left, headers), retry, timeout)

    async def stream(  # noqa: PLR0913 - the published signature, and ours
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 60.0,
        *,
        total: float | None = None,
        retry: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Call a streamer and yield its chunks, JSON values (protocol §7).

        `timeout` is the seconds from one chunk to the next, `total` those for all of them. A
        reader that stops reading stops the agent. With `retry` it is asked again, as `call`
        does, as long as no chunk has come.

        Raises:
            ChunkSequenceError: a chunk was lost.
            MeshError: what else went wrong, of the class for its code.

        """
        node = await self._ready()
        once = partial(node.caller.stream, name, payload, timeout, headers)
        if retry:
            await again.check(node.directory, name)
        found = again.stream(once, retry, total) if retry else once(total)
        async with aclosing(found) as chunks:
            async for chunk in chunks:
                yield chunk

    async def send(  # noqa: PLR0913 - the published signature, and headers
        self,
        name: str,
        payload: object = None,
        *,
        on_reply: Callback | None = None,
        on_error: Callback | None = None,
        reply_to: str | None = None,
        timeout: float | None = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a request and go on without waiting for what it does (protocol §7).

        Args:
            name: the agent.
            payload: as for `call`.
            on_reply: called with the reply, or with each chunk of a streamer; a function or
                a coroutine function.
            on_error: called with the MeshError when there is no reply; without it the log
                tells.
            reply_to: a subject for the reply, instead of `on_reply`.
            timeout: seconds `on_reply` waits for each reply.
            headers: more headers for the request.

        Raises:
            ValueError: both `on_reply` and `reply_to`.
            NotFound, NotAvailable: nobody is there; with `on_reply` it goes to `on_error`.
            MeshError: what else kept it from being sent.

        """
        if on_reply is not None and reply_to:
            raise ValueError("Give on_reply or reply_to, not both.")
        node = await self._ready()
        await node.caller.send(
            name, payload, timeout, headers, on_reply=on_reply, on_error=on_error, reply_to=reply_to or ""
        )

    @overload
    def subscribe(
        self,
        *,
        agent: str | None = None,
        channel: str | None = None,
        subject: str | None = None,
        timeout: float | None = None,
        messages: Literal[False] = False,
    ) -> AsyncGenerator[Any, None]: ...
    @overload
    def subscribe(
        self,
        *,
        agent: str | None = None,
        channel: str | None = None,
        subject: str | None = None,
        timeout: float | None = None,
        messages: Literal[True],
    ) -> AsyncGenerator[MeshMessage[Any], None]: ...
    async def subscribe(
        self,
        *,
        agent: str | None = None,
        channel: str | None = None,
        subject: str | None = None,
        timeout: float | None = None,
        messages: bool = False,
    ) -> AsyncGenerator[Any, None]:
        """Yield events, JSON values, as they come (protocol §7).

        Args:
            agent: of this publisher, until it ends; its failure is raised.
            channel: of all publishers of this channel, whoever of them fails or ends; not
                looked at beside one of the others.
            subject: what comes on this NATS subject until a frame says that it is the last; on
                one with wildcards nobody ends it for the others.
            timeout: seconds to wait for the next event; None for ever.
            messages: yield each event as a MeshMessage, with its agent, subject and headers.

        Raises:
            ValueError: none of agent, channel and subject, or both an agent and a subject.
            MeshTimeout: no event came in time.
            NotFound: no agent has this name.
            InvocationMismatch: the agent is no publisher.

        """
        if agent is not None and subject is not None:
            raise ValueError("Give agent or subject, not both.")
        events = (await self._ready()).events
        if agent is not None:
            found = events.of_agent(agent, timeout)
        elif subject is not None:
            found = events.on_subject(subject, timeout)
        elif channel is not None:
            found = events.of_channel(channel, timeout)
        else:
            raise ValueError("Say whose events: agent=, channel= or subject=.")
        async with aclosing(found) as feed:
            async for message in feed:
                yield message if messages else message.data

    async def publish(
        self, subject: str, payload: BaseModel | bytes | str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send one message to everybody who listens to `subject`.

        Raises:
            ValueError: the subject has wildcards or is none.

        """
        await (await self._ready()).events.publish(subject, payload, headers)

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

    async def _buckets(self) -> KVBuckets:
        return (await self._ready()).buckets

    async def _objects(self) -> ObjectStore:
        return (await self._ready()).objects
