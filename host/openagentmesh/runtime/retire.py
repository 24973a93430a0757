"""Letting an old generation go: wait for what runs on it, dispose of it, and say what it left behind."""

import asyncio
import gc
import logging
import sys
import threading
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import isasyncgen, isawaitable
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.bus.tasks import persistently
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.imports import Stage
from openagentmesh.runtime.outcome import Outcome
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.route import Route

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload makes way for the one before it.
_PROBATION: Final = 1.0
_DISPOSAL: Final = 5.0
# Objects that are looked at, at most, to find out who holds an old version.
_MOST_LOOKED_AT: Final = 10_000
_BY_THEMSELVES: Final = frozenset({"publisher", "watcher"})


@dataclass(slots=True)
class Retired:
    """What a reload has replaced.

    Attributes:
        agents: routes, and the versions that they pointed at.
        gone: the names of agents that are there no more.
        stage: the modules they came from.

    """

    agents: list[tuple[Route, Agent]]
    gone: list[str]
    stage: Stage


async def retire(retired: Retired, node: Node, drain_timeout: float, outcome: Outcome) -> None:
    """Finish what runs on the old version, dispose of it, tell what it left behind."""
    names = ", ".join([*(agent.name for _, agent in retired.agents), *retired.gone]) or "a module"
    if await _finish(retired, node, drain_timeout, outcome):
        return  # the old version runs again
    await dispose(f for source in retired.stage.sources.values() for f in source.generation.disposals)
    left = [*_left_by(list(retired.stage.modules.values()))]
    marks = _marked(retired.stage.modules)
    # Whoever still has something of it is none of ours.
    retired.agents, retired.stage = [], Stage()
    await asyncio.sleep(0)  # what has just ended is let go of in the loop's next turn
    if not left:  # else it is said already who holds it
        left = [f"{name} in memory, held by {_holder_of(mark)}" for name, mark in _alive(marks)]
    outcome.notes += left
    for what in left:
        log.warning("the old version of %s left behind: %s", names, what)


async def _finish(retired: Retired, node: Node, drain_timeout: float, outcome: Outcome) -> bool:
    """Wait until nothing runs on the old version any more; tells whether it runs again."""
    back = asyncio.ensure_future(_probation(retired.agents, node, outcome))
    await asyncio.gather(
        back,
        node.withdraw(retired.gone, drain_timeout),
        *[route.finish(drain_timeout, agent) for route, agent in retired.agents],
    )
    return back.result()


def _left_by(modules: list[ModuleType]) -> Iterator[str]:
    yield from _tasks_of(modules)
    yield from _threads_of(modules)
    yield from _log_handlers_of(modules)


async def dispose(disposals: Iterable[Callable[[], Any]]) -> None:
    """Call what a module's author wants called when it is replaced; failures are logged."""
    for function in disposals:
        try:
            async with asyncio.timeout(_DISPOSAL):
                result = function()
                if isawaitable(result):
                    await result
        # The author's function ends here, whatever it raises, but not what cancels us.
        except BaseException:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log.exception("%s, called when nothing ran on its module any more, failed", _name_of(function))


async def _probation(agents: list[tuple[Route, Agent]], node: Node, outcome: Outcome) -> bool:
    """Let old publishers and watchers come back whose new versions fail at once; tells whether any did."""
    backgrounds = [(route, old) for route, old in agents if route.agent.handler.shape in _BY_THEMSELVES]
    names = [agent.name for _, agent in agents]
    # What others have to know of the new version may have to wait for the server.
    await persistently(lambda: node.settled(names), "what was reloaded")
    return any(await asyncio.gather(*[_has_come_back(route, old, outcome) for route, old in backgrounds]))


async def _has_come_back(route: Route, old: Agent, outcome: Outcome) -> bool:
    new = route.agent
    failure = await route.background.failed_within(_PROBATION) if route.background else ""
    if not failure or route.agent is not new or old.handler.shape not in _BY_THEMSELVES:
        return False
    route.swap(old)
    await route.follow()
    note = f"{new.name}: the new version failed at once ({failure}), so the old one runs again"
    outcome.notes.append(note)
    log.error("%s", note)
    return True


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


def _alive(marks: _Marks) -> Iterator[tuple[str, _Mark]]:
    """The modules that are still in memory."""
    if not marks:
        return
    for clear in getattr(typing, "_cleanups", ()):  # its caches hold classes that hints name
        clear()
    gc.collect()
    for name, mark in marks.items():
        found = mark()
        # What was frozen is never collected, which is no fault of who wrote it.
        if found is not None and not (gc.get_freeze_count() and _is_frozen(found)):
            yield name, found


def _is_frozen(mark: _Mark) -> bool:
    return not any(isinstance(each, dict) for each in gc.get_referrers(mark))


def _holder_of(mark: _Mark) -> str:
    """What holds the namespace that a mark lies in, in words."""
    known: dict[int, object] = {id(mark): mark}
    level, last = [mark], mark
    while level and len(known) < _MOST_LOOKED_AT:
        found = gc.get_referrers(*level)
        ours = {id(level), id(known), id(found)}
        last, level = level[0], [each for each in found if id(each) not in known.keys() | ours]
        for each in level:
            name = each.get("__name__") if isinstance(each, dict) else None
            module = sys.modules.get(name) if isinstance(name, str) else None
            if isinstance(each, dict) and module is not None and vars(module) is each:
                return f"{name}.{next(key for key, value in each.items() if id(value) in known)}"
        known |= {id(each): each for each in level}
    return _in_words(last)


def _in_words(holder: object) -> str:
    if isinstance(holder, FrameType):
        return f"a call of {holder.f_code.co_qualname}"
    if hasattr(holder, "__qualname__"):
        return f"something that has {_name_of(holder)}"
    return f"a {type(holder).__module__}.{type(holder).__qualname__}"


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", "") or repr(function)
