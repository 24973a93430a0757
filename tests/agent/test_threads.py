"""Handlers that block run in threads, so many at once, and hold up nobody."""

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
    HandlerError,
    InvalidAgent,
    KVEntry,
    MeshTimeout,
    Overloaded,
    Usage,
    current_call,
    report_usage,
)
from openagentmesh.agent.threads import ThreadPool
from openagentmesh.protocol.status import ThreadPoolStatus

from tests.support.waiting import until

_colour: ContextVar[str] = ContextVar("colour", default="none")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> ThreadPool:
    """Four threads of a test's own."""
    own = ThreadPool(4)
    monkeypatch.setattr("openagentmesh.agent.handler.pool", own)
    return own


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """What handlers wait for; set at last, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


async def test_a_handler_that_blocks_holds_up_nobody(mesh: AgentMesh, name: str, go: threading.Event) -> None:
    """While a `def` waits in its thread, others answer on the loop; then it answers, too."""

    @mesh.agent(AgentSpec(name=f"{name}.slow"))
    def slow(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        go.wait()
        return number + 1

    @mesh.agent(AgentSpec(name=f"{name}.quick"))
    async def quick() -> str:
        return "here"

    calling = asyncio.create_task(mesh.call(f"{name}.slow", 1))
    assert ["here"] * 20 == [await mesh.call(f"{name}.quick") for _ in range(20)]
    assert not calling.done()
    go.set()
    assert 2 == await calling


async def test_a_thread_knows_the_request(mesh: AgentMesh, name: str) -> None:
    """`current_call`, what is left of its time, usage and context variables are as in an `async def`."""

    @mesh.agent(AgentSpec(name=name, thread=True))
    def look() -> dict[str, Any]:
        call = current_call()
        report_usage(Usage(input_tokens=3))
        _colour.set("red")  # for this request alone
        return {"mine": call.headers["X-Mine"], "left": call.remaining, "agent": call.agent}

    for _ in range(2):
        seen = await mesh.call(name, headers={"X-Mine": "yes"}, timeout=9)
        assert ("yes", name) == (seen["mine"], seen["agent"])
        assert 8 < seen["left"] <= 9
    assert "none" == _colour.get()


async def test_a_def_may_be_driven_by_a_source(mesh: AgentMesh, name: str) -> None:
    """A change of the shared state is handled in a thread."""
    got: list[tuple[str, bool]] = []

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.*")])
    def driven(entry: KVEntry[str]) -> None:
        got.append((entry.value, threading.current_thread() is threading.main_thread()))

    await mesh.catalog()
    await mesh.kv.put(f"{name}.a", "1")
    await until(lambda: got)
    assert [("1", False)] == got


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("boom"), "boom"),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StopIteration("end"), "the handler raised StopIteration: end"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
)
async def test_whatever_a_thread_raises_is_told(
    mesh: AgentMesh, name: str, raised: BaseException, told: str
) -> None:
    """Its caller gets it as `handler_error`, and the next request is answered."""

    @mesh.agent(AgentSpec(name=name))
    def fail(fails: int) -> str:
        if fails:
            raise raised
        return "fine"

    with pytest.raises(HandlerError, match=told):
        await mesh.call(name, 1, timeout=5)
    assert "fine" == await mesh.call(name, 0)


async def test_a_coroutine_is_no_result(mesh: AgentMesh, name: str) -> None:
    """A `def` that forgets to wait for what it calls is told so."""

    async def other() -> str:
        return ""

    @mesh.agent(AgentSpec(name=name))
    def forgets() -> str:
        return other()  # type: ignore[return-value]

    with pytest.raises(HandlerError, match="must be an `async def`"):
        await mesh.call(name)


async def test_no_more_threads_than_there_may_be(mesh: AgentMesh, name: str, pool: ThreadPool) -> None:
    """Forty requests are answered by four threads, which are used again and do not grow in number."""
    used, now, most, lock = set(), 0, 0, threading.Lock()
    meet = threading.Barrier(4)

    @mesh.agent(AgentSpec(name=name))
    def count() -> str:
        nonlocal now, most
        with lock:
            used.add(threading.get_ident())
            now += 1
            most = max(most, now)
        meet.wait(10)  # four are there, or nobody goes on
        with lock:
            now -= 1
        return "ok"

    for _ in range(2):
        assert ["ok"] * 40 == await asyncio.gather(*[mesh.call(name) for _ in range(40)])
    assert (4, 4) == (most, len(used))
    await until(lambda: pool.status().busy == 0)
    assert ThreadPoolStatus(max=4) == pool.status()


async def test_one_idle_thread_is_not_taken_for_two() -> None:
    """Two that come at once while one thread is idle run side by side, also when both wait for the other."""
    meet = threading.Barrier(2)
    for _ in range(20):
        pool = ThreadPool(4)
        await pool.run("a", lambda: None)
        await until(lambda: pool._idle == 1)  # noqa: B023 - of this round
        await asyncio.gather(*[pool.run("a", lambda: meet.wait(5)) for _ in range(2)])


async def test_who_gives_up_is_answered_at_once(
    mesh: AgentMesh, name: str, go: threading.Event, pool: ThreadPool, caplog: pytest.LogCaptureFixture
) -> None:
    """A timeout and a cancel end the request though thread abandoned, which is counted and logged."""
    caplog.set_level(logging.WARNING)
    began = threading.Semaphore(0)

    @mesh.agent(AgentSpec(name=name))
    def hang() -> str:
        began.release()
        go.wait()
        return "late"

    with pytest.raises(MeshTimeout):
        await mesh.call(name, timeout=0.05)
    await until(lambda: pool.abandoned[name] == 1)
    assert f"{name}: thread abandoned" in caplog.text
    go.set()
    await until(lambda: not pool.abandoned)
    assert f"{name}: abandoned thread ended" in caplog.text
    go.clear()
    calling = asyncio.create_task(mesh.call(name))
    await until(lambda: pool.status().busy == 1)
    await asyncio.sleep(0.1)  # until the caller knows who has it, which is how a cancel gets there
    calling.cancel()
    await until(lambda: pool.abandoned[name] == 1)
    go.set()
    await until(lambda: not pool.abandoned)
    assert "late" == await mesh.call(name)


async def test_threads_that_hang_are_replaced(
    mesh: AgentMesh, name: str, go: threading.Event, pool: ThreadPool
) -> None:
    """An agent that never ends takes no thread from others, and is refused when it has left its part."""

    @mesh.agent(AgentSpec(name=f"{name}.hangs"))
    def hang() -> str:
        go.wait()
        return "ended"

    @mesh.agent(AgentSpec(name=f"{name}.works"))
    def work(number: int) -> int:
        return number

    hanging = [mesh.call(f"{name}.hangs", timeout=0.2) for _ in range(8)]
    refused = await asyncio.gather(*hanging, return_exceptions=True)
    assert {MeshTimeout} == {type(each) for each in refused}
    with pytest.raises(Overloaded, match="threads that do not end"):
        await mesh.call(f"{name}.hangs")
    assert list(range(9)) == await asyncio.gather(*[mesh.call(f"{name}.works", n) for n in range(9)])
    go.set()
    await until(lambda: not pool.abandoned)
    assert "ended" == await mesh.call(f"{name}.hangs")
    assert pool._threads <= 4


async def test_stopping_waits_for_no_thread(
    url: str, name: str, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh that is left gives its handlers their time, and then goes, whatever runs on."""
    monkeypatch.setattr("openagentmesh.mesh.mesh.DRAIN_TIMEOUT_S", 0.05)
    mesh, began = AgentMesh(url), threading.Event()

    @mesh.agent(AgentSpec(name=name))
    def hang() -> str:
        began.set()
        go.wait()
        return "late"

    async with AgentMesh(url) as caller, asyncio.timeout(10):
        async with mesh:
            calling = asyncio.create_task(caller.call(name))
            await until(began.is_set)
        with pytest.raises(Exception, match="stopped before it answered"):
            await calling
    assert not go.is_set()


