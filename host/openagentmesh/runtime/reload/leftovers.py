"""What an old version left behind: tasks, threads, logging handlers; and what keeps it in memory."""

import asyncio
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from inspect import isasyncgen
from time import monotonic
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.mesh.node import Node
from openagentmesh.serving.route import Route

# The search for references blocks the event loop: at most this long, and with so many objects at once.
_MAX_SEARCH_S: Final = 0.01
_MAX_SEARCHED: Final = 8


def find_leftovers(modules: list[ModuleType]) -> list[str]:
    """Running tasks and threads, and logging handlers, of these modules, as text."""
    return [*_tasks_of(modules), *_threads_of(modules), *_log_handlers_of(modules)]


def _tasks_of(modules: list[ModuleType]) -> Iterator[str]:
    namespaces = {id(vars(module)) for module in modules}
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        own_frames = (frame for frame in _frames_of(task.get_coro()) if id(frame.f_globals) in namespaces)
        if (frame := next(own_frames, None)) is not None:
            yield f"the task {task.get_name()} ({frame.f_code.co_qualname})"


def _frames_of(running: Any) -> Iterator[FrameType]:  # noqa: ANN401 - any awaitable
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
    names = {module.__name__ for module in modules}
    for thread in threading.enumerate():
        target = getattr(thread, "_target", None)
        if _is_of(target, modules) or type(thread).__module__ in names:
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
    """Is stored in a module's namespace, and dies with it."""

    __slots__ = ("__weakref__",)


Marks = dict[str, weakref.ref[_Mark]]


def mark(modules: dict[str, ModuleType]) -> Marks:
    """Mark the namespaces of modules; the modules themselves may die before their functions do."""
    marks = {}
    for name, module in modules.items():
        own = vars(module)["__retired__"] = _Mark()
        marks[name] = weakref.ref(own)
    return marks


def find_references(marks: Marks) -> list[str]:
    """The marked modules that are still in memory, with what refers to them; collects garbage first."""
    gc.collect()
    found, deadline = [], monotonic() + _MAX_SEARCH_S
    for name, reference in marks.items():
        own = reference()
        if own is not None and (holder := _holder_of(own, deadline)):
            found.append(f"{name} in memory, referenced by {holder}")
    return found


def _holder_of(own: _Mark, deadline: float) -> str:
    """What keeps a marked namespace in memory, as text; empty when nothing has to be reported."""
    known: dict[int, object] = {id(own): own}
    level: list[object] = [own]
    last, may_expire = "", False
    while level:
        if monotonic() > deadline:
            return ""
        referrers = gc.get_referrers(*level[:_MAX_SEARCHED])
        ignored = {id(level), id(known), id(referrers), *known}
        candidates = [each for each in referrers if id(each) not in ignored]
        # A cancelled timer keeps its context until its time has come.
        level = [each for each in candidates if not _is_cancelled_timer(each)]
        may_expire = may_expire or len(level) < len(candidates)
        roots = (_describe_root(each, known) for each in level)
        if root := next((text for text in roots if text), ""):
            return root
        known |= {id(each): each for each in level}
        last = _describe(level[0]) if level else last
        del referrers, candidates, roots
    # Frozen objects are not found here, and never collected.
    return "" if may_expire or (gc.get_freeze_count() and len(known) == 1) else last


def _is_cancelled_timer(holder: object) -> bool:
    return isinstance(holder, asyncio.Handle) and holder.cancelled()


def _describe_root(holder: object, known: dict[int, object]) -> str:
    """A holder from which everything is reachable, as text; empty for any other."""
    if isinstance(holder, Route | Node | asyncio.Handle | threading.Thread):
        return _describe(holder)
    if isinstance(holder, asyncio.Task) and not holder.done():
        return _describe(holder)
    name = holder.get("__name__") if isinstance(holder, dict) else None
    module = sys.modules.get(name) if isinstance(name, str) else None
    if isinstance(holder, dict) and module is not None and vars(module) is holder:
        return f"{name}.{next(key for key, value in holder.items() if id(value) in known)}"
    return ""


def _describe(holder: object) -> str:
    if isinstance(holder, FrameType):
        return f"a call of {holder.f_code.co_qualname}"
    if hasattr(holder, "__qualname__"):
        return f"something that refers to {holder.__qualname__ or repr(holder)}"
    return f"a {type(holder).__module__}.{type(holder).__qualname__}"
