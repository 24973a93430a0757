"""Publishers and watchers: one of each runs, whatever it does, until it returns or is stopped."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, AgentSpec, MeshError
from openagentmesh.protocol import subjects

from tests.support.meshes import (
    Text,
    background_of,
    declare_background,
    listen,
    next_frame,
    reconnects,
    restart_soon,
    run_forever,
    serve,
)

SHAPES = pytest.mark.parametrize("shape", ["publisher", "watcher"])


def event(mesh: AgentMesh, seq: int, *, end: bool = False) -> dict[str, str]:
    """The headers of a publisher's event, or of its end frame."""
    return {
        "X-Mesh-Instance-Id": mesh.instance_id,
        "X-Mesh-Stream-Seq": str(seq),
        "X-Mesh-Stream-End": "true" if end else "false",
    }


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits only so long for what swallows its cancellation, and for what is on its way."""
    monkeypatch.setattr("openagentmesh.serving.background._CANCEL_GRACE_S", 0.1)
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)


async def test_events_and_end_are_framed(mesh: AgentMesh, name: str) -> None:
    """Events count from 0, belong to no request, and the end frame is empty and has the count."""
    heard = await listen(mesh, subjects.events(name))

    @mesh.agent(AgentSpec(name=name))
    async def two() -> AsyncIterator[list[int]]:
        yield [1]
        yield [2]

    await mesh.catalog()
    assert (event(mesh, 0), b"[1]") == await next_frame(heard)
    assert (event(mesh, 1), b"[2]") == await next_frame(heard)
    assert (event(mesh, 2, end=True), b"") == await next_frame(heard)


async def test_a_failure_is_told_and_the_next_run_begins_anew(mesh: AgentMesh, name: str) -> None:
    """An exception is an error next_frame and a copy on `mesh.errors`; then it counts from 0 again."""
    restart_soon(mesh)
    heard = await listen(mesh, subjects.events(name))
    copies = await listen(mesh, subjects.errors(name))
    failed = {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mesh-Status": "error", "X-Mesh-Stream-End": "true"}
    runs = 0

    @mesh.agent(AgentSpec(name=name))
    async def fragile() -> AsyncIterator[int]:
        nonlocal runs
        runs += 1
        yield runs
        if runs == 1:
            raise MeshError("quota", "used up", details={"left": 0})
        if runs == 2:
            raise ZeroDivisionError("divided")
        await run_forever()

    await mesh.catalog()
    for run, code, message in ((1, "quota", "used up"), (2, "handler_error", "divided")):
        assert (event(mesh, 0), str(run).encode()) == await next_frame(heard)
        headers, body = await next_frame(heard)
        assert failed == headers
        details = {"left": 0} if run == 1 else {}
        envelope = {"code": code, "message": message, "agent": name, "request_id": "", "details": details}
        assert envelope == json.loads(body)
        headers, copy = await next_frame(copies)
        assert ("error", body) == (headers["X-Mesh-Status"], copy)
    assert (event(mesh, 0), b"3") == await next_frame(heard)


async def test_a_failing_watcher_is_told_of_on_errors_only(mesh: AgentMesh, name: str) -> None:
    """A watcher has no events, so nothing is on their subject; its error is on `mesh.errors`."""
    restart_soon(mesh)
    heard = await listen(mesh, subjects.events(name))
    copies = await listen(mesh, subjects.errors(name))

    async def run() -> None:
        raise ValueError("broken")

    declare_background(mesh, name, "watcher", run)
    await mesh.catalog()
    for _ in range(3):
        envelope = json.loads((await next_frame(copies))[1])
        assert ("handler_error", "broken", name) == (envelope["code"], envelope["message"], envelope["agent"])
    assert heard.empty()


async def test_pauses_grow_are_jittered_and_bounded(mesh: AgentMesh, name: str) -> None:
    """Each failure doubles the pause up to the longest one, and chance shortens it up to a half."""
    restart_soon(mesh, 0.01, 0.08)
    loop, ended, pauses = asyncio.get_running_loop(), 0.0, list[float]()
    enough = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def fragile() -> None:
        nonlocal ended
        if ended:
            pauses.append(loop.time() - ended)
        if len(pauses) == 16:
            enough.set()
            await run_forever()
        ended = loop.time()
        raise ValueError("broken")

    await mesh.catalog()
    async with asyncio.timeout(30):  # without a bound the last pause alone were five minutes
        await enough.wait()
    shortest = [0.5 * min(0.01 * 2**n, 0.08) for n in range(16)]
    assert all(pause > least - 0.002 for pause, least in zip(pauses, shortest, strict=True))
    assert min(pauses[3:]) < 0.079  # all of them would be at least 0.08
    assert 16 == background_of(mesh, name).restarts


@SHAPES
async def test_one_that_returns_is_done(mesh: AgentMesh, name: str, shape: str) -> None:
    """What returns has ended of its own will, and is not started again."""
    runs: list[int] = []

    async def run() -> None:
        runs.append(1)

    declare_background(mesh, name, shape, run)
    await mesh.catalog()
    found = background_of(mesh, name)
    assert found._task is not None
    await asyncio.wait([found._task], timeout=10)
    await found.stop()
    assert ([1], "done", 0) == (runs, found.state, found.restarts)


@SHAPES
async def test_exactly_one_runs(mesh: AgentMesh, name: str, shape: str) -> None:
    """However often it fails or its name is declared again, never two of it run side by side."""
    restart_soon(mesh)
    running, most, versions = 0, 0, list[int]()

    def version(number: int) -> Callable[[], object]:
        async def run() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            versions.append(number)
            try:
                if len(versions) % 3:
                    raise ValueError("broken")
                await run_forever()
            finally:
                try:
                    await asyncio.sleep(0.002)  # the next one waits for this
                finally:
                    running -= 1

        return run

    for number in range(5):
        declare_background(mesh, name, shape, version(number))
        await mesh.catalog()
        async with asyncio.timeout(10):
            while number not in versions:
                await asyncio.sleep(0.001)
    assert (1, sorted(versions)) == (most, versions)


@pytest.mark.parametrize("again", [False, True], ids=["left", "declared-again"])
async def test_one_that_is_ended_says_so(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, again: bool
) -> None:
    """Leaving lets it clean up and send its end frame; a new version goes on for the same subscribers."""
    heard, cleaned = await listen(mesh, subjects.events(name)), asyncio.Event()
    async with new_mesh() as provider:

        @provider.agent(AgentSpec(name=name))
        async def old() -> AsyncIterator[str]:
            try:
                yield "old"
                await run_forever()
            finally:
                await asyncio.sleep(0.01)
                cleaned.set()

        await provider.catalog()
        assert (event(provider, 0), b'"old"') == await next_frame(heard)
        if again:

            @provider.agent(AgentSpec(name=name, version="2.0.0"))
            async def new() -> AsyncIterator[int]:
                assert cleaned.is_set()
                yield 7
                await run_forever()

            assert "2.0.0" == (await provider.contract(name)).version
            assert (event(provider, 1), b"7") == await next_frame(heard)
    assert cleaned.is_set()
    assert (event(provider, 1 + again, end=True), b"") == await next_frame(heard)


async def test_one_that_is_deaf_is_left_and_named(
    new_mesh: Callable[[], AgentMesh], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What swallows its cancellation holds up no stop; the log says which agent it is."""
    release, started = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(10), new_mesh() as provider:

        @provider.agent(AgentSpec(name=name))
        async def deaf() -> None:
            started.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        await started.wait()
        left = background_of(provider, name)._task
        assert left is not None
    assert [name] == [r.message.split()[0] for r in caplog.records if "did not stop" in r.message]
    assert not left.done()
    release.set()
    await left


