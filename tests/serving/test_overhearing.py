"""Sources on subjects that others use as well: bursts, other people's requests, what is told of requests."""

import asyncio
import json

import pytest
from openagentmesh import AgentMesh, AgentSpec, HandlerError, MeshMessage
from openagentmesh.agent.agent import DEFAULT_LIMITS
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import errors_of, flush, node_of, take

ROOM = DEFAULT_LIMITS.concurrency + DEFAULT_LIMITS.queue


async def test_a_burst_waits_for_its_turn(mesh: AgentMesh, name: str) -> None:
    """Nobody sends a message again, so each one is handled once, however many come at once."""
    got: list[int] = []

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> None:
        await asyncio.sleep(0.001)
        got.append(message.data)

    await mesh.catalog()
    for number in range(ROOM * 3):
        await mesh.publish(f"{name}.in", str(number))
    async with asyncio.timeout(30):
        while len(got) < ROOM * 3:
            await asyncio.sleep(0.01)
    assert list(range(ROOM * 3)) == sorted(got)


@pytest.mark.parametrize("bound", [{"_MAX_WAITING": 1}, {"_MAX_BYTES": 3}], ids=["messages", "bytes"])
async def test_what_waits_is_bounded(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, bound: dict[str, int]
) -> None:
    """More than may wait is `overloaded`, and told as such."""
    for key, value in bound.items():
        monkeypatch.setattr(f"openagentmesh.serving.feeds.{key}", value)
    release, got = asyncio.Event(), 0

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> None:
        nonlocal got
        await release.wait()
        got += 1

    heard = await errors_of(mesh, name)
    for _ in range(ROOM + 2):
        await mesh.publish(f"{name}.in", "100")
    [told] = await take(heard)
    assert "overloaded" == json.loads(told.body)["code"]
    release.set()
    async with asyncio.timeout(10):
        while got < ROOM + 1:
            await asyncio.sleep(0.005)


async def test_what_waits_when_it_leaves_is_told(mesh: AgentMesh, name: str) -> None:
    """Turned off, it refuses what had no turn yet instead of forgetting it."""
    release = asyncio.Event()

    @mesh.agent(
        AgentSpec(name=name),
        sources=[mesh.subject_source(f"{name}.in")],
        active_when=mesh.kv_condition(f"{name}.on", lambda text: text == "on", initial=True),
    )
    async def handler(message: MeshMessage[int]) -> None:
        await release.wait()

    heard = await errors_of(mesh, name)
    for number in range(ROOM + 3):
        await mesh.publish(f"{name}.in", str(number))
    await mesh.kv.put(f"{name}.on", "off")
    assert ["overloaded"] * 3 == [json.loads(told.body)["code"] for told in await take(heard, 3)]
    release.set()


@pytest.mark.parametrize("silent", [True, False], ids=["no-output", "output-on-the-servers-own"])
async def test_a_source_leaves_the_answer_to_others(mesh: AgentMesh, name: str, *, silent: bool) -> None:
    """Whoever asks does not hear a handler that returns nothing, nor one on the server's own subjects."""
    connection, subject = node_of(mesh).connection, f"{name}.service" if silent else f"$JS.EVENT.{name}"
    got = asyncio.Event()

    async def quiet(message: MeshMessage[int]) -> None:
        got.set()

    async def talkative(message: MeshMessage[int]) -> str:
        got.set()
        return "mine"

    handler = quiet if silent else talkative
    mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(subject)])(handler)
    await mesh.catalog()
    asked: list[Message] = []
    await connection.subscribe(subject, asked.append)
    replies: asyncio.Queue[Message] = asyncio.Queue()
    reply = node_of(mesh).inbox.register(replies.put_nowait)
    await connection.publish(subject, b"7", reply=reply)
    await asyncio.wait_for(got.wait(), 10)
    await connection.flush()
    await connection.publish(reply, b"the service's")
    assert [b"the service's"] == [message.body for message in await take(replies)]
    assert [b"7"] == [message.body for message in asked]


@pytest.mark.parametrize("told", ["errors", "logs"])
async def test_those_who_hear_of_requests_set_off_nobody(
    mesh: AgentMesh, name: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Agents that hear of all failures, or of all events, do not tell each other of theirs for ever."""
    got: list[tuple[str, object]] = []
    for number in range(2):

        @mesh.agent(
            AgentSpec(name=f"{name}.{number}"), sources=[mesh.subject_source(f"mesh.{told}.{name}.>")]
        )
        async def collector(message: MeshMessage[dict[str, object]]) -> None:
            if message.data.get("event") != "agent_registered":
                got.append((message.subject, message.data.get("event")))
            raise ValueError("the ticket system is down")

    @mesh.agent(AgentSpec(name=f"{name}.bad"))
    async def bad() -> str:
        raise ValueError("once")

    await mesh.catalog()
    for each in ("0", "1", "bad"):
        node_of(mesh).router.logs.set_level(f"{name}.{each}", "debug")
    with pytest.raises(HandlerError):
        await mesh.call(f"{name}.bad")
    events = [None] if told == "errors" else ["request_received", "request_failed"]
    expected = [(f"mesh.{told}.{name}.bad", event) for event in events for _ in range(2)]
    async with asyncio.timeout(10):
        while len(got) < len(expected):
            await asyncio.sleep(0.005)
    for _ in range(3):  # what they had told of these would be here by now
        await flush(mesh)
        await asyncio.sleep(0.01)
    assert sorted(map(str, expected)) == sorted(map(str, got))
    assert f"{name}.0 failed on a message of mesh.{told}.{name}.bad" in caplog.text
