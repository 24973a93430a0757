"""Threads for handlers that block: so many at once, and none of them holds up the process' end."""

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

log = logging.getLogger(__name__)

# An agent may leave this part of the threads running for nobody, then it is given no more of them.
_MOST_LEFT: Final = 4
_RETRY_AFTER_MS: Final = 1000


class Threads:
    """Runs functions in threads, at most so many at once; what is more waits for its turn.

    A thread cannot be stopped. When nobody waits any more for what runs in it, it is *left*: another
    one takes its place, and it is counted and told of until it ends.

    The executor of `concurrent.futures` would not do: the process waits for its threads at the end.

    Args:
        most: how many; 0 for four more than there are processors, 32 at most.

    """

    def __init__(self, most: int = 0) -> None:
        self.resize(most)
        # Of each agent, how many threads run for nobody.
        self.left: Counter[str] = Counter()
        self._changed = Condition()
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}
        self._threads = 0
        self._idle = 0

    def resize(self, most: int) -> None:
        """Let so many run from now on; see `most` above."""
        self.most = most or min(32, (os.cpu_count() or 1) + 4)

    def description(self) -> dict[str, int]:
        """How they fare, for `oam status`; JSON."""
        with self._changed:
            left = self.left.total()
            busy = self._threads - self._idle - left
            return {"most": self.most, "busy": busy, "waiting": len(self._waiting), "left": left}

    async def run(self, agent: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
        """Run a function of an agent in a thread, within the context of who awaits it.

        Raises:
            Overloaded: too many threads that were left run for this agent already.

        """
        if self.left[agent] >= max(1, self.most // _MOST_LEFT):
            raise Overloaded(
                f"Agent '{agent}' has {self.left[agent]} threads that do not end. Try again later.",
                details={"retry_after_ms": _RETRY_AFTER_MS},
            )
        done: Future[Any] = Future()
        with self._changed:
            self._waiting[done] = partial(copy_context().run, function)
            self._serve()
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            with self._changed:
                self._waiting.pop(done, None)
            if done.running():
                self._leave(agent, done)
            raise

    def _serve(self) -> None:
        """See to it that what waits is taken by a thread, if there may be one."""
        if self._idle >= len(self._waiting):
            self._changed.notify()
        elif self._threads - self.left.total() < self.most:
            self._threads += 1
            Thread(target=self._work, name="oam-handler", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._threads - self.left.total() > self.most:  # one that was left has come back
                    self._threads -= 1
                    return
                self._idle += 1
                while not self._waiting:
                    self._changed.wait()
                self._idle -= 1
                done = next(iter(self._waiting))
                function = self._waiting.pop(done)
            if done.set_running_or_notify_cancel():
                _settle(done, function)
            del done, function  # an idle thread holds nothing of anybody

    def _leave(self, agent: str, done: "Future[Any]") -> None:
        began = monotonic()

        def come_back(_done: "Future[Any]") -> None:
            with self._changed:
                self.left[agent] -= 1
                self.left += Counter()  # names without any are dropped
            log.warning("%s: a thread ended %.1f s after nobody waited for it", agent, monotonic() - began)

        with self._changed:
            self.left[agent] += 1
            if self._waiting:
                self._serve()
        log.warning("%s: its thread runs on, though nobody waits for it: it cannot be stopped", agent)
        done.add_done_callback(come_back)


def _settle(done: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        result = function()
    except StopIteration as exc:  # means something else to who awaits it
        failure = RuntimeError(f"the handler raised StopIteration: {exc}")
        failure.__cause__ = exc
        done.set_exception(failure)
    except BaseException as exc:  # noqa: BLE001 - raised where it is awaited
        done.set_exception(exc)
    else:
        done.set_result(result)


pool: Final = Threads()
"""The threads of this process."""
