"""Letting an old generation go: wait for what runs on it, dispose of it, and say what it left behind."""

import asyncio
import gc
import logging
import sys
import threading
import traceback
import typing
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from inspect import isasyncgen, isawaitable
from time import monotonic
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.agent.agent import Agent
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.mesh.module_context import Generation
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.imports import Stage
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.modules import Source
from openagentmesh.runtime.reload.changes import Plan
from openagentmesh.serving.route import Route
from openagentmesh.transport.tasks import cancel_and_wait, cancel_within, retry_forever

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload makes way for the one before it.
_PROBATION: Final = 1.0
_DISPOSAL: Final = 5.0
_CANCEL_GRACE: Final = 1.0
# To find out who holds an old version the event loop stands still; so many seconds at most, and so many
# objects are looked for at once.
_SEARCH: Final = 0.01
_MOST_SOUGHT: Final = 8
_BY_THEMSELVES: Final = frozenset({"publisher", "watcher"})


@dataclass(slots=True)
class Retired:
    """What a reload has replaced.

    Attributes:
        agents: routes, and the versions that they pointed at.
        gone: the routes of agents that are there no more.
        added: the names of agents that were not there before.
        stage: the modules they came from, and what was executed in their place.
        modules: their modules, as they were.
        plan: what was done.

    """

    agents: list[tuple[Route, Agent]]
    gone: list[Route]
    added: list[str]
    stage: Stage
    modules: list[Module]
    plan: Plan

    @property
    def generations(self) -> list[Generation]:
        """What its modules had declared; what was imported with them and stays has its next module."""
        loose = [module.loose for module in self.modules if module.origin not in self.plan.origins]
        return [source.generation for source in self.stage.sources.values()] + loose

    def old_agents(self, config: Config) -> list[Agent]:
        """The versions that served before, but for those that are disabled now."""
        old = [agent for _, agent in self.agents] + [route.agent for route in self.gone]
        return [agent for agent in old if config.enabled(agent.name)]


GoBack = Callable[[Retired, str], Awaitable[bool]]


class Retirements:
    """What is being let go of; `go_back` lets an old version serve again, see `retire`."""

    def __init__(self, node: Node, go_back: GoBack) -> None:
        self._node = node
        self._go_back = go_back
        self._running: dict[asyncio.Task[None], Retired] = {}
        self._unfinished: list[Retired] = []

    def begin(self, retired: Retired, drain_timeout: float, outcome: Outcome) -> None:
        """Let something go, in a task."""
        task = asyncio.create_task(retire(retired, self._node, drain_timeout, outcome, self._go_back))
        self._running[task] = retired
        task.add_done_callback(self._has_ended)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        retired = self._running.pop(task)
        if task.cancelled():
            self._unfinished.append(retired)
        elif exc := task.exception():
            log.error("an old version could not be let go of", exc_info=exc)

    async def finish(self, timeout: float | None = None) -> None:
        """Wait until all is let go of, and after `timeout` seconds for nothing more."""
        while self._running and timeout is None:
            await asyncio.wait(self._running)
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)
        await cancel_and_wait(*self._running)

    async def dispose(self) -> None:
        """Dispose of what could not be let go of in time."""
        await dispose([generation for retired in self._unfinished for generation in retired.generations])


async def retire(
    retired: Retired, node: Node, drain_timeout: float, outcome: Outcome, go_back: GoBack
) -> None:
    """Finish what runs on the old version, dispose of it, tell what it left behind.

    When a publisher or watcher of the new version fails at once, `go_back` is called with the
    reason; if that lets the old version serve again, nothing of it is disposed of.
    """
    names = [*(agent.name for _, agent in retired.agents), *(route.agent.name for route in retired.gone)]
    failure, _, _ = await asyncio.gather(
        _failure(retired.agents, node),
        node.withdraw(retired.gone, drain_timeout),
        asyncio.gather(*[route.finish(drain_timeout, agent) for route, agent in retired.agents]),
    )
    if failure and await go_back(retired, failure):
        return
    await dispose(retired.generations)
    left = [*_left_by(list(retired.stage.modules.values()))]
    marks = _marked(retired.stage.modules)
    # Nothing of ours holds the old version any more; whoever still does is somebody else.
    retired.agents, retired.gone, retired.stage, retired.modules = [], [], Stage(), []
    await asyncio.sleep(0)  # what has just ended is let go of in the loop's next turn
    left = left or _survivors(marks)  # what was found before says already who holds it
    outcome.notes += left
    for what in left:
        log.warning("the old version of %s left behind: %s", ", ".join(names) or "a module", what)


