"""Watchdog: reports which agent blocks the event loop, for how long, and where in its code.

A thread schedules a callback on the loop at intervals; when that is late, it reads the stack of the loop's
thread. Requests do not pass through the plugin.
"""

import asyncio
import logging
import sys
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import islice, takewhile
from threading import Event, Thread, get_ident
from time import monotonic
from types import CodeType, FrameType
from typing import Annotated, Any, Final

from openagentmesh import Agent, Call, hookimpl
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

# How many of the innermost frames of a stack are shown.
_MAX_FRAMES: Final = 20
# How often the loop is checked, per threshold.
_CHECKS_PER_THRESHOLD: Final = 2
_MINUTE_S: Final = 60.0
_ADVICE: Final = "Use `await` for what takes time, or `def` instead of `async def`: it then runs in a thread."


class Settings(BaseModel):
    """`[plugins.watchdog]`.

    Attributes:
        threshold: seconds that the loop may be blocked before that is reported.
        reports: the maximum number of reports per minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Annotated[float, Field(ge=0.01, le=60)] = 0.1
    reports: Annotated[int, Field(ge=1, le=1000)] = 10


class Watchdog:
    """The plugin.

    Args:
        settings: for `AgentMesh(plugins=[Watchdog(Settings(...))])`; a host passes those of mesh.toml.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        # File and line of each agent's handler.
        self._sources: dict[str, str] = {}

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """The table of mesh.toml."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings) -> None:
        """Apply new settings, from the next check on."""
        self._settings = settings

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> None:
        """Remember where an agent's code is; it gets no middleware."""
        self._sources[agent.name] = agent.source

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Forget an agent."""
        self._sources.pop(name, None)

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self) -> AsyncIterator[None]:
        """Watch the loop while agents serve."""
        watch = _LoopWatch(lambda: self._settings, self._sources)
        Thread(target=watch.run, name="oam-watchdog", daemon=True).start()
        try:
            yield
        finally:
            watch.stopped.set()


class _LoopWatch:
    """Watches the running event loop from a thread."""

    def __init__(self, settings: Callable[[], Settings], sources: dict[str, str]) -> None:
        self.stopped = Event()
        self._settings, self._sources = settings, sources
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        # The frames below everything that runs on the loop: the loop itself, and the program that runs it.
        self._outer: set[CodeType] = set()
        self._loop.call_soon(self._record_outer)
        self._reported: deque[float] = deque()
        self._skipped = 0

    def _record_outer(self) -> None:
        self._outer = {frame.f_code for frame, _ in islice(traceback.walk_stack(sys._getframe()), 1, None)}  # noqa: SLF001 - no public access

    def run(self) -> None:
        """Check the loop until the watch is stopped."""
        while not self.stopped.wait(self._settings().threshold / _CHECKS_PER_THRESHOLD):
            alive, started = Event(), monotonic()
            try:
                self._loop.call_soon_threadsafe(alive.set)
            except RuntimeError:  # the loop is closed
                return
            if not alive.wait(self._settings().threshold):
                try:
                    self._on_blocked(alive, started)
                # One check ends here: a stack may hold any objects, and the next check may succeed.
                except Exception:
                    log.exception("watchdog: the event loop was blocked, and reading its stack failed")

    def _on_blocked(self, alive: Event, started: float) -> None:
        may_report = self._may_report()
        blocker, stack = self._find_blocker() if may_report else ("", "")
        if alive.is_set():  # this thread was delayed itself
            blocker, stack = "something that ended before it could be identified", ""
        if may_report:
            log.warning(
                "event loop blocked for %.2f s by %s; no agent answers meanwhile.%s %s\n%s",
                monotonic() - started, blocker, self._skipped_text(), _ADVICE, stack,
            )  # fmt: skip
        # Until it is closed: with asyncio's loop the callback may never run.
        while not alive.wait(1.0) and not self._loop.is_closed():
            pass
        if may_report:
            log.warning("event loop running again: blocked by %s for %.2f s", blocker, monotonic() - started)

    def _may_report(self) -> bool:
        now = monotonic()
        while self._reported and now - self._reported[0] > _MINUTE_S:
            self._reported.popleft()
        if len(self._reported) >= self._settings().reports:
            self._skipped += 1
            return False
        self._reported.append(now)
        return True

    def _skipped_text(self) -> str:
        skipped, self._skipped = self._skipped, 0
        return f" ({skipped} reports skipped.)" if skipped else ""

    def _find_blocker(self) -> tuple[str, str]:
        """What runs on the loop, in words, and its stack."""
        innermost = sys._current_frames().get(self._thread)  # noqa: SLF001 - no public access
        stack = (frame for frame, _ in traceback.walk_stack(innermost))
        frames = list(takewhile(lambda frame: frame.f_code not in self._outer, stack))
        blocker, outermost = self._running_agent(frames) or self._file_of_agent(frames)
        shown = traceback.StackSummary.extract(
            (frame, frame.f_lineno) for frame in reversed(frames[: min(outermost + 1, _MAX_FRAMES)])
        )
        return blocker, "".join(shown.format()).rstrip()

    def _running_agent(self, frames: list[FrameType]) -> tuple[str, int] | None:
        """The agent whose request or handler a stack runs, and the frame where its own code begins."""
        begin, handlers = len(frames), []
        for i, frame in enumerate(frames):
            location = f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno}"
            if handlers := [name for name, source in list(self._sources.items()) if source == location]:
                begin = i
                break
        # Frames that answer a request have it in a variable of this name; an author's may be any object.
        calls: Iterable[Any] = (frame.f_locals.get("call") for frame in frames)
        answering = next((call.agent for call in calls if issubclass(type(call), Call)), "")
        if answering:
            return f"agent '{answering}'", begin
        return (_listed(handlers), begin) if handlers else None

    def _file_of_agent(self, frames: list[FrameType]) -> tuple[str, int]:
        """The agents of the outermost file that has any: a task that a handler left has no other trace."""
        for i, frame in reversed(list(enumerate(frames))):
            file, sources = frame.f_code.co_filename, list(self._sources.items())
            if inside := [name for name, source in sources if source.rpartition(":")[0] == file]:
                return f"the code of {_listed(inside)}", i
        return "code outside of all agents", len(frames)


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return f"{'agents' if found[1:] else 'agent'} {', '.join(map(repr, found))}"
