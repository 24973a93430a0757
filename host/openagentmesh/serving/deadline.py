"""The time limit of a running request, which can be moved at no cost, and its cancellation."""

import asyncio
from contextvars import Context
from typing import Final, Self

from openagentmesh.agent.call import ServedCall

_NO_ANSWER: Final = "did not answer in time"
_SLOW_READER: Final = "had to wait too long for the reader of its stream"
# How much longer a chunk may take while clients reconnect to a restarted server.
_RECOVERY_S: Final = 5.0


class RequestDeadline:
    """`asyncio.timeout_at` that can be moved for next to nothing: a stream moves it with each chunk.

    The block raises TimeoutError after the call's deadline, and is cancelled when the caller abandons the
    request. `limit_s` is the agent's own timeout.

    Attributes:
        expired: whether the deadline has passed.
        reason: what was not done in time, as words that follow the agent's name.
    """

    def __init__(self, call: ServedCall, limit_s: float) -> None:
        self.expired = False
        self.reason = _NO_ANSWER
        self._at = call.deadline
        self._call = call
        self._limit_s = limit_s

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a deadline needs a task"
        self._task, self._cancelling = task, task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._arm()
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        self._timer.cancel()
        # A cancellation from elsewhere propagates.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def abandon(self, timed_out: bool) -> None:  # noqa: FBT001 - passed as a callback
        """Stop the request: its caller does not wait for the answer."""
        if timed_out:  # the caller's clock was ahead
            self._expire()
        else:
            self._call.is_abandoned = True
            self._task.cancel()

    def extend(self) -> None:
        """Move the deadline while a chunk has to wait for its reader, or for the server."""
        self._move(self._loop.time() + self._limit_s + _RECOVERY_S)
        self.reason = _SLOW_READER

    def restart(self) -> None:
        """Restart the time limit after a chunk: a stream may run for ever, as long as it makes progress."""
        call = self._call
        call.deadline = self._loop.time() + call.timeout_s
        self._move(call.deadline)
        self.reason = _NO_ANSWER

    def _move(self, at: float) -> None:
        self._at = at
        if at < self._armed_for:
            self._timer.cancel()
            self._arm()

    def _arm(self) -> None:
        self._armed_for = self._at
        # A timer holds its context until its time, also when it is cancelled; the task's own context
        # contains the request.
        self._timer = self._loop.call_at(self._at, self._on_time, context=Context())

    def _on_time(self) -> None:
        if self._loop.time() < self._at:  # it was moved
            self._arm()
        else:
            self._expire()

    def _expire(self) -> None:
        if not self.expired:
            self._timer.cancel()
            self.expired = True
            self._task.cancel()