def left_by_tried(executed: Iterable[Source]) -> list[str]:
    """What modules that were executed, and do not serve, have left behind, in words."""
    modules = [source.module for source in executed if source.module is not None]
    return [f"what was tried left behind: {what}" for what in _left_by(modules)]


def _left_by(modules: list[ModuleType]) -> Iterator[str]:
    yield from _tasks_of(modules)
    yield from _threads_of(modules)
    yield from _log_handlers_of(modules)


def forget_hints() -> None:
    """Empty the caches of `typing`: in them versions share hints, and what a name in one of them means."""
    for clear in getattr(typing, "_cleanups", ()):
        clear()


async def dispose(generations: Collection[Generation]) -> None:
    """Call what modules' authors want called when they are replaced, once; failures are logged."""
    while waiting := [generation for generation in generations if generation.disposals]:
        function = waiting[0].disposals.pop(0)
        # In a task of its own, which is left when it does not end.
        disposing = asyncio.create_task(_call(function))
        try:
            await asyncio.wait([disposing], timeout=_DISPOSAL)
        finally:
            deaf = await cancel_within(_CANCEL_GRACE, [disposing])
        why = "does not end" if deaf else "" if disposing.cancelled() else disposing.result()
        if deaf or disposing.cancelled():
            why = f"did not end within {_DISPOSAL:g}s"
        if why:
            what = "called when nothing ran on its module any more"
            log.error("%s, %s, failed: %s", _name_of(function), what, why)


async def _call(function: Callable[[], Any]) -> str:
    """Call an author's function; why it failed, which may be anything."""
    try:
        result = function()
        if isawaitable(result):
            await result
    except BaseException as exc:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        return "".join(traceback.format_exception(exc))
    return ""


async def _failure(agents: list[tuple[Route, Agent]], node: Node) -> str:
    """Why new publishers and watchers, in the place of old ones, failed at once; empty when none did."""
    names = [agent.name for _, agent in agents]
    # What others have to know of the new version may have to wait for the server.
    await retry_forever(lambda: node.settled(names), "serving what was reloaded")
    backgrounds = [
        background
        for route, old in agents
        if {route.agent.handler.shape, old.handler.shape} <= _BY_THEMSELVES
        and (background := route.background) is not None
    ]
    failures = await asyncio.gather(*[each.failed_within(_PROBATION) for each in backgrounds])
    named = zip(backgrounds, failures, strict=True)
    return "; ".join(f"{each.name} failed at once ({failure})" for each, failure in named if failure)


def _tasks_of(modules: list[ModuleType]) -> Iterator[str]:
    """Tasks that run functions of these modules."""
    spaces = {id(vars(module)) for module in modules}
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        of_them = (frame for frame in _frames_of(task.get_coro()) if id(frame.f_globals) in spaces)
        if (frame := next(of_them, None)) is not None:
            yield f"the task {task.get_name()} ({frame.f_code.co_qualname})"


