"""Blocking handlers run in a bounded number of threads, and do not block the event loop."""

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Cancelled,
    HandlerError,
    InvalidAgent,
    KVEntry,
    MeshTimeout,
    Overloaded,
    Usage,
    current_call,
    report_usage,
)
from openagentmesh.agent.agent import declare
from openagentmesh.agent.handler import TypeCache
from openagentmesh.agent.threads import ThreadPool
from openagentmesh.protocol import subjects
from openagentmesh.protocol.status import ThreadPoolStatus

from tests.support.meshes import listen, next_log_event, pending_instance
from tests.support.waiting import until

_colour: ContextVar[str] = ContextVar("colour", default="none")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> ThreadPool:
    """A pool of four threads for the handlers of one test."""
    small_pool = ThreadPool(4)
    monkeypatch.setattr("openagentmesh.agent.handler.pool", small_pool)
    return small_pool


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event for handlers to wait for; it is set in the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_blocking_handler_does_not_delay_other_agents(
    mesh: AgentMesh, name: str, release: threading.Event
) -> None:
    """While a `def` blocks its thread, other agents answer on the event loop; then it answers too."""

    @mesh.agent(AgentSpec(name=f"{name}.slow"))
    def slow(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        release.wait()
        return number + 1

    @mesh.agent(AgentSpec(name=f"{name}.quick"))
    async def quick() -> str:
        return "quick"

    calling = asyncio.create_task(mesh.call(f"{name}.slow", 1))
    assert ["quick"] * 20 == [await mesh.call(f"{name}.quick") for _ in range(20)]
    assert not calling.done()
    release.set()
    assert 2 == await calling


async def test_the_request_is_available_in_its_thread(mesh: AgentMesh, name: str) -> None:
    """`current_call`, the remaining time, usage and context variables work as in an `async def`."""
    events = await listen(mesh, subjects.logs(name))

    @mesh.agent(AgentSpec(name=name, thread=True))
    def describe() -> dict[str, Any]:
        call = current_call()
        report_usage(Usage(input_tokens=3))
        _colour.set("red")  # for this request alone
        return {"header": call.headers["X-Custom"], "remaining": call.remaining, "agent": call.agent}

    for _ in range(2):
        described = await mesh.call(name, headers={"X-Custom": "yes"}, timeout=9)
        assert ("yes", name) == (described["header"], described["agent"])
        assert 8 < described["remaining"] <= 9
    assert "none" == _colour.get()
    logged = [await next_log_event(events) for _ in range(3)]
    assert ["agent_registered", "usage_reported", "usage_reported"] == [event["event"] for event in logged]
    assert [{"input_tokens": 3}] * 2 == [event["data"] for event in logged[1:]]


async def test_a_source_may_trigger_a_def(mesh: AgentMesh, name: str) -> None:
    """A `def` handles a change of the shared state in a thread."""
    got: list[tuple[str, bool]] = []

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.*")])
    def driven(entry: KVEntry[str]) -> None:
        got.append((entry.value, threading.current_thread() is threading.main_thread()))

    await mesh.catalog()
    await mesh.kv.put(f"{name}.a", "1")
    await until(lambda: got)
    assert [("1", False)] == got


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ValueError("boom"), "boom"),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StopIteration("end"), "the handler raised StopIteration: end"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
)
async def test_any_exception_in_a_thread_is_a_handler_error(
    mesh: AgentMesh, name: str, raised: BaseException, message: str
) -> None:
    """The caller gets `handler_error` with its message, and the next request is answered."""

    @mesh.agent(AgentSpec(name=name))
    def fail(fails: int) -> str:
        if fails:
            raise raised
        return "fine"

    with pytest.raises(HandlerError, match=message):
        await mesh.call(name, 1, timeout=5)
    assert "fine" == await mesh.call(name, 0)


async def test_a_coroutine_as_a_result_is_a_handler_error(mesh: AgentMesh, name: str) -> None:
    """The error of a `def` that returns a coroutine recommends an `async def`."""

    async def other() -> str:
        return ""

    @mesh.agent(AgentSpec(name=name))
    def without_await() -> str:
        return other()  # type: ignore[return-value]

    with pytest.raises(HandlerError, match="must be an `async def`"):
        await mesh.call(name)


async def test_the_number_of_threads_is_bounded(mesh: AgentMesh, name: str, pool: ThreadPool) -> None:
    """Four threads answer forty requests, and the same four answer forty more."""
    used, running, maximum, lock = set(), 0, 0, threading.Lock()
    barrier = threading.Barrier(4)

    @mesh.agent(AgentSpec(name=name))
    def count() -> str:
        nonlocal running, maximum
        with lock:
            used.add(threading.get_ident())
            running += 1
            maximum = max(maximum, running)
        barrier.wait(10)  # for four threads at once
        with lock:
            running -= 1
        return "ok"

    for _ in range(2):
        assert ["ok"] * 40 == await asyncio.gather(*[mesh.call(name) for _ in range(40)])
    assert (4, 4) == (maximum, len(used))
    await until(lambda: pool.status().busy == 0)
    assert ThreadPoolStatus(max=4) == pool.status()


async def test_two_functions_do_not_wait_for_one_idle_thread() -> None:
    """Two functions that arrive at once while one thread is idle run concurrently."""
    barrier = threading.Barrier(2)
    for _ in range(20):
        pool = ThreadPool(4)
        await pool.run("a", lambda: None)
        await until(lambda: pool.status().busy == 0)  # noqa: B023 - the pool of this iteration
        await asyncio.gather(*[pool.run("a", lambda: barrier.wait(5)) for _ in range(2)])


