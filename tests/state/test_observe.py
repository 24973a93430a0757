"""Log events of agents and requests, and the levels from which they are published."""

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
# Headers of an end frame, of an error frame, and unknown ones.
FRAME_HEADERS = ({subjects.STREAM_END: "true"}, {subjects.STATUS: "error"}, {"Content-Type": "junk"})


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
    """Wait until the serving instance publishes events of this level and above only."""
    events = node_of(mesh).router.logs
    expected = [LEVELS.index(each) >= LEVELS.index(level) for each in LEVELS]
    async with asyncio.timeout(10):
        while [events.is_enabled(name, each) for each in LEVELS] != expected:
            await asyncio.sleep(0.005)


async def test_the_default_level_publishes_registration_usage_and_failures(
    mesh: AgentMesh, name: str
) -> None:
    """Events have a level and the request id, failures the error's code; a plain request has no event."""
    events = await listen(mesh, subjects.logs(name))
    declare(mesh, name)
    await mesh.catalog()
    event = await next_log_event(events)
    assert ("agent_registered", "info", name) == (event["event"], event["level"], event["agent"])
    await mesh.call(name, "plain")
    await mesh.call(name, "cost", headers={subjects.REQUEST_ID: "r1"})
    event = await next_log_event(events)
    assert ("usage_reported", "info", "r1") == (event["event"], event["level"], event["request_id"])
    usage = {"input_tokens": 5, "output_tokens": 1, "model": "b", "estimated_cost_usd": 0.75}
    assert usage == event["data"]
    for payload, name_of_event, code in (
        ("fail", "request_failed", "handler_error"),
        (7, "validation_error", "invalid_input"),
    ):
        with pytest.raises(MeshError):
            await mesh.call(name, payload, headers={subjects.REQUEST_ID: "r2"})
        event = await next_log_event(events)
        assert (name_of_event, "warn", "r2", {"code": code}) == (
            event["event"], event["level"], event["request_id"], event["data"],
        )  # fmt: skip


async def test_a_stop_publishes_agent_deregistered(mesh: AgentMesh, url: str, name: str) -> None:
    """A start and a stop are the events `agent_registered` and `agent_deregistered`."""
    events = await listen(mesh, subjects.logs(name))
    other = AgentMesh(url)
    declare(other, name)
    async with other:
        pass
    assert ["agent_registered", "agent_deregistered"] == [
        (await next_log_event(events))["event"] for _ in range(2)
    ]


async def test_a_level_is_applied_to_running_agents(mesh: AgentMesh, name: str) -> None:
    """With `debug` each request is published with its duration; with `error` a failed one is not."""
    declare(mesh, name)
    await mesh.observe.set(name, log_level="debug")
    await settle_level(mesh, name, "debug")
    events = await listen(mesh, subjects.logs(name))
    await mesh.call(name, "x")
    received, completed = await next_log_event(events), await next_log_event(events)
    assert ("request_received", "debug") == (received["event"], received["level"])
    assert ("request_completed", received["request_id"]) == (completed["event"], completed["request_id"])
    assert ["duration_ms"] == list(completed["data"])
    assert 0 <= completed["data"]["duration_ms"] < 10_000
    await mesh.observe.set(name, log_level="error")
    await settle_level(mesh, name, "error")
    with pytest.raises(MeshError):
        await mesh.call(name, "fail")
    assert events.empty()


async def test_each_level_publishes_its_events_and_those_above(name: str) -> None:
    """At each level exactly the events of that level and of higher ones are published."""
    levels: dict[str, LogLevel] = {
        "request_received": "debug",
        "request_completed": "debug",
        "usage_reported": "info",
        "request_failed": "warn",
        "validation_error": "warn",
    }
    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        messages = await listen(mesh, subjects.logs(name))
        await mesh.catalog()
        assert "agent_registered" == (await next_log_event(messages))["event"]
        for level in LEVELS:
            await mesh.observe.set_global(log_level=level)
            await settle_level(mesh, name, level)
            await mesh.call(name, "cost")
            for payload in ("fail", 7):
                with pytest.raises(MeshError):
                    await mesh.call(name, payload)
            await node_of(mesh).connection.publish(subjects.logs(name), b"end")
            events = {}
            while (message := await asyncio.wait_for(messages.get(), 10)).body != b"end":
                event = json.loads(message.body)
                events[event["event"]] = event["level"]
            published = LEVELS[LEVELS.index(level) :]
            assert {event: own for event, own in levels.items() if own in published} == events


