"""Retiring an old version: wait for what runs on it, dispose of it, report what it left behind."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.mesh.module_context import Generation
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.loading.imports import ImportTransaction
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.reload.changes import Plan
from openagentmesh.runtime.reload.garbage import Garbage
from openagentmesh.runtime.reload.leftovers import clear_typing_caches, find_leftovers, find_references, mark
from openagentmesh.serving.route import Route
from openagentmesh.transport.tasks import cancel_and_wait, cancel_within, retry_forever

log = logging.getLogger(__name__)

# A publisher or watcher that fails this soon after a reload is rolled back.
_PROBATION_S: Final = 1.0
_DISPOSAL_TIMEOUT_S: Final = 5.0
_CANCEL_GRACE_S: Final = 1.0
_BACKGROUND_KINDS: Final = frozenset({"publisher", "watcher"})


@dataclass(slots=True)
class RetiringVersion:
    """What a reload has replaced.

    Attributes:
        agents: routes, and the versions that they pointed at.
        removed: the routes of agents that do not exist any more; `added`: the names of new agents.
        transaction: the old modules, and what was executed in their place.
        finds_references: search for what keeps the old modules in memory, which blocks the loop.
    """

    agents: list[tuple[Route, AgentVersion]]
    removed: list[Route]
    added: list[str]
    transaction: ImportTransaction
    modules: list[Module]
    plan: Plan
    finds_references: bool = False

    @property
    def versions(self) -> list[AgentVersion]:
        """The old versions of all agents."""
        return [agent for _, agent in self.agents] + [route.agent for route in self.removed]

    @property
    def in_flight(self) -> int:
        """Requests that run on the old versions."""
        running = sum(route.running_on(agent) for route, agent in self.agents)
        return running + sum(route.in_flight for route in self.removed)

    @property
    def generations(self) -> list[Generation]:
        """What the modules declared; unmanaged declarations belong to the next module of the same origin."""
        unmanaged = [module.unmanaged for module in self.modules if module.origin not in self.plan.origins]
        return [module.generation for module in self.transaction.replaced.values()] + unmanaged


Rollback = Callable[[RetiringVersion, str], Awaitable[bool]]


class Retirements:
    """The versions that are being retired.

    When a publisher or watcher of the new version fails at once, `rollback` is called with the reason; if it
    returns True, the old version serves again, and nothing is disposed of.
    """

    def __init__(self, node: Node, rollback: Rollback) -> None:
        self._node = node
        self._rollback = rollback
        self._running: dict[asyncio.Task[None], RetiringVersion] = {}
        self._unfinished: list[RetiringVersion] = []
        self.garbage = Garbage()

    def begin(self, retiring: RetiringVersion, drain_timeout: float, result: ReloadResult) -> None:
        """Retire a version, in a task; what it left behind is added to the notes of the result."""
        task = asyncio.create_task(self._retire(retiring, drain_timeout, result))
        self._running[task] = retiring
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        retiring = self._running.pop(task)
        if task.cancelled():
            self._unfinished.append(retiring)
        elif exc := task.exception():
            log.error("an old version could not be retired", exc_info=exc)

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until all are retired, at most `timeout` seconds; returns whether they are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._running:
                    await asyncio.wait(self._running)
        return not self._running

    async def finish(self, timeout: float | None = None) -> None:
        """Wait until all are retired; those that are not after `timeout` seconds remain for `dispose`."""
        await self.wait(timeout)
        await cancel_and_wait(*self._running)

    async def dispose(self) -> None:
        """Dispose of versions that could not be retired in time."""
        await dispose([generation for retiring in self._unfinished for generation in retiring.generations])

    async def _retire(self, retiring: RetiringVersion, drain_timeout: float, result: ReloadResult) -> None:
        names = ", ".join(agent.name for agent in retiring.versions) or "a module"
        failure, _, _ = await asyncio.gather(
            self._early_failure(retiring.agents),
            self._node.withdraw(retiring.removed, drain_timeout),
            asyncio.gather(*[route.finish(drain_timeout, agent) for route, agent in retiring.agents]),
        )
        if failure and await self._rollback(retiring, failure):
            return
        await dispose(retiring.generations)
        modules = retiring.transaction.modules
        found = find_leftovers(modules.values())
        finds_references = retiring.finds_references or log.isEnabledFor(logging.DEBUG)
        marks = mark(modules) if finds_references and not found else {}
        # From here on nothing of ours refers to the old version.
        retiring.agents, retiring.removed, retiring.modules = [], [], []
        retiring.transaction.clear()
        clear_typing_caches()
        await asyncio.sleep(0)  # what has just ended is released in the loop's next turn
        self.garbage.collect_if_short()
        if marks:
            found = find_references(marks)
        result.notes += found
        for what in found:
            log.warning("the old version of %s left behind: %s", names, what)

    async def _early_failure(self, agents: list[tuple[Route, AgentVersion]]) -> str:
        """Why new publishers and watchers that replaced old ones failed at once; empty when none did."""
        names = [agent.name for _, agent in agents]
        # Publishing the new contracts may have to wait for the server.
        await retry_forever(lambda: self._node.wait_served(names), "serving reloaded agents")
        backgrounds = [
            background
            for route, old in agents
            if {route.agent.kind, old.kind} <= _BACKGROUND_KINDS and (background := route.background)
        ]
        failures = await asyncio.gather(*[each.failed_within(_PROBATION_S) for each in backgrounds])
        named = zip(backgrounds, failures, strict=True)
        return "; ".join(f"{each.name} failed at once ({failure})" for each, failure in named if failure)


async def dispose(generations: Iterable[Generation]) -> None:
    """Call the authors' disposal functions, once; failures are logged."""
    for generation in generations:
        while generation.disposals:
            function = generation.disposals.pop(0)
            if problem := await _dispose_with(function):
                name = getattr(function, "__qualname__", "") or repr(function)
                log.error("disposal function %s failed: %s", name, problem)


async def _dispose_with(function: Callable[[], Any]) -> str:
    """Call a function in a task of its own, which is abandoned when it does not end; returns the problem."""
    disposing = asyncio.create_task(_call(function))
    try:
        ended, _ = await asyncio.wait([disposing], timeout=_DISPOSAL_TIMEOUT_S)
    finally:
        still_running = await cancel_within(_CANCEL_GRACE_S, [disposing])
    if ended:
        return disposing.result()
    problem = f"it did not end within {_DISPOSAL_TIMEOUT_S:g}s"
    return f"{problem}, and ignores its cancellation" if still_running else problem


async def _call(function: Callable[[], Any]) -> str:
    """Call an author's function; returns its traceback, empty for none."""
    try:
        result = function()
        if isawaitable(result):
            await result
    # Authors' code may raise anything, also when it is cancelled.
    except BaseException as exc:  # noqa: BLE001 - as above
        return "".join(traceback.format_exception(exc))
    return ""
