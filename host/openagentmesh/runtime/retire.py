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
from time import monotonic
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.bus.tasks import persistently
from openagentmesh.mesh.node import Node
from openagentmesh.mesh.outcome import Outcome
from openagentmesh.runtime.imports import Stage
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.route import Route

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload makes way for the one before it.
_PROBATION: Final = 1.0
_DISPOSAL: Final = 5.0
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
    await _let_go(retired)
    await asyncio.sleep(0)  # what has just ended is let go of in the loop's next turn
    left = left or _survivors(marks)  # what was found before says already who holds it
    outcome.notes += left
    for what in left:
        log.warning("the old version of %s left behind: %s", names, what)


async def _let_go(retired: Retired) -> None:
    """Hold nothing of the old version any more; whoever still does is none of ours."""
    routes = [route for route, _ in retired.agents]
    retired.agents, retired.stage = [], Stage()
    for route in routes:
        if route.is_settled:
            await route.follow()  # it forgets the version that it followed


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


def forget_hints() -> None:
    """Empty the caches of `typing`: in them versions share hints, and what a name in one of them means."""
    for clear in getattr(typing, "_cleanups", ()):
        clear()


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
    return any(
        await asyncio.gather(*[_has_come_back(route, old, node, outcome) for route, old in backgrounds])
    )


async def _has_come_back(route: Route, old: Agent, node: Node, outcome: Outcome) -> bool:
    new = route.agent
    failure = await route.background.failed_within(_PROBATION) if route.background else ""
    if not failure or route.agent is not new or old.handler.shape not in _BY_THEMSELVES:
        return False
    node.replace([old])
    await persistently(lambda: node.settled([old.name]), f"the old version of {old.name}")
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


def _survivors(marks: _Marks) -> list[str]:
    """The modules that are still in memory, and who holds them."""
    if not marks:
        return []
    forget_hints()
    gc.collect()
    found = []
    for name, reference in marks.items():
        mark = reference()
        if mark is not None and (holder := _holder_of(mark)):
            found.append(f"{name} in memory, held by {holder}")
    return found


def _holder_of(mark: _Mark) -> str:
    """What holds the namespace that a mark lies in, in words; empty when it is nobody's fault."""
    known: dict[int, object] = {id(mark): mark}
    level: list[object] = [mark]
    last, excused, until = "", False, monotonic() + _SEARCH
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