def test_a_process_ends_though_a_thread_hangs(tmp_path: Path, url: str, name: str) -> None:
    """Nothing at the interpreter's end waits for a handler that does not return."""
    program = f"""
import asyncio, time
from openagentmesh import AgentMesh, AgentSpec, MeshTimeout
from openagentmesh.protocol.status import ThreadPoolStatus
from openagentmesh.protocol.status import ThreadPoolStatus
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


async def test_an_idle_thread_holds_nothing(mesh: AgentMesh, name: str) -> None:
    """What a handler was given and gave back is let go of, though its thread stays."""
    kept: list[weakref.ref[object]] = []

    class Thing:
        pass

    def declare() -> None:
        thing = Thing()
        kept.append(weakref.ref(thing))

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
    assert [None] == [reference() for reference in kept]


def test_thread_is_for_a_def_and_nobody_elses_business() -> None:
    """An `async def` with `thread=True` is refused in words, and a contract says nothing of threads."""
    mesh = AgentMesh()

    async def on_the_loop() -> str:
        return ""

    def in_a_thread() -> str:
        return ""

    with pytest.raises(InvalidAgent, match="thread=True is for a `def`"):
        mesh.agent(AgentSpec(name="a", thread=True))(on_the_loop)
    mesh.agent(AgentSpec(name="a", thread=True))(in_a_thread)
    mesh.agent(AgentSpec(name="b"))(in_a_thread)
    one, other = (agent.contract for agent in mesh._agents.values())
    assert "thread" not in one.to_registry_json()
    assert one.skills[0].keys() == other.skills[0].keys()


def test_there_are_as_many_threads_as_processors_and_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty-two at most, unless somebody says how many."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert (6, 3) == (ThreadPool().max_threads, ThreadPool(3).max_threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert 32 == ThreadPool().max_threads