def _frames_of(running: Any) -> Iterator[FrameType]:  # noqa: ANN401 - whatever can be awaited
    """The frames of a coroutine, and of what it awaits."""
    while running is not None:
        if type(running).__name__.startswith("async_generator_"):  # a step of one, which hides it
            running = next((each for each in gc.get_referents(running) if isasyncgen(each)), None)
        kind = next((kind for kind in ("cr", "ag", "gi") if hasattr(running, f"{kind}_frame")), None)
        if kind is None:
            return
        if (frame := getattr(running, f"{kind}_frame")) is not None:
            yield frame
        running = getattr(running, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _threads_of(modules: list[ModuleType]) -> Iterator[str]:
    """Threads whose functions are of these modules."""
    for thread in threading.enumerate():
        target = getattr(thread, "_target", None)
        if _is_of(target, modules) or type(thread).__module__ in {m.__name__ for m in modules}:
            yield f"the thread {thread.name}"


def _log_handlers_of(modules: list[ModuleType]) -> Iterator[str]:
    """Logging handlers of these modules' own classes that loggers still use."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else []:
            if any(getattr(module, type(handler).__name__, None) is type(handler) for module in modules):
                name = getattr(logger, "name", "root")
                yield f"the logging handler {type(handler).__name__} of '{name}'"


def _is_of(function: object, modules: list[ModuleType]) -> bool:
    plain = getattr(function, "__func__", function)
    return isinstance(plain, FunctionType) and any(plain.__globals__ is vars(module) for module in modules)


class _Mark:
    """Lies in the namespace of a module, and dies with it."""

    __slots__ = ("__weakref__",)


_Marks = dict[str, weakref.ref[_Mark]]


def _marked(modules: dict[str, ModuleType]) -> _Marks:
    """Mark the namespaces of modules; the modules themselves would not tell, for functions outlive them."""
    marks = {}
    for name, module in modules.items():
        mark = vars(module)["__retired__"] = _Mark()
        marks[name] = weakref.ref(mark)
    return marks


def _survivors(marks: _Marks) -> list[str]:
    """The modules that are still in memory, and who holds them."""
    if not marks:
        return []
    forget_hints()
    gc.collect()
    found, until = [], monotonic() + _SEARCH
    for name, reference in marks.items():
        mark = reference()
        if mark is not None and (holder := _holder_of(mark, until)):
            found.append(f"{name} in memory, held by {holder}")
    return found


def _holder_of(mark: _Mark, until: float) -> str:
    """What holds the namespace that a mark lies in, in words; empty when it is nobody's fault."""
    known: dict[int, object] = {id(mark): mark}
    level: list[object] = [mark]
    last, excused = "", False
    while level:
        if monotonic() > until:
            return ""  # it may well be a cancelled timer
        found = gc.get_referrers(*level[:_MOST_SOUGHT])
        ours = {id(level), id(known), id(found)}
        level = []
        for each in found:
            if id(each) in known or id(each) in ours or each is level:
                continue
            if isinstance(each, asyncio.Handle) and each.cancelled():
                excused = True  # until its time has come it keeps its context
                continue
            if words := _root_in_words(each, known):
                return words
            level.append(each)
        known |= {id(each): each for each in level}
        last = _in_words(level[0]) if level else last
    # What was frozen is not told of here, and never collected.
    return "" if excused or (gc.get_freeze_count() and len(known) == 1) else last


def _root_in_words(holder: object, known: dict[int, object]) -> str:
    """What a holder is called if it is one from which everything can be reached."""
    is_root = isinstance(holder, Route | Node | asyncio.Handle | threading.Thread)
    if is_root or (isinstance(holder, asyncio.Task) and not holder.done()):
        return _in_words(holder)
    name = holder.get("__name__") if isinstance(holder, dict) else None
    module = sys.modules.get(name) if isinstance(name, str) else None
    if isinstance(holder, dict) and module is not None and vars(module) is holder:
        return f"{name}.{next(key for key, value in holder.items() if id(value) in known)}"
    return ""


def _in_words(holder: object) -> str:
    if isinstance(holder, FrameType):
        return f"a call of {holder.f_code.co_qualname}"
    if hasattr(holder, "__qualname__"):
        return f"something that has {_name_of(holder)}"
    return f"a {type(holder).__module__}.{type(holder).__qualname__}"


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", "") or repr(function)
