"""Log events: what is told, from which level on, and what strangers write there."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    ConnectionFailed,
    InvalidInput,
    LogEvent,
    MeshError,
    Usage,
    report_usage,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.protocol.messages import LogLevel
from openagentmesh.protocol.subjects import OBSERVABILITY_BUCKET
from openagentmesh.state.kv import KV

from tests.support.meshes import flush, listen, next_log_event, node_of, reconnects
from tests.support.servers import restartable

LEVELS: list[LogLevel] = ["debug", "info", "warn", "error"]
# What ends or fails a feed of a publisher's events, and an error that is none.
ODD_HEADERS = ({subjects.STREAM_END: "true"}, {subjects.STATUS: "error"}, {"Content-Type": "junk"})


def declare(mesh: AgentMesh, name: str) -> None:
    @mesh.agent(AgentSpec(name=name))
    async def agent(text: str) -> str:
        if text == "fail":
            raise ValueError("no")
        if text == "cost":
            report_usage(Usage(input_tokens=2, estimated_cost_usd=0.5, model="a"))
            report_usage(Usage(input_tokens=3, output_tokens=1, estimated_cost_usd=0.25, model="b"))
        return text


async def settle_level(mesh: AgentMesh, name: str, level: LogLevel) -> None:
    """Wait until the instance that serves tells what is of this level and nothing below it."""
    events = node_of(mesh).router.logs
    expected = [LEVELS.index(each) >= LEVELS.index(level) for each in LEVELS]
    async with asyncio.timeout(10):
        while [events.is_enabled(name, each) for each in LEVELS] != expected:
            await asyncio.sleep(0.005)


async def test_by_default_failures_and_usage_are_told(mesh: AgentMesh, name: str) -> None:
    """Registered, usage, failed, invalid: with level, request id, code; a plain request is silent."""
    heard = await listen(mesh, subjects.logs(name))
    declare(mesh, name)
    await mesh.catalog()
    event = await next_log_event(heard)
    assert ("agent_registered", "info", name) == (event["event"], event["level"], event["agent"])
    await mesh.call(name, "quiet")
    await mesh.call(name, "cost", headers={subjects.REQUEST_ID: "r1"})
    event = await next_log_event(heard)
    assert ("usage_reported", "info", "r1") == (event["event"], event["level"], event["request_id"])
    usage = {"input_tokens": 5, "output_tokens": 1, "model": "b", "estimated_cost_usd": 0.75}
    assert usage == event["data"]
    for payload, name_of_event, code in (
        ("fail", "request_failed", "handler_error"),
        (7, "validation_error", "invalid_input"),
    ):
        with pytest.raises(MeshError):
            await mesh.call(name, payload, headers={subjects.REQUEST_ID: "r2"})
        event = await next_log_event(heard)
        assert (name_of_event, "warn", "r2", {"code": code}) == (
            event["event"], event["level"], event["request_id"], event["data"],
        )  # fmt: skip


async def test_an_agent_that_leaves_says_so(mesh: AgentMesh, url: str, name: str) -> None:
    """A clean stop is `agent_deregistered`."""
    heard = await listen(mesh, subjects.logs(name))
    other = AgentMesh(url)
    declare(other, name)
    async with other:
        pass
    assert ["agent_registered", "agent_deregistered"] == [
        (await next_log_event(heard))["event"] for _ in range(2)
    ]


async def test_levels_change_live(mesh: AgentMesh, name: str) -> None:
    """An agent's own level goes before the one for all; debug tells each request and how long it took."""
    declare(mesh, name)
    await mesh.observe.set(name, log_level="debug")
    await settle_level(mesh, name, "debug")
    heard = await listen(mesh, subjects.logs(name))
    await mesh.call(name, "x")
    received, completed = await next_log_event(heard), await next_log_event(heard)
    assert ("request_received", "debug") == (received["event"], received["level"])
    assert ("request_completed", received["request_id"]) == (completed["event"], completed["request_id"])
    assert ["duration_ms"] == list(completed["data"])
    assert 0 <= completed["data"]["duration_ms"] < 10_000
    await mesh.observe.set(name, log_level="error")
    await settle_level(mesh, name, "error")
    with pytest.raises(MeshError):
        await mesh.call(name, "fail")
    assert heard.empty()