async def test_the_setting_of_an_agent_precedes_the_global_one(name: str) -> None:
    """The level is the agent's own, else the global one, else `info`; also after settings are deleted."""
    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        await mesh.catalog()
        buckets = node_of(mesh).buckets

        async def check_level(level: LogLevel) -> None:
            assert level == (await mesh.observe.get(name)).log_level
            await settle_level(mesh, name, level)

        await check_level("info")
        await mesh.observe.set_global(log_level="warn")
        assert "warn" == (await mesh.observe.get()).log_level
        await check_level("warn")
        await mesh.observe.set(name, log_level="debug")
        await check_level("debug")
        await mesh.observe.set_global(log_level="error")
        await check_level("debug")
        await buckets.delete_all(OBSERVABILITY_BUCKET, [name])
        await check_level("error")
        await buckets.delete_all(OBSERVABILITY_BUCKET, [subjects.GLOBAL_KEY])
        await check_level("info")


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b'{"log_level": "loud"}', b'{"log_level": null}', b"\xff"]
)
async def test_a_malformed_setting_is_ignored(name: str, junk: bytes) -> None:
    """The global level applies instead, until the agent's own one is set."""
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


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-lost"])
async def test_levels_are_read_again_after_a_restart_of_the_server(
    name: str, tmp_path: Path, *, kept: bool
) -> None:
    """The levels of the new server apply, also those that were set during the outage."""

    async def set_during_the_outage(kv: KV) -> None:
        await (await kv._ready()).put(OBSERVABILITY_BUCKET, f"{name}.b", b'{"log_level": "error"}')

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        for agent in ("a", "b"):
            declare(mesh, f"{name}.{agent}")
            await mesh.observe.set(f"{name}.{agent}", log_level="debug")
            await settle_level(mesh, f"{name}.{agent}", "debug")
        await restart(set_during_the_outage if kept else None)
        await settle_level(mesh, f"{name}.b", "error" if kept else "info")
        await settle_level(mesh, f"{name}.a", "debug" if kept else "info")
        await mesh.observe.set(f"{name}.a", log_level="warn")
        await settle_level(mesh, f"{name}.a", "warn")


async def test_levels_are_followed_after_a_second_outage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the watch fails because the server is lost again during the recovery, it is retried."""
    failed = asyncio.Event()

    @asynccontextmanager
    async def failing(action: str) -> AsyncIterator[None]:
        if OBSERVABILITY_BUCKET in action:
            failed.set()
        raise ConnectionFailed(f"{action} failed: the server does not answer.")
        yield

    async with AgentMesh.local() as mesh:
        declare(mesh, name)
        await mesh.observe.set(name, log_level="warn")
        await settle_level(mesh, name, "warn")
        buckets = node_of(mesh).buckets
        with monkeypatch.context() as patch:
            patch.setattr(buckets, "_operation", failing)
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
async def test_setting_an_invalid_name_or_level_is_rejected(mesh: AgentMesh, agent: Any, level: Any) -> None:
    """`set` raises InvalidInput and writes nothing."""
    before = await node_of(mesh).buckets.last_revision(OBSERVABILITY_BUCKET)
    with pytest.raises(InvalidInput, match=r"is not an agent's name|Unknown log level"):
        await mesh.observe.set(agent, log_level=level)
    assert before == await node_of(mesh).buckets.last_revision(OBSERVABILITY_BUCKET)


async def test_reading_with_an_invalid_name_or_level_is_rejected(mesh: AgentMesh) -> None:
    """`get` and `logs` raise InvalidInput, and the connection stays open."""
    for name in ("a b", "a..b", ".a"):
        with pytest.raises(InvalidInput):
            await mesh.observe.get(name)
        with pytest.raises(InvalidInput):
            await anext(mesh.observe.logs(name))
    with pytest.raises(InvalidInput, match="debug, info, warn, error"):
        await anext(mesh.observe.logs(level="loud"))  # type: ignore[arg-type]
    assert "info" == (await mesh.observe.get("unknown")).log_level
    assert 0 == reconnects(mesh)


@pytest.mark.parametrize("all_agents", [True, False], ids=["all-agents", "one-agent"])
async def test_logs_yields_events_from_a_level_on(mesh: AgentMesh, name: str, *, all_agents: bool) -> None:
    """It yields the events of one agent or of all, without lower levels and malformed ones."""
    declare(mesh, name)
    declare(mesh, f"{name}.other")
    await mesh.catalog()
    async with aclosing(mesh.observe.logs(None if all_agents else name, level="warn")) as logs:
        reading = await start_next(mesh, logs)
        for head in (b"", *map(write_headers, FRAME_HEADERS)):
            for junk in (b"", b"{", b"[]", b'{"level": "loud"}', b"\xff"):
                await node_of(mesh).connection.publish(subjects.logs(name), junk, head)
        await mesh.call(name, "cost")
        for agent in (f"{name}.other", name):
            with pytest.raises(MeshError):
                await mesh.call(agent, "fail")
        events = [await asyncio.wait_for(reading, 10)]
        while events[-1].agent != name:
            events.append(await asyncio.wait_for(anext(logs), 10))
    assert ([f"{name}.other"] if all_agents else []) + [name] == [event.agent for event in events]
    assert {("request_failed", "warn", "no")} == {(e.event, e.level, e.message) for e in events}


async def start_next(mesh: AgentMesh, logs: AsyncGenerator[LogEvent, None]) -> asyncio.Future[LogEvent]:
    """Begin to read the next event; the subscription exists when this returns."""
    reading = asyncio.ensure_future(anext(logs))
    while not node_of(mesh).events._subscriptions:
        await asyncio.sleep(0)
    await flush(mesh)
    return reading


async def test_usage_is_sent_with_the_answer(mesh: AgentMesh, name: str) -> None:
    """The ok reply, and the end frame of a stream, have it in a header, without null fields."""
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
    messages = await listen(mesh, subjects.stream(name))
    head = write_headers({subjects.REQUEST_ID: name, subjects.STREAM: "true"})
    await node.connection.publish(subjects.agent(f"{name}.stream"), b"2", head)
    frames = [read_headers((await messages.get()).head) for _ in range(3)]
    assert [None, None, '{"total_tokens": 2}'] == [frame.get("X-Mesh-Usage") for frame in frames]


def test_reporting_usage_outside_a_request_is_rejected() -> None:
    """`report_usage` raises RuntimeError when no request is running."""
    with pytest.raises(RuntimeError, match="no request"):
        report_usage(Usage(total_tokens=1))
