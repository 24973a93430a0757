"""A bounded thread pool for blocking handlers; its threads never delay the end of the process."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from threading import Condition, Thread
from time import monotonic
from typing import Any, Final

from openagentmesh.protocol.errors import Overloaded
from openagentmesh.protocol.status import ThreadPoolStatus

log = logging.getLogger(__name__)

# An agent that has abandoned this part of the threads gets no more of them.
_MAX_ABANDONED_PART: Final = 4
_RETRY_AFTER_MS: Final = 1000


class ThreadPool:
    """Runs functions in threads; functions above the maximum wait for a thread.

    A thread cannot be stopped. When its request has ended, it is *abandoned*: another thread replaces it,
    and it is counted and logged until it ends.

    `concurrent.futures` does not fit: the interpreter waits for its threads at exit.
    """

    def __init__(self, max_threads: int = 0) -> None:
        self.resize(max_threads)
        # How many threads each agent has abandoned.
        self.abandoned: Counter[str] = Counter()
        self._changed = Condition()
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}
        self._threads = 0
        self._idle = 0

    def resize(self, max_threads: int) -> None:
        """Change the maximum; 0 is four more than there are processors, at most 32."""
        self.max_threads = max_threads or min(32, (os.cpu_count() or 1) + 4)

    def status(self) -> ThreadPoolStatus:
        """Its state, for `oam status`."""
        with self._changed:
            abandoned = self.abandoned.total()
            busy = self._threads - self._idle - abandoned
            return ThreadPoolStatus(
                max=self.max_threads, busy=busy, waiting=len(self._waiting), abandoned=abandoned
            )

    async def run(self, agent: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - any result
        """Run a function of an agent in a thread, within the caller's context.

        Raises:
            Overloaded: the agent has abandoned too many threads already.
        """
        if self.abandoned[agent] >= max(1, self.max_threads // _MAX_ABANDONED_PART):
            raise Overloaded(
                f"Agent '{agent}' has {self.abandoned[agent]} threads that do not end. Try again later.",
                details={"retry_after_ms": _RETRY_AFTER_MS},
            )
        done: Future[Any] = Future()
        with self._changed:
            self._waiting[done] = partial(copy_context().run, function)
            self._wake_or_start()
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            with self._changed:
                self._waiting.pop(done, None)
            if done.running():
                self._abandon(agent, done)
            raise

    def _wake_or_start(self) -> None:
        """Assign a thread to a waiting function, if the maximum allows one."""
        if self._idle >= len(self._waiting):
            self._changed.notify()
        elif self._threads - self.abandoned.total() < self.max_threads:
            self._threads += 1
            Thread(target=self._work, name="oam-handler", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._threads - self.abandoned.total() > self.max_threads:  # an abandoned one has returned
                    self._threads -= 1
                    return
                self._idle += 1
                while not self._waiting:
                    self._changed.wait()
                self._idle -= 1
                done = next(iter(self._waiting))
                function = self._waiting.pop(done)
            if done.set_running_or_notify_cancel():
                _run(function, done)
            del done, function  # an idle thread holds no references

    def _abandon(self, agent: str, done: "Future[Any]") -> None:
        began = monotonic()

        def on_end(_done: "Future[Any]") -> None:
            with self._changed:
                self.abandoned[agent] -= 1
                self.abandoned += Counter()  # removes agents with none
            log.warning("%s: abandoned thread ended after %.1f s", agent, monotonic() - began)

        with self._changed:
            self.abandoned[agent] += 1
            if self._waiting:
                self._wake_or_start()
        log.warning("%s: thread abandoned: its request has ended, and a thread cannot be stopped", agent)
        done.add_done_callback(on_end)


def _run(function: Callable[[], Any], done: "Future[Any]") -> None:
    try:
        result = function()
    except StopIteration as exc:  # has another meaning where it is awaited
        failure = RuntimeError(f"the handler raised StopIteration: {exc}")
        failure.__cause__ = exc
        done.set_exception(failure)
    except BaseException as exc:  # noqa: BLE001 - raised where it is awaited
        done.set_exception(exc)
    else:
        done.set_result(result)


pool: Final = ThreadPool()
"""The threads of this process."""
