"""Log events: what is told, from which level on, and what strangers write there."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest
from openagentmesh import AgentMesh, AgentSpec, InvalidInput, LogEvent, MeshError, Usage, report_usage
from openagentmesh.bus.client import Message
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.subjects import OBSERVABILITY_BUCKET

from tests.serving.test_router import node_of

KEYS = ["timestamp", "level", "agent", "event", "request_id", "message", "data"]


async def listen(mesh: AgentMesh, subject: str) -> asyncio.Queue[Message]:
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await node_of(mesh).bus.listen(subject, heard.put_nowait)
    await node_of(mesh).bus.flush()
    return heard


async def next_event(heard: asyncio.Queue[Message]) -> dict[str, object]:
    async with asyncio.timeout(10):
        found: dict[str, object] = json.loads((await heard.get()).body)
    assert KEYS == list(found)
    return found


def declare(mesh: AgentMesh, name: str) -> None:
    @mesh.agent(AgentSpec(name=name))
    async def agent(text: str) -> str:
        if text == "fail":
            raise ValueError("no")
        if text == "cost":
            report_usage(Usage(input_tokens=2, estimated_cost_usd=0.5, model="a"))
            report_usage(Usage(input_tokens=3, output_tokens=1, estimated_cost_usd=0.25, model="b"))
        return text


async def settle_level(mesh: AgentMesh, name: str, level: str) -> None:
    """Wait until the instance that serves has heard of the level."""
    events = node_of(mesh).router.events
    async with asyncio.timeout(10):
        while events.wants(name, "debug") != (level == "debug"):
            await asyncio.sleep(0.005)


async def test_by_default_failures_and_usage_are_told(mesh: AgentMesh, name: str) -> None:
    """Registered, usage, failed, invalid: with level, request id, code; a plain request is silent."""
    heard = await listen(mesh, subjects.logs(name))
    declare(mesh, name)
    await mesh.catalog()
    event = await next_event(heard)
    assert ("agent_registered", "info", name) == (event["event"], event["level"], event["agent"])
    await mesh.call(name, "quiet")
    await mesh.call(name, "cost", headers={subjects.REQUEST_ID: "r1"})
    event = await next_event(heard)
    assert ("usage_reported", "info", "r1") == (event["event"], event["level"], event["request_id"])
    usage = {"input_tokens": 5, "output_tokens": 1, "model": "b", "estimated_cost_usd": 0.75}
    assert usage == event["data"]
    for payload, name_of_event, code in (
        ("fail", "request_failed", "handler_error"),
        (7, "validation_error", "invalid_input"),
    ):
        with pytest.raises(MeshError):
            await mesh.call(name, payload, headers={subjects.REQUEST_ID: "r2"})
        event = await next_event(heard)
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
        (await next_event(heard))["event"] for _ in range(2)
    ]


async def test_levels_change_live(mesh: AgentMesh, name: str) -> None:
    """An agent's own level goes before the one for all; debug tells each request and how long it took."""
    declare(mesh, name)
    await mesh.observe.set(name, log_level="debug")
    await settle_level(mesh, name, "debug")
    heard = await listen(mesh, subjects.logs(name))
    await mesh.call(name, "x")
    received, completed = await next_event(heard), await next_event(heard)
    assert ("request_received", "debug") == (received["event"], received["level"])
    assert ("request_completed", received["request_id"]) == (completed["event"], completed["request_id"])
    data = completed["data"]
    assert isinstance(data, dict)
    assert 0 <= data["duration_ms"] < 10_000
    await mesh.observe.set(name, log_level="error")
    await settle_level(mesh, name, "error")
    with pytest.raises(MeshError):
        await mesh.call(name, "fail")
    assert heard.empty()


async def test_what_holds_for_an_agent(mesh: AgentMesh, name: str) -> None:
    """Its own setting, else the one for all, else info."""
    try:
        assert "info" == (await mesh.observe.get(name)).log_level
        await mesh.observe.set_global(log_level="warn")
        assert ["warn", "warn"] == [(await mesh.observe.get(n)).log_level for n in (name, None)]
        await mesh.observe.set(name, log_level="debug")
        assert "debug" == (await mesh.observe.get(name)).log_level
    finally:
        await node_of(mesh).buckets.delete_all(OBSERVABILITY_BUCKET, [subjects.EVERY_AGENT])


@pytest.mark.parametrize(
    ("agent", "level"), [("a..b", "info"), ("a b", "info"), ("a", "loud"), ("a", "INFO")]
)
async def test_bad_names_and_levels_are_refused(mesh: AgentMesh, agent: str, level: str) -> None:
    """In words, before anything is written."""
    with pytest.raises(InvalidInput):
        await mesh.observe.set(agent, log_level=level)  # type: ignore[arg-type]


async def test_log_events_are_read_from_a_level_on(mesh: AgentMesh, name: str) -> None:
    """`logs` yields LogEvents of one agent or of all, without those below the level and without junk."""
    declare(mesh, name)
    await mesh.catalog()
    async with aclosing(mesh.observe.logs(name, level="warn")) as logs:
        reading = await begin(mesh, logs)
        for junk in (b"", b"{", b"[]", b'{"level": "loud"}', b"\xff"):
            await node_of(mesh).bus.publish(subjects.logs(name), junk)
        await mesh.call(name, "cost")
        with pytest.raises(MeshError):
            await mesh.call(name, "fail")
        event = await reading
    assert isinstance(event, LogEvent)
    assert (name, "request_failed", "warn", "no") == (event.agent, event.event, event.level, event.message)


async def begin(mesh: AgentMesh, logs: AsyncGenerator[LogEvent, None]) -> asyncio.Future[LogEvent]:
    """Start to read, and wait until that is listening."""
    reading = asyncio.ensure_future(anext(logs))
    while not node_of(mesh).events._feeds:
        await asyncio.sleep(0)
    await node_of(mesh).bus.flush()
    return reading


async def test_junk_settings_break_nothing(mesh: AgentMesh, name: str) -> None:
    """What strangers write into the bucket counts as not set; later changes are heard of."""
    declare(mesh, name)
    await mesh.catalog()
    for junk in (b"", b"{", b'{"log_level": "loud"}', b"\xff"):
        await node_of(mesh).buckets.put(OBSERVABILITY_BUCKET, name, junk)
        assert "info" == (await mesh.observe.get(name)).log_level
    await mesh.observe.set(name, log_level="debug")
    await settle_level(mesh, name, "debug")


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
    usage = json.loads(codec.read_headers(message.head)[subjects.USAGE])
    assert {"input_tokens": 5, "output_tokens": 1, "model": "b", "estimated_cost_usd": 0.75} == usage
    heard = await listen(mesh, subjects.stream(name))
    head = codec.write_headers({subjects.REQUEST_ID: name, subjects.STREAM: "true"})
    await node.bus.publish(subjects.agent(f"{name}.stream"), b"2", head)
    frames = [codec.read_headers((await heard.get()).head) for _ in range(3)]
    assert [None, None, '{"total_tokens": 2}'] == [frame.get(subjects.USAGE) for frame in frames]


def test_usage_outside_a_request_is_refused() -> None:
    """There is nobody to tell."""
    with pytest.raises(RuntimeError, match="no request"):
        report_usage(Usage(total_tokens=1))
