"""The time limit of a running request, which can be moved at no cost, and its cancellation."""

import asyncio
from contextvars import Context
from types import TracebackType
from typing import Final, Self

from openagentmesh.agent.call import ServedCall

_NO_ANSWER: Final = "did not answer in time"
_SLOW_READER: Final = "had to wait too long for the reader of its stream"
# How much longer a chunk may take while clients reconnect to a restarted server.
_RECOVERY_S: Final = 5.0


class Deadline:
    """`asyncio.timeout_at` that can be moved for next to nothing: a stream moves it with each chunk.

    Leaving the block raises TimeoutError when the time `at` of the event loop's clock has come.

    Attributes:
        expired: whether it has.
    """

    def __init__(self, at: float) -> None:
        self._at = at
        self.expired = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a deadline needs a task"
        self._task, self._cancelling = task, task.cancelling()
        self._loop = asyncio.get_running_loop()
        self._arm()
        return self

    def move(self, at: float) -> None:
        """Expire at another time."""
        self._at = at
        if at < self._armed_for:
            self._timer.cancel()
            self._arm()

    def expire(self) -> None:
        """Expire now, unless it has."""
        if not self.expired:
            self._timer.cancel()
            self.expired = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        # A cancellation by someone else passes on.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def _arm(self) -> None:
        self._armed_for = self._at
        # A timer holds its context until its time, also when it is cancelled; the task's own context
        # contains the request.
        self._timer = self._loop.call_at(self._at, self._on_time, context=Context())

    def _on_time(self) -> None:
        if self._loop.time() < self._at:  # it was moved
            self._arm()
        else:
            self.expire()


class RequestDeadline(Deadline):
    """The deadline of a running request, which is cancelled when its caller is gone.

    Args:
        call: the request.
        limit_s: the agent's own timeout.

    Attributes:
        reason: what was not done in time, as words that follow the agent's name.
    """

    def __init__(self, call: ServedCall, limit_s: float) -> None:
        super().__init__(call.deadline)
        self.reason = _NO_ANSWER
        self._call = call
        self._limit_s = limit_s

    def caller_gone(self, timed_out: bool) -> None:  # noqa: FBT001 - passed as a callback
        """Stop the request: its caller does not wait for the answer."""
        if timed_out:  # the caller's clock was ahead
            self.expire()
        else:
            self._call.is_abandoned = True
            self._task.cancel()

    def reader_slow(self) -> None:
        """A chunk has to wait for its reader, or for the server: the time of the handler stands still."""
        self.move(self._loop.time() + self._limit_s + _RECOVERY_S)
        self.reason = _SLOW_READER

    def chunk_sent(self) -> None:
        """Begin anew: a stream may run for ever, as long as it makes progress."""
        call = self._call
        call.deadline = self._loop.time() + call.timeout_s
        self.move(call.deadline)
        self.reason = _NO_ANSWER
