"""Requests that pass the plugins' border on their way out."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Literal

from openagentmesh.agent.call import within_deadline
from openagentmesh.agent.client_middleware import Border, Outgoing
from openagentmesh.client.pending import Waits
from openagentmesh.client.requests import Callback, Caller
from openagentmesh.protocol import codec, subjects
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox


class BorderCaller(Caller):
    """Calls, streams and sends as a Caller does, each within the middlewares of a border."""

    def __init__(
        self, connection: Connection, inbox: Inbox, waits: Waits, instance_id: str, border: Border
    ) -> None:
        super().__init__(connection, inbox, waits, instance_id)
        self._border = border

    async def call(
        self, name: str, payload: object, timeout: float | None, headers: Mapping[str, str] | None
    ) -> Any:  # noqa: ANN401 - a JSON value of any shape
        """Send one request and return the first answer, or raise what came instead."""
        loop, timeout = asyncio.get_running_loop(), within_deadline(timeout)
        began = loop.time()
        async with self._passing("call", name, payload, headers, timeout) as outgoing:
            left = None if timeout is None else max(0.0, began + timeout - loop.time())
            return await super().call(name, outgoing.body, left, outgoing.headers)

    async def stream(
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        total: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send one request and yield its chunks."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._passing("stream", name, payload, headers, timeout) as outgoing:
            left = None if total is None else max(0.0, began + total - loop.time())
            asked = super().stream(name, outgoing.body, timeout, outgoing.headers, left)
            async with aclosing(asked) as chunks:
                async for chunk in chunks:
                    outgoing.chunks += 1
                    yield chunk

    async def send(  # noqa: PLR0913 - what `send` takes
        self,
        name: str,
        payload: object,
        timeout: float | None,
        headers: Mapping[str, str] | None,
        *,
        on_reply: Callback | None = None,
        on_error: Callback | None = None,
        reply_to: str = "",
    ) -> None:
        """Send one request and go on."""
        async with self._passing("send", name, payload, headers, timeout) as outgoing:
            await super().send(
                name,
                outgoing.body,
                timeout,
                outgoing.headers,
                on_reply=on_reply,
                on_error=on_error,
                reply_to=reply_to,
            )

    def _passing(
        self,
        verb: Literal["call", "stream", "send"],
        name: str,
        payload: object,
        headers: Mapping[str, str] | None,
        timeout: float | None,
    ) -> AbstractAsyncContextManager[Outgoing]:
        given = dict(headers or {})
        request_id = given.setdefault(subjects.REQUEST_ID, "") or codec.new_id()
        given[subjects.REQUEST_ID] = request_id
        return self._border.passing(Outgoing(verb, name, request_id, codec.encode(payload), given), timeout)