async def test_a_level_hides_what_is_below_it(name: str) -> None:
    """At each level exactly the events of that level and of those above it are told, as they are known."""
    told = {
        "request_received": "debug",
        "request_completed": "debug",
        "usage_reported": "info",
        "request_failed": "warn",
        "validation_error": "warn",
    }
    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        heard = await listen(mesh, subjects.logs(name))
        await mesh.catalog()
        assert "agent_registered" == (await next_log_event(heard))["event"]
        for level in LEVELS:
            await mesh.observe.set_global(log_level=level)
            await settle_level(mesh, name, level)
            await mesh.call(name, "cost")
            for payload in ("fail", 7):
                with pytest.raises(MeshError):
                    await mesh.call(name, payload)
            await node_of(mesh).connection.publish(subjects.logs(name), b"end")
            events = {}
            while (message := await asyncio.wait_for(heard.get(), 10)).body != b"end":
                event = json.loads(message.body)
                events[event["event"]] = event["level"]
            least = LEVELS.index(level)
            assert {e: own for e, own in told.items() if LEVELS.index(own) >= least} == events  # type: ignore[arg-type]


async def test_what_holds_for_an_agent(name: str) -> None:
    """Its own setting, else the one for all, else info; settings that are gone or junk are not set."""
    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        await mesh.catalog()
        buckets = node_of(mesh).buckets

        async def holds(level: LogLevel) -> None:
            assert level == (await mesh.observe.get(name)).log_level
            await settle_level(mesh, name, level)

        await holds("info")
        await mesh.observe.set_global(log_level="warn")
        assert "warn" == (await mesh.observe.get()).log_level
        await holds("warn")
        await mesh.observe.set(name, log_level="debug")
        await holds("debug")
        await mesh.observe.set_global(log_level="error")
        await holds("debug")
        await buckets.delete_all(OBSERVABILITY_BUCKET, [name])
        await holds("error")
        await buckets.delete_all(OBSERVABILITY_BUCKET, [subjects.GLOBAL_KEY])
        await holds("info")


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b'{"log_level": "loud"}', b'{"log_level": null}', b"\xff"]
)
async def test_a_junk_setting_counts_as_not_set(name: str, junk: bytes) -> None:
    """Anybody may have written it: then the level for all holds, and later settings do."""
    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        await mesh.catalog()
        await mesh.observe.set(name, log_level="error")
        await mesh.observe.set_global(log_level="debug")
        await settle_level(mesh, name, "error")
        await node_of(mesh).buckets.put(OBSERVABILITY_BUCKET, name, junk)
        assert "debug" == (await mesh.observe.get(name)).log_level
        await settle_level(mesh, name, "debug")
        await mesh.observe.set(name, log_level="warn")
        await settle_level(mesh, name, "warn")


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store thrown away"])
async def test_levels_hold_again_after_a_restart(name: str, tmp_path: Path, *, kept: bool) -> None:
    """As they are set on the new server, also what was set while away."""

    async def meanwhile(kv: KV) -> None:
        await (await kv._ready()).put(OBSERVABILITY_BUCKET, f"{name}.b", b'{"log_level": "error"}')

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        for agent in ("a", "b"):
            declare(mesh, f"{name}.{agent}")
            await mesh.observe.set(f"{name}.{agent}", log_level="debug")
            await settle_level(mesh, f"{name}.{agent}", "debug")
        await restart(meanwhile if kept else None)
        await settle_level(mesh, f"{name}.b", "error" if kept else "info")
        await settle_level(mesh, f"{name}.a", "debug" if kept else "info")
        await mesh.observe.set(f"{name}.a", log_level="warn")
        await settle_level(mesh, f"{name}.a", "warn")


