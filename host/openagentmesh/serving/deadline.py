"""A time limit for the running task that may be put off at no cost."""

import asyncio
from contextvars import Context
from types import TracebackType
from typing import Final, Self

ANSWER_LATE: Final = "did not answer in time"


class Deadline:
    """`asyncio.timeout_at`, but putting it off costs next to nothing: a stream does it with each chunk.

    Leaving the block raises TimeoutError when the time `at` of the event loop's clock came
    before.

    Attributes:
        expired: whether it came.
        missed: what was not done by then, in words that follow the agent's name.

    """

    def __init__(self, at: float) -> None:
        self._at = at
        self.expired = False
        self.missed = ANSWER_LATE

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a deadline is for a task"
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
        # A cancel that somebody else asked for meanwhile goes on.
        if self.expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def _arm(self) -> None:
        self._armed_for = self._at
        # A timer keeps its context until its time, also when it is cancelled; the task's own one
        # has the request in it.
        self._timer = self._loop.call_at(self._at, self._on_time, context=Context())

    def _on_time(self) -> None:
        if self._loop.time() < self._at:  # it was put off
            self._arm()
        else:
            self.expire()