async def test_a_timeout_or_a_cancellation_does_not_wait_for_the_thread(
    mesh: AgentMesh, name: str, release: threading.Event, pool: ThreadPool, caplog: pytest.LogCaptureFixture
) -> None:
    """The request ends immediately; its thread is abandoned, which is counted and logged."""
    caplog.set_level(logging.WARNING)
    began = threading.Semaphore(0)

    @mesh.agent(AgentSpec(name=name))
    def hang() -> str:
        began.release()
        release.wait()
        return "late"

    with pytest.raises(MeshTimeout):
        await mesh.call(name, timeout=0.05)
    await until(lambda: pool.abandoned[name] == 1)
    assert f"{name}: thread abandoned" in caplog.text
    release.set()
    await until(lambda: not pool.abandoned)
    assert f"{name}: abandoned thread ended" in caplog.text
    release.clear()
    calling = asyncio.create_task(mesh.call(name))
    await until(lambda: pool.status().busy == 1)
    await pending_instance(mesh)  # a cancellation is sent to the instance that has acknowledged the request
    calling.cancel()
    await until(lambda: pool.abandoned[name] == 1)
    release.set()
    await until(lambda: not pool.abandoned)
    assert "late" == await mesh.call(name)


async def test_hanging_threads_are_replaced(
    mesh: AgentMesh, name: str, release: threading.Event, pool: ThreadPool
) -> None:
    """A hanging agent takes no thread from others, and is `overloaded` once it has abandoned its part."""

    @mesh.agent(AgentSpec(name=f"{name}.hangs"))
    def hang() -> str:
        release.wait()
        return "ended"

    @mesh.agent(AgentSpec(name=f"{name}.works"))
    def work(number: int) -> int:
        return number

    hanging = [mesh.call(f"{name}.hangs", timeout=0.2) for _ in range(8)]
    results = await asyncio.gather(*hanging, return_exceptions=True)
    assert {MeshTimeout} == {type(result) for result in results}
    with pytest.raises(Overloaded, match="threads that do not end"):
        await mesh.call(f"{name}.hangs")
    assert list(range(9)) == await asyncio.gather(*[mesh.call(f"{name}.works", n) for n in range(9)])
    release.set()
    await until(lambda: not pool.abandoned)
    assert "ended" == await mesh.call(f"{name}.hangs")
    assert pool._threads <= 4


async def test_closing_a_mesh_does_not_wait_for_threads(
    url: str, name: str, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the drain timeout the mesh closes, and a handler that still runs is answered as cancelled."""
    monkeypatch.setattr("openagentmesh.mesh.mesh.DRAIN_TIMEOUT_S", 0.05)
    mesh, began = AgentMesh(url), threading.Event()

    @mesh.agent(AgentSpec(name=name))
    def hang() -> str:
        began.set()
        release.wait()
        return "late"

    async with AgentMesh(url) as caller, asyncio.timeout(10):
        async with mesh:
            calling = asyncio.create_task(caller.call(name))
            await until(began.is_set)
        with pytest.raises(Cancelled, match="stopped before it answered"):
            await calling
    assert not release.is_set()


def test_a_process_exits_while_a_thread_hangs(tmp_path: Path, url: str, name: str) -> None:
    """The interpreter does not wait at its exit for a handler that does not return."""
    program = f"""
import asyncio, time
from openagentmesh import AgentMesh, AgentSpec, MeshTimeout
mesh = AgentMesh({url!r})
@mesh.agent(AgentSpec(name={name!r}))
def hang() -> str:
    time.sleep(600)
    return ""
async def main() -> None:
    async with mesh:
        try:
            await mesh.call({name!r}, timeout=0.1)
        except MeshTimeout:
            print("in time")
asyncio.run(main())
"""
    (tmp_path / "program.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False, timeout=20
    )
    assert ("in time\n", 0) == (ran.stdout, ran.returncode), ran.stderr


async def test_an_idle_thread_holds_no_references(mesh: AgentMesh, name: str) -> None:
    """A replaced handler is released, although the thread that ran it remains."""
    references: list[weakref.ref[object]] = []

    class Thing:
        pass

    def declare() -> None:
        thing = Thing()
        references.append(weakref.ref(thing))

        @mesh.agent(AgentSpec(name=name))
        def uses() -> str:
            return type(thing).__name__

    declare()
    assert "Thing" == await mesh.call(name)

    @mesh.agent(AgentSpec(name=name))
    async def other() -> str:
        return "other"

    assert "other" == await mesh.call(name)
    for _ in range(3):
        await asyncio.sleep(0.01)
        gc.collect()
    assert [None] == [reference() for reference in references]


def test_thread_is_for_a_def_and_is_not_published() -> None:
    """`thread=True` is rejected for an `async def`, and no contract contains it."""

    async def on_the_loop() -> str:
        return ""

    def in_a_thread() -> str:
        return ""

    with pytest.raises(InvalidAgent, match="thread=True is for a `def`"):
        AgentMesh().agent(AgentSpec(name="a", thread=True))(on_the_loop)
    specs = AgentSpec(name="a", thread=True), AgentSpec(name="a")
    contract, expected = (declare(spec, in_a_thread, TypeCache()).contract for spec in specs)
    assert "thread" not in contract.to_registry_json()
    assert expected.skills == contract.skills


def test_the_default_maximum_is_four_more_than_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at most 32; an explicit maximum replaces it."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert (6, 3) == (ThreadPool().max_threads, ThreadPool(3).max_threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert 32 == ThreadPool().max_threads
