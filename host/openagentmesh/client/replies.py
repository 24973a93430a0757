"""The callbacks of `send(on_reply=...)`."""

import asyncio
import logging
from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from openagentmesh.protocol.errors import MeshError

log = logging.getLogger(__name__)

Callback = Callable[[Any], object]


class ReplyCallbacks:
    """The callbacks of one `send(on_reply=...)`: functions or coroutine functions."""

    def __init__(self, agent: str, on_reply: Callback, on_error: Callback | None) -> None:
        self.agent = agent
        self._on_reply = on_reply
        self._on_error = on_error

    async def reply(self, value: object) -> None:
        """Pass on one reply, or one chunk."""
        await self._run(self._on_reply, value)

    async def fail(self, error: MeshError) -> None:
        """Pass on the error that ended them."""
        if self._on_error is not None:
            await self._run(self._on_error, error)
        else:
            log.warning("send to %s failed: [%s] %s", self.agent, error.code, error)

    async def _run(self, callback: Callback, value: object) -> None:
        try:
            result = callback(value)
            if isawaitable(result):
                await result
        # The author's callback ends here, whatever it raises; the next reply is still read.
        except BaseException as exc:
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            log.exception("a callback for replies of %s failed", self.agent)
