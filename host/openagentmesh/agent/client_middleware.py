"""What leaves a mesh, and what plugins put around that: Outgoing, ClientMiddleware, Border."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Final, Literal

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError, MeshTimeout, PluginFailed, error_text

# Seconds that middlewares have for an event, which has no timeout of its own.
EVENT_PATIENCE: Final = 30.0


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

    @asynccontextmanager
    async def passing(self, outgoing: Outgoing, timeout: float | None = None) -> AsyncIterator[Outgoing]:
        """The way of one request or event through all middlewares.

        They have `timeout` seconds together before it, and each as many after it.

        Raises:
            MeshTimeout: they take longer.
            MeshError: a middleware does not let it pass.
            PluginFailed: a middleware raised anything else.

        """
        loop = asyncio.get_running_loop()
        until = None if timeout is None else loop.time() + timeout
        async with AsyncExitStack() as stack:
            for plugin, middleware in self._layers:
                with _named(plugin, "before", outgoing):
                    layer = middleware(outgoing)
                    async with asyncio.timeout_at(until):
                        await layer.__aenter__()
                stack.push_async_exit(partial(_leave, plugin, layer, outgoing, timeout))
            yield outgoing


async def _leave(
    plugin: str,
    layer: AbstractAsyncContextManager[object],
    outgoing: Outgoing,
    timeout: float | None,
    *raised: *tuple[type[BaseException] | None, BaseException | None, TracebackType | None],
) -> None:
    """Leave a layer. It may turn an error into another one, but no failure into a success."""
    with _named(plugin, "after", outgoing, raised[1]):
        async with asyncio.timeout(timeout):
            await layer.__aexit__(*raised)


@contextmanager
def _named(
    plugin: str, when: str, outgoing: Outgoing, passing: BaseException | None = None
) -> Iterator[None]:
    """Whatever a plugin raises is a MeshError that names it, but for what only passes through it."""
    try:
        yield
    except MeshError:
        raise
    except TimeoutError as exc:
        if exc is passing:
            raise
        late = f"The plugin '{plugin}' took too long {when} the {outgoing.verb} of {outgoing.target}."
        raise MeshTimeout(late, details={"plugin": plugin}) from exc
    except Exception as exc:
        if exc is passing:
            raise
        why = f"the plugin '{plugin}' failed {when} the {outgoing.verb} of {outgoing.target}"
        raise PluginFailed(f"{why}: {error_text(exc)}", details={"plugin": plugin}) from exc
