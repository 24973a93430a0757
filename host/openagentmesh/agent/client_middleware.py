"""Middlewares around what a node sends: ClientOperation, ClientMiddleware, ClientMiddlewares."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Final, Literal

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import MeshError, MeshTimeout, PluginFailed, error_text

# For the middlewares of an event, which has no timeout of its own.
EVENT_TIMEOUT_S: Final = 30.0


@dataclass(slots=True)
class ClientOperation:
    """A request or an event on its way out, or a received event.

    Attributes:
        verb: the verb; `publish` is an event on its way out, `receive` a received one.
        target: the agent's name; for events the subject.
        body: the body.
        headers: headers besides the protocol's own; a middleware may add to them.
        chunks: how many chunks of a stream have arrived so far.
    """

    verb: Literal["call", "stream", "send", "publish", "receive"]
    target: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    chunks: int = 0

    @property
    def request_id(self) -> str:
        """The request's id, which a middleware may change as a header; events have none."""
        return self.headers.get(subjects.REQUEST_ID, "")

    @property
    def subject(self) -> str:
        """The NATS subject that it is sent to, or arrived on."""
        return self.target if self.verb in {"publish", "receive"} else subjects.agent(self.target)


ClientMiddleware = Callable[[ClientOperation], AbstractAsyncContextManager[object]]
"""Is entered before an operation, and exited when that is complete: when the answer has arrived."""


class ClientMiddlewares:
    """All client middlewares of a node, by plugin, the first one outermost."""

    def __init__(self, middlewares: Sequence[tuple[str, ClientMiddleware]] = ()) -> None:
        self._middlewares = middlewares

    def __bool__(self) -> bool:
        return bool(self._middlewares)

    @asynccontextmanager
    async def around(self, operation: ClientOperation, timeout: float | None = None) -> AsyncIterator[None]:
        """Run an operation within all middlewares.

        Together they have `timeout` seconds before it, and each of them as many after it. A middleware may
        replace an error by another one, but cannot suppress it.

        Raises:
            MeshTimeout: they take longer.
            MeshError: a middleware rejects the operation.
            PluginFailed: a middleware raised anything else.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        async with AsyncExitStack() as stack:
            for plugin, middleware in self._middlewares:
                with _attributed(plugin, "before", operation):
                    entered = middleware(operation)
                    async with asyncio.timeout_at(deadline):
                        await entered.__aenter__()
                stack.push_async_exit(partial(_exit, plugin, entered, operation, timeout))
            yield


async def _exit(
    plugin: str,
    entered: AbstractAsyncContextManager[object],
    operation: ClientOperation,
    timeout: float | None,
    *raised: *tuple[type[BaseException] | None, BaseException | None, TracebackType | None],
) -> None:
    # Returns nothing, so that an error is never suppressed.
    with _attributed(plugin, "after", operation, raised[1]):
        async with asyncio.timeout(timeout):
            await entered.__aexit__(*raised)


@contextmanager
def _attributed(
    plugin: str, when: str, operation: ClientOperation, passing: BaseException | None = None
) -> Iterator[None]:
    """Raise a plugin's errors as MeshErrors that name it; `passing` is the operation's own error."""
    try:
        yield
    except Exception as exc:
        if exc is passing or isinstance(exc, MeshError):
            raise
        step, details = f"{when} the {operation.verb} of {operation.target}", {"plugin": plugin}
        if isinstance(exc, TimeoutError):
            raise MeshTimeout(f"The plugin '{plugin}' took too long {step}.", details=details) from exc
        message = f"the plugin '{plugin}' failed {step}: {error_text(exc)}"
        raise PluginFailed(message, details=details) from exc