async def test_levels_are_followed_after_a_second_outage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server lost again while all is made true again, for longer than anybody waits, is no end either."""
    failed = asyncio.Event()

    @asynccontextmanager
    async def away(what: str) -> AsyncIterator[None]:
        if OBSERVABILITY_BUCKET in what:
            failed.set()
        raise ConnectionFailed(f"{what} failed: the server is away.")
        yield

    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        await mesh.observe.set(name, log_level="warn")
        await settle_level(mesh, name, "warn")
        buckets = node_of(mesh).buckets
        with monkeypatch.context() as patch:
            patch.setattr(buckets, "_operation", away)
            for watcher in list(buckets._watchers):
                await watcher.stop()
            await asyncio.wait_for(failed.wait(), 10)
        await buckets.restore()
        await mesh.observe.set(name, log_level="debug")
        await settle_level(mesh, name, "debug")


@pytest.mark.parametrize(
    ("agent", "level"),
    [
        ("a..b", "info"),
        ("a b", "info"),
        ("", "info"),
        (None, "info"),
        ("a", "loud"),
        ("a", "INFO"),
        ("a", None),
    ],
)
async def test_bad_names_and_levels_are_refused(mesh: AgentMesh, agent: Any, level: Any) -> None:
    """In words, before anything is written."""
    before = await node_of(mesh).buckets.last_revision(OBSERVABILITY_BUCKET)
    with pytest.raises(InvalidInput, match=r"is not an agent's name|Unknown log level"):
        await mesh.observe.set(agent, log_level=level)
    assert before == await node_of(mesh).buckets.last_revision(OBSERVABILITY_BUCKET)


async def test_reading_wants_a_name_and_a_level_too(mesh: AgentMesh) -> None:
    """`get` and `logs` refuse what can be neither; the connection lives on."""
    for name in ("a b", "a..b", ".a"):
        with pytest.raises(InvalidInput):
            await mesh.observe.get(name)
        with pytest.raises(InvalidInput):
            await anext(mesh.observe.logs(name))
    with pytest.raises(InvalidInput, match="debug, info, warn, error"):
        await anext(mesh.observe.logs(level="loud"))  # type: ignore[arg-type]
    assert "info" == (await mesh.observe.get("nobody")).log_level
    assert 0 == reconnects(mesh)


@pytest.mark.parametrize("everybody", [True, False], ids=["all", "one"])
async def test_log_events_are_read_from_a_level_on(mesh: AgentMesh, name: str, *, everybody: bool) -> None:
    """`logs` yields LogEvents of one agent or of all, without those below the level and without junk."""
    declare(mesh, name)
    declare(mesh, f"{name}.other")
    await mesh.catalog()
    async with aclosing(mesh.observe.logs(None if everybody else name, level="warn")) as logs:
        reading = await begin(mesh, logs)
        for head in (b"", *map(write_headers, ODD_HEADERS)):
            for junk in (b"", b"{", b"[]", b'{"level": "loud"}', b"\xff"):
                await node_of(mesh).connection.publish(subjects.logs(name), junk, head)
        await mesh.call(name, "cost")
        for agent in (f"{name}.other", name):
            with pytest.raises(MeshError):
                await mesh.call(agent, "fail")
        events = [await asyncio.wait_for(reading, 10)]
        while events[-1].agent != name:
            events.append(await asyncio.wait_for(anext(logs), 10))
    assert ([f"{name}.other"] if everybody else []) + [name] == [event.agent for event in events]
    assert {("request_failed", "warn", "no")} == {(e.event, e.level, e.message) for e in events}


async def begin(mesh: AgentMesh, logs: AsyncGenerator[LogEvent, None]) -> asyncio.Future[LogEvent]:
    """Start to read, and wait until that is listening."""
    reading = asyncio.ensure_future(anext(logs))
    while not node_of(mesh).events._subscriptions:
        await asyncio.sleep(0)
    await flush(mesh)
    return reading


async def test_usage_travels_with_the_answer(mesh: AgentMesh, name: str) -> None:
    """On the ok reply, and on the end frame of a stream, without null fields."""
    declare(mesh, name)

    @mesh.agent(AgentSpec(name=f"{name}.stream"))
    async def stream(req: int) -> AsyncIterator[int]:
        for number in range(req):
            yield number
        report_usage(Usage(total_tokens=req))

    await mesh.catalog()
    node = node_of(mesh)
    message = await node.inbox.request(subjects.agent(name), b'"cost"', timeout=10)
    usage = json.loads(read_headers(message.head)["X-Mesh-Usage"])
    assert {"input_tokens": 5, "output_tokens": 1, "model": "b", "estimated_cost_usd": 0.75} == usage
    heard = await listen(mesh, subjects.stream(name))
    head = write_headers({subjects.REQUEST_ID: name, subjects.STREAM: "true"})
    await node.connection.publish(subjects.agent(f"{name}.stream"), b"2", head)
    frames = [read_headers((await heard.get()).head) for _ in range(3)]
    assert [None, None, '{"total_tokens": 2}'] == [frame.get("X-Mesh-Usage") for frame in frames]


def test_usage_outside_a_request_is_refused() -> None:
    """There is nobody to tell."""
    with pytest.raises(RuntimeError, match="no request"):
        report_usage(Usage(total_tokens=1))
