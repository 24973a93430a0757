"""Watchdog: says which agent blocks the event loop, where it stands, and for how long.

A thread asks the loop for a sign of life again and again, and looks at the stack of the loop's thread
when none comes. Calls pass through nothing of this.
"""

import asyncio
import logging
import sys
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice, takewhile
from threading import Event, Thread, get_ident
from time import monotonic
from types import CodeType, FrameType
from typing import Annotated, Final

from openagentmesh import Agent, Call, hookimpl
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

# Of a stack so many innermost frames are shown.
_MOST_FRAMES: Final = 20
# How often the loop is asked for a sign of life, in parts of the threshold.
_LOOKS: Final = 2
_MINUTE: Final = 60.0
_REMEDY: Final = "Let it `await`, or write `def` instead of `async def`: then it runs in a thread."


class Settings(BaseModel):
    """`[plugins.watchdog]`.

    Attributes:
        threshold: seconds that the loop may stand still before that is told.
        reports: how many times a minute that is told, at most.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Annotated[float, Field(ge=0.01, le=60)] = 0.1
    reports: Annotated[int, Field(ge=1, le=1000)] = 10


class Watchdog:
    """The plugin.

    Args:
        settings: for `AgentMesh(plugins=[Watchdog(Settings(...))])`; a host gives those of mesh.toml.

    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        # File and line of each agent's handler, for those that run by themselves.
        self._places: dict[str, str] = {}

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """The table of mesh.toml."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings) -> None:
        """Take new settings, from the next look on."""
        self._settings = settings

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> None:
        """Remember where an agent's code is; nothing is put around it."""
        self._places[agent.name] = agent.source

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Forget an agent."""
        self._places.pop(name, None)

    @hookimpl
    def mesh_lifespan(self) -> AbstractAsyncContextManager[None]:
        """Watch the loop while agents serve."""
        return self._watching()

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        watch = _Watch(lambda: self._settings, self._places)
        Thread(target=watch.run, name="oam-watchdog", daemon=True).start()
        try:
            yield
        finally:
            watch.over.set()


class _Watch:
    """Watches the loop that it is made on, from a thread."""

    def __init__(self, settings: Callable[[], Settings], places: dict[str, str]) -> None:
        self.over = Event()
        self._settings = settings
        self._places = places
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        # What stands below all that runs on the loop: the loop itself, and the program that runs it.
        self._below: set[CodeType] = set()
        self._loop.call_soon(self._learn_below)
        self._told: deque[float] = deque()
        self._untold = 0

    def _learn_below(self) -> None:
        self._below = {frame.f_code for frame, _ in islice(traceback.walk_stack(sys._getframe()), 1, None)}  # noqa: SLF001 - made for this

    def run(self) -> None:
        """Ask for signs of life until it is over."""
        while not self.over.wait(self._settings().threshold / _LOOKS):
            alive, asked = Event(), monotonic()
            try:
                self._loop.call_soon_threadsafe(alive.set)
            except RuntimeError:  # the loop is closed
                return
            if not alive.wait(self._settings().threshold):
                try:
                    self._stands_still(alive, asked)
                # One look ends here: what lies on the stack is anybody's, and the next look may go well.
                except Exception:
                    log.exception("The event loop has stood still, and who blocks it cannot be told")

    def _stands_still(self, alive: Event, asked: float) -> None:
        told = self._may_tell()
        who, stack = self._seen() if told else ("", "")
        if alive.is_set():  # this thread did not get its turn either
            who, stack = "something that was over before it could be seen", ""
        if told:
            log.warning(
                "The event loop has stood still for %.2f s, and with it all agents: %s blocks it.%s %s\n%s",
                monotonic() - asked, who, self._left_out(), _REMEDY, stack,
            )  # fmt: skip
        # Until it is closed: with asyncio's it may end without having come to us.
        while not alive.wait(1.0) and not self._loop.is_closed():
            pass
        if told:
            log.warning("The event loop goes on; %s had blocked it for %.2f s", who, monotonic() - asked)

    def _may_tell(self) -> bool:
        now = monotonic()
        while self._told and now - self._told[0] > _MINUTE:
            self._told.popleft()
        if len(self._told) >= self._settings().reports:
            self._untold += 1
            return False
        self._told.append(now)
        return True

    def _left_out(self) -> str:
        untold, self._untold = self._untold, 0
        return f" ({untold} times more in between.)" if untold else ""

    def _seen(self) -> tuple[str, str]:
        """Who is at work on the loop, and the stack from there on."""
        innermost = sys._current_frames().get(self._thread)  # noqa: SLF001 - made for this
        stack = (frame for frame, _ in traceback.walk_stack(innermost))
        frames = list(takewhile(lambda frame: frame.f_code not in self._below, stack))
        who, own = self._agent_in(frames)
        shown = traceback.StackSummary.extract(
            (frame, frame.f_lineno) for frame in reversed(frames[: min(own + 1, _MOST_FRAMES)])
        )
        return who, "".join(shown.format()).rstrip()

    def _agent_in(self, frames: list[FrameType]) -> tuple[str, int]:
        """The agent that a stack belongs to, in words, and the frame where its own code begins."""
        agents = list(self._places.items())
        places = [f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno}" for frame in frames]
        named = [(i, name) for i, place in enumerate(places) for name, source in agents if source == place]
        answering = [call.agent for f in frames if type(call := f.f_locals.get("call")) is Call]
        begin = named[0][0] if named else len(frames)
        if answering:
            return f"agent '{answering[0]}'", begin
        if named:
            return _listed(name for i, name in named if i == begin), begin
        # What a handler left behind in a task of its own has nothing of an agent but its file.
        for i, frame in reversed(list(enumerate(frames))):
            file = frame.f_code.co_filename
            inside = [name for name, source in agents if source.rpartition(":")[0] == file]
            if inside:
                return f"the code of {_listed(inside)}", i
        return "something outside of all agents", len(frames)


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return f"{'agents' if found[1:] else 'agent'} {', '.join(map(repr, found))}"