@SHAPES
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "after-the-stop"])
async def test_one_that_fails_of_its_stop_is_not_started_again(
    new_mesh: Callable[[], AgentMesh], name: str, shape: str, late: bool
) -> None:
    """An exception while it cleans up, however late, ends it: what was stopped stays stopped."""
    runs, over, started, release = 0, False, asyncio.Event(), asyncio.Event()

    async def run() -> None:
        nonlocal runs
        runs += 1
        started.set()
        if over:  # a bug must not outlive its test
            return
        try:
            await run_forever()
        finally:
            while late and not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            raise ValueError("cannot clean up")

    async with new_mesh() as provider:
        restart_soon(provider)
        declare_background(provider, name, shape, run)
        await started.wait()
        left = background_of(provider, name)._task
        assert left is not None
    release.set()
    await asyncio.wait([left], timeout=1)
    ended, over = left.done(), True
    left.cancel()
    await asyncio.wait([left], timeout=1)
    assert (True, 1) == (ended, runs)


@SHAPES
@pytest.mark.parametrize(
    "leaked", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit(), None], ids=repr
)
async def test_what_leaks_kills_nothing(
    mesh: AgentMesh, name: str, shape: str, leaked: BaseException | None
) -> None:
    """Exceptions that end programs and tasks, or its own cancel, end one run; the next one starts."""
    restart_soon(mesh)
    runs, again = 0, asyncio.Event()

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            again.set()
            await run_forever()
        if leaked is not None:
            raise leaked
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await run_forever()

    declare_background(mesh, name, shape, run)
    serve(mesh, f"{name}.other")
    async with asyncio.timeout(5):
        await again.wait()
    assert ("running", 2) == (background_of(mesh, name).state, background_of(mesh, name).restarts)
    assert {"text": "ok"} == await mesh.call(f"{name}.other", {})


