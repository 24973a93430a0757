"""The verbs of a mesh with which agents are used. Every verb is one call into its node."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from types import UnionType
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from pydantic import BaseModel

from openagentmesh.agent.handler import TypeCache
from openagentmesh.client import retry as retries
from openagentmesh.client.replies import Callback
from openagentmesh.client.requests import Headers
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.typed import decode_untyped, decoder, get_reference
from openagentmesh.protocol import codec
from openagentmesh.protocol.contract import AgentContract, CatalogEntry
from openagentmesh.protocol.messages import MeshMessage
from openagentmesh.protocol.subjects import in_channel
from openagentmesh.state.kv import KV
from openagentmesh.state.observe import Observe
from openagentmesh.state.workspace import Workspace
from openagentmesh.transport.kv import KVBuckets
from openagentmesh.transport.object_store import ObjectStore

T = TypeVar("T")
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")
ChunkT = TypeVar("ChunkT")


class CallOptions(TypedDict, total=False):
    """The keyword arguments of every form of `call`."""

    retry: int
    headers: Headers


class StreamOptions(CallOptions, total=False):
    """The keyword arguments of every form of `stream`."""

    total: float | None


class SubscribeOptions(TypedDict, total=False):
    """The keyword arguments of both forms of `subscribe`."""

    agent: str | None
    channel: str | None
    subject: str | None
    timeout: float | None


class Verbs(ABC):
    """The verbs of a mesh; all raise ConnectionFailed before it is connected."""

    _types: TypeCache

    @abstractmethod
    async def _ready(self) -> Node:
        """The connected node, once everything that was declared is served."""

    @property
    def kv(self) -> KV:
        """The shared state: text and models under keys."""
        return KV(self._buckets)

    @property
    def workspace(self) -> Workspace:
        """The shared files, of any size."""
        return Workspace(self._objects)

    @property
    def observe(self) -> Observe:
        """Log events of agents, and the levels from which they are published."""
        return Observe(self._ready)

    @overload
    async def call(
        self,
        name: Callable[[InputT], Awaitable[OutputT]],
        payload: InputT,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    async def call(
        self,
        name: Callable[[], Awaitable[OutputT]],
        payload: None = None,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    async def call(
        self,
        name: Callable[[InputT], OutputT],
        payload: InputT,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    async def call(
        self,
        name: Callable[[], OutputT],
        payload: None = None,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    async def call(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 30.0,
        *,
        returns: type[T],
        **options: Unpack[CallOptions],
    ) -> T: ...
    @overload
    async def call(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 30.0,
        *,
        returns: UnionType | None = None,
        **options: Unpack[CallOptions],
    ) -> Any: ...  # noqa: ANN401 - a JSON value of any shape
    async def call(  # noqa: PLR0913 - the published signature, and ours
        self,
        name: str | Callable[..., Any],
        payload: object = None,
        timeout: float | None = 30.0,
        *,
        retry: int = 0,
        headers: Headers = None,
        returns: Any = None,
    ) -> Any:
        """Call an agent and return its reply (protocol §7).

        Args:
            name: the agent's name; or a function decorated with `@mesh.agent`, imported for its types.
            payload: a pydantic model, bytes, or any JSON value; None sends nothing. For a function a value of
                its parameter's type.
            timeout: seconds to wait; None for ever. The host cancels the handler then, too.
            retry: how often the request is repeated when the agent died, is not available or is overloaded;
                only for agents that are declared idempotent.
            headers: more headers for the request.
            returns: the type of the reply, such as a model or `list[Model]`; a JSON value without it.

        Raises:
            InvalidReply: the reply does not match `returns`.
            MeshError: of the class for its code (protocol §8).
        """
        node = await self._ready()
        agent, body, decode = self._request(name, payload, returns)
        if not retry:
            return await node.requests.call(agent, body, timeout, headers, decode)
        await retries.check_idempotent(node.directory, agent)
        return await retries.retry_call(
            lambda left: node.requests.call(agent, body, left, headers, decode), retry, timeout
        )

    @overload
    def stream(
        self,
        name: Callable[[InputT], AsyncIterable[ChunkT]],
        payload: InputT,
        timeout: float | None = 60.0,
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[ChunkT, None]: ...
    @overload
    def stream(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 60.0,
        *,
        returns: type[T],
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[T, None]: ...
    @overload
    def stream(
        self,
        name: str,
        payload: object = None,
        timeout: float | None = 60.0,
        *,
        returns: UnionType | None = None,
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Any, None]: ...
    async def stream(  # noqa: PLR0913 - the published signature, and ours
        self,
        name: str | Callable[..., Any],
        payload: object = None,
        timeout: float | None = 60.0,
        *,
        total: float | None = None,
        retry: int = 0,
        headers: Headers = None,
        returns: Any = None,
    ) -> AsyncGenerator[Any, None]:
        """Call a streamer and yield its chunks (protocol §7); closing the generator cancels the handler.

        Args:
            name: as for `call`.
            payload: as for `call`.
            timeout: seconds from one chunk to the next; None for ever.
            total: seconds for all chunks; None for ever.
            retry: as for `call`, before the first chunk.
            headers: more headers for the request.
            returns: the type of the chunks; JSON values without it.

        Raises:
            ChunkSequenceError: a chunk was lost.
            InvalidReply: a chunk does not match `returns`.
            MeshError: of the class for its code.
        """
        node = await self._ready()
        agent, body, decode = self._request(name, payload, returns)
        once = partial(node.requests.stream, agent, body, timeout, headers, decode=decode)
        if retry:
            await retries.check_idempotent(node.directory, agent)
        found = retries.retry_stream(once, retry, total) if retry else once(total)
        async with aclosing(found) as chunks:
            async for chunk in chunks:
                yield chunk

    def _request(
        self,
        name: str | Callable[..., Any],
        payload: object,
        returns: Any,  # noqa: ANN401 - any annotation
    ) -> tuple[str, object, Callable[[bytes], Any]]:
        """The agent's name, the payload, and what decodes replies."""
        if isinstance(name, str):
            return name, payload, codec.decode if returns is None else decoder(self._types.get(returns))
        agent = get_reference(name)
        decode = decode_untyped if agent.output is None else decoder(agent.output)
        return agent.name, agent.encode(payload), decode

    async def send(  # noqa: PLR0913 - the published signature, and headers
        self,
        name: str,
        payload: object = None,
        *,
        on_reply: Callback | None = None,
        on_error: Callback | None = None,
        reply_to: str | None = None,
        timeout: float | None = 60.0,
        headers: Headers = None,
    ) -> None:
        """Send a request without waiting for its result (protocol §7).

        Args:
            name: the agent.
            payload: as for `call`.
            on_reply: called with the reply, or with each chunk of a streamer; a function or a coroutine
                function.
            on_error: called with the MeshError when there is no reply; without it the error is logged.
            reply_to: a subject for the reply, instead of `on_reply`.
            timeout: seconds that `on_reply` waits for each reply.
            headers: more headers for the request.

        Raises:
            ValueError: both `on_reply` and `reply_to` are given.
            NotFound, NotAvailable: no instance serves the agent; with `on_reply` passed to `on_error`.
            MeshError: it could not be sent.
        """
        if on_reply is not None and reply_to:
            raise ValueError("on_reply and reply_to are mutually exclusive. Provide one of them.")
        node = await self._ready()
        await node.requests.send(
            name, payload, timeout, headers, on_reply=on_reply, on_error=on_error, reply_to=reply_to or ""
        )

    @overload
    def subscribe(
        self, *, messages: Literal[True], **options: Unpack[SubscribeOptions]
    ) -> AsyncGenerator[MeshMessage[Any], None]: ...
    @overload
    def subscribe(
        self, *, messages: Literal[False] = False, **options: Unpack[SubscribeOptions]
    ) -> AsyncGenerator[Any, None]: ...
    async def subscribe(
        self,
        *,
        agent: str | None = None,
        channel: str | None = None,
        subject: str | None = None,
        timeout: float | None = None,
        messages: bool = False,
    ) -> AsyncGenerator[Any, None]:
        """Yield events as they arrive (protocol §7).

        Args:
            agent: of this publisher, until its run ends; its failure is raised.
            channel: of all publishers of this channel; one that fails or ends does not end the others.
                Ignored if one of the others is given.
            subject: the messages of this NATS subject until an end frame; on a subject with wildcards
                there is no end.
            timeout: seconds to wait for the next event; None for ever.
            messages: yield each event as a MeshMessage, with its agent, subject and headers.

        Raises:
            ValueError: none of agent, channel and subject, or both an agent and a subject.
            MeshTimeout: no event arrived in time.
            NotFound: there is no agent of this name.
            InvocationMismatch: the agent is not a publisher.
        """
        if agent is not None and subject is not None:
            raise ValueError("agent and subject are mutually exclusive. Provide one of them.")
        events = (await self._ready()).events
        if agent is not None:
            found = events.of_agent(agent, timeout)
        elif subject is not None:
            found = events.on_subject(subject, timeout)
        elif channel is not None:
            found = events.of_channel(channel, timeout)
        else:
            raise ValueError("Provide agent=, channel= or subject=.")
        async with aclosing(found) as received:
            async for message in received:
                yield message if messages else message.data

    async def publish(
        self, subject: str, payload: BaseModel | bytes | str, *, headers: Headers = None
    ) -> None:
        """Publish one message on a subject.

        Raises:
            ValueError: the subject is invalid or has wildcards.
        """
        await (await self._ready()).events.publish(subject, payload, headers)

    async def catalog(
        self,
        channel: str | None = None,
        tags: list[str] | None = None,
        streaming: bool | None = None,  # noqa: FBT001 - the published signature
        invocable: bool | None = None,  # noqa: FBT001 - the published signature
    ) -> list[CatalogEntry]:
        """The agents of the mesh, in the order of their registration.

        Args:
            channel: only this name and the names below it.
            tags: only agents that have all of these.
            streaming: only agents that stream, or do not.
            invocable: only agents that can be called, or cannot.
        """
        directory = (await self._ready()).directory
        return [
            entry
            for entry in await directory.catalog()
            if (channel is None or in_channel(entry.name, channel))
            and (not tags or set(tags) <= set(entry.tags))
            and streaming in {None, entry.streaming}
            and invocable in {None, entry.invocable}
        ]

    async def contract(self, name: str) -> AgentContract:
        """An agent's full contract.

        Raises:
            NotFound: there is no agent of this name.
        """
        return await (await self._ready()).directory.contract(name)

    async def discover(self, channel: str | None = None) -> list[AgentContract]:
        """The full contracts of all agents, or of those of one channel."""
        contracts = await (await self._ready()).directory.discover()
        return [c for c in contracts if channel is None or in_channel(c.name, channel)]

    async def _buckets(self) -> KVBuckets:
        return (await self._ready()).buckets

    async def _objects(self) -> ObjectStore:
        return (await self._ready()).objects
