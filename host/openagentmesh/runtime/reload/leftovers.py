"""What an old version left behind: tasks, threads, logging handlers; and what keeps it in memory."""

import asyncio
import gc
import logging
import sys
import threading
import typing
import weakref
from collections.abc import Collection, Iterator
from inspect import isasyncgen
from time import monotonic
from types import FrameType, FunctionType, ModuleType
from typing import Any, Final

from openagentmesh.mesh.node import Node
from openagentmesh.serving.route import Route

# The search for references blocks the event loop: at most this long, and with so many objects at once.
_MAX_SEARCH_S: Final = 1.0
_MAX_SEARCHED: Final = 8


def find_leftovers(modules: Collection[ModuleType]) -> list[str]:
    """Running tasks and threads, and logging handlers, of these modules, as text."""
    return [*_tasks_of(modules), *_threads_of(modules), *_log_handlers_of(modules)]


def _tasks_of(modules: Collection[ModuleType]) -> Iterator[str]:
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


def _threads_of(modules: Collection[ModuleType]) -> Iterator[str]:
    names = {module.__name__ for module in modules}
    namespaces = {id(vars(module)) for module in modules}
    for thread in threading.enumerate():
        target = getattr(thread, "_target", None)
        function = getattr(target, "__func__", target)  # of a method
        is_own = isinstance(function, FunctionType) and id(function.__globals__) in namespaces
        if is_own or type(thread).__module__ in names:
            yield f"the thread {thread.name}"


def _log_handlers_of(modules: Collection[ModuleType]) -> Iterator[str]:
    """Logging handlers of these modules' own classes that loggers still use."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in [each for each in loggers if isinstance(each, logging.Logger)]:
        for kind in map(type, logger.handlers):
            if any(getattr(module, kind.__name__, None) is kind for module in modules):
                yield f"the logging handler {kind.__name__} of '{logger.name}'"


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
    """The marked modules that stay in memory after a collection, with what refers to them."""
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
    while level and monotonic() < deadline:
        found = _referrers(level, known)
        # A cancelled timer keeps its context until its time has come.
        level = [each for each in found if not (isinstance(each, asyncio.Handle) and each.cancelled())]
        may_expire = may_expire or len(level) < len(found)
        del found  # it refers to the next level
        if root := next(filter(None, [_describe_root(each, known) for each in level]), ""):
            return root
        known.update(zip(map(id, level), level, strict=True))
        last = _describe(level[0]) if level else last
    # Empty also when the namespace is frozen: then its holders are not found, and it is never collected.
    return "" if level or may_expire else last


def _referrers(level: list[object], known: dict[int, object]) -> list[object]:
    """What refers to these objects, without what is known, and what only this search holds."""
    found = gc.get_referrers(*level[:_MAX_SEARCHED])
    ignored = {id(level), id(known), *known}
    return [each for each in found if id(each) not in ignored]


def _describe_root(holder: object, known: dict[int, object]) -> str:
    """A holder from which everything is reachable, as text; empty for any other."""
    is_running = isinstance(holder, asyncio.Task) and not holder.done()
    if is_running or isinstance(holder, Route | Node | asyncio.Handle | threading.Thread):
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


def clear_typing_caches() -> None:
    """Clear the caches of `typing`: versions would share annotations, and what names in them mean."""
    for clear in getattr(typing, "_cleanups", ()):
        clear()
