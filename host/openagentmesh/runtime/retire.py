"""Letting an old generation go: wait for what runs on it, dispose of it, and say what it left behind."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import isawaitable
from types import FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.mesh.node import Node
from openagentmesh.runtime.imports import Stage
from openagentmesh.runtime.outcome import Outcome
from openagentmesh.serving.agent import Agent
from openagentmesh.serving.route import Route

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload makes way for the one before it.
_PROBATION: Final = 1.0
_DISPOSAL: Final = 5.0
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
    for source in retired.stage.sources.values():
        await dispose(source.generation.disposals)
    left = [*_left_by(list(retired.stage.modules.values()))]
    marks = _marked(retired.stage.modules)
    # Whoever still has something of it is none of ours.
    retired.agents, retired.stage = [], Stage()
    source = None  # type: ignore[assignment]
    alive = await survivors(marks)
    if not left:  # else it is said already who holds it
        left = [f"the version itself is still in memory, held by {holder}" for holder in map(holder_of, alive)]
    del alive
    outcome.notes += left
    for what in left:
        log.warning("the old version of %s left behind: %s", names, what)


async def _finish(retired: Retired, node: Node, drain_timeout: float, outcome: Outcome) -> bool:
    """Wait until nothing runs on the old version any more; tells whether it runs again."""
    # What others have to know of the new one may have to wait for the server.
    names = [agent.name for _, agent in retired.agents]
    _, back, *_ = await asyncio.gather(
        persistently(lambda: node.settled(names), "what was reloaded"),
        _probation(retired.agents, node, outcome),
        node.withdraw(retired.gone, drain_timeout),
        *[route.finish(drain_timeout, agent) for route, agent in retired.agents],
    )
    return back


def _left_by(modules: list[ModuleType]) -> Iterator[str]:
    yield from _tasks_of(modules)
    yield from _threads_of(modules)
    yield from _log_handlers_of(modules)


async def dispose(disposals: list[Callable[[], Any]]) -> None:
    """Call once what a module's author wants called when it is replaced; failures are logged."""
    functions, disposals[:] = disposals[:], []
    for function in functions:
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
            log.exception("%s, called when its module was replaced, failed", _name_of(function))


async def _probation(agents: list[tuple[Route, Agent]], node: Node, outcome: Outcome) -> bool:
    """Let old publishers and watchers come back whose new versions fail at once; tells whether any did."""
    backgrounds = [(route, old) for route, old in agents if route.agent.handler.shape in _BY_THEMSELVES]
    if not backgrounds:
        return False
    await persistently(lambda: node.settled([route.agent.name for route, _ in backgrounds]), "what was reloaded")
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
    for task in asyncio.all_tasks():
        coroutine = task.get_coro()
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None and id(frame.f_globals) in spaces and task is not asyncio.current_task():
            yield f"the task {task.get_name()} ({getattr(coroutine, '__qualname__', coroutine)})"


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