async def test_one_that_never_awaits_starves_nobody(mesh: AgentMesh, name: str) -> None:
    """Beside a publisher that only yields, requests are answered and other publishers heard."""
    serve(mesh, f"{name}.other")
    heard = await listen(mesh, subjects.events(f"{name}.slow"))

    @mesh.agent(AgentSpec(name=f"{name}.greedy"))
    async def greedy() -> AsyncIterator[int]:
        while True:
            yield 0

    @mesh.agent(AgentSpec(name=f"{name}.slow"))
    async def slow() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    assert {"text": "ok"} == await mesh.call(f"{name}.other", {}, timeout=10)
    assert [b"0", b"1", b"2", b""] == [(await next_frame(heard))[1] for _ in range(4)]
    assert "running" == background_of(mesh, f"{name}.greedy").state


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [("text", "handler_error", "declared"), (Text(text="x" * 2_000_000), "payload_too_large", "larger")],
    ids=["type", "size"],
)
async def test_an_event_that_cannot_be_sent(
    mesh: AgentMesh, name: str, value: Text, code: str, says: str
) -> None:
    """A wrong type or size is the publisher's error, with its name; the connection lives on."""
    heard = await listen(mesh, subjects.events(name))

    @mesh.agent(AgentSpec(name=name))
    async def wrong() -> AsyncIterator[Text]:
        yield value

    await mesh.catalog()
    envelope = json.loads((await next_frame(heard))[1])
    assert (code, name, True) == (envelope["code"], envelope["agent"], says in envelope["message"])
    assert reconnects(mesh) == 0


async def test_it_is_listed(mesh: AgentMesh, name: str) -> None:
    """Publishers stream and take no requests, watchers do neither; a publisher says what it emits."""
    declare_background(mesh, f"{name}.p", "publisher", run_forever)
    declare_background(mesh, f"{name}.w", "watcher", run_forever)
    listed = [(e.name, e.invocable, e.streaming) for e in await mesh.catalog(channel=name)]
    assert [(f"{name}.p", False, True), (f"{name}.w", False, False)] == listed
    contract = await mesh.contract(f"{name}.p")
    assert {"type": "integer"} == contract.to_document()["x-agentmesh"]["chunk_schema"]
    assert {"streaming": True, "invocable": False} == contract.capabilities
    assert (await mesh.contract(f"{name}.w")).chunk_schema is None
