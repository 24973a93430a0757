"""What leaves a mesh, and what plugins put around that: Outgoing, ClientMiddleware, Border."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError, PluginFailed, text_of


@dataclass(slots=True)
class Outgoing:
    """One request or event on its way out, or an event that has come in.

    Attributes:
        verb: what is done; `publish` is an event that leaves, `receive` one that has come.
        target: the agent's name, for events the subject.
        request_id: the request's id; events have none.
        body: what is sent.
        headers: what goes along besides the protocol's own; a middleware may add to them.
        chunks: how many chunks of a stream have come so far.

    """

    verb: Literal["call", "stream", "send", "publish", "receive"]
    target: str
    request_id: str = ""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    chunks: int = 0

    @property
    def subject(self) -> str:
        """The NATS subject that it goes to, or has come on."""
        return self.target if self.verb in {"publish", "receive"} else subjects.agent(self.target)


ClientMiddleware = Callable[[Outgoing], AbstractAsyncContextManager[object]]
"""Is entered before something leaves, and left when that is over: when the answer is there."""


class Border:
    """All that leaves a mesh passes it; `layers` are plugins' names and middlewares, first outermost."""

    def __init__(self, layers: Sequence[tuple[str, ClientMiddleware]] = ()) -> None:
        self._layers = layers

    def __bool__(self) -> bool:
        return bool(self._layers)

    def passing(
        self,
        verb: Literal["call", "stream", "send", "publish", "receive"],
        target: str,
        body: bytes,
        headers: Mapping[str, str] | None,
        request_id: str = "",
    ) -> AbstractAsyncContextManager[Outgoing]:
        """The way of one request or event through all middlewares.

        Raises:
            MeshError: a middleware does not let it pass.
            PluginFailed: a middleware raised anything else before it left.

        """
        outgoing = Outgoing(verb, target, request_id, body, dict(headers or {}))
        return self._within(outgoing) if self._layers else nullcontext(outgoing)

    @asynccontextmanager
    async def _within(self, outgoing: Outgoing) -> AsyncIterator[Outgoing]:
        async with AsyncExitStack() as stack:
            for plugin, middleware in self._layers:
                try:
                    await stack.enter_async_context(middleware(outgoing))
                except MeshError:
                    raise
                except Exception as exc:
                    why = f"the plugin '{plugin}' failed before the {outgoing.verb} of {outgoing.target}"
                    raise PluginFailed(f"{why}: {text_of(exc)}", details={"plugin": plugin}) from exc
            yield outgoing
