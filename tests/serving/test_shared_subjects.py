"""Sources on subjects with other traffic: bursts, requests to other services, errors and log events."""

import asyncio
import json

import pytest
from openagentmesh import AgentMesh, AgentSpec, HandlerError, MeshMessage
from openagentmesh.agent.agent import DEFAULT_LIMITS
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import errors_of, flush, node_of, take
from tests.support.waiting import until

CAPACITY = DEFAULT_LIMITS.concurrency + DEFAULT_LIMITS.queue


async def test_the_messages_of_a_burst_wait_for_capacity(mesh: AgentMesh, name: str) -> None:
    """Each message is handled once, also when more arrive than may run and wait in the agent's queue."""
    handled: list[int] = []

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> None:
        await asyncio.sleep(0.001)
        handled.append(message.data)

    await mesh.catalog()
    for number in range(CAPACITY * 3):
        await mesh.publish(f"{name}.in", str(number))
    await until(lambda: len(handled) >= CAPACITY * 3, timeout=30)
    assert list(range(CAPACITY * 3)) == sorted(handled)


@pytest.mark.parametrize("limits", [{"_MAX_WAITING": 1}, {"_MAX_BYTES": 3}], ids=["messages", "bytes"])
async def test_the_number_and_size_of_waiting_messages_is_limited(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    """A message above the limits is rejected as `overloaded` on `mesh.errors`."""
    for key, value in limits.items():
        monkeypatch.setattr(f"openagentmesh.serving.feeds.{key}", value)
    release, handled = asyncio.Event(), 0

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> None:
        nonlocal handled
        await release.wait()
        handled += 1

    errors = await errors_of(mesh, name)
    for _ in range(CAPACITY + 2):
        await mesh.publish(f"{name}.in", "100")
    [error] = await take(errors)
    assert "overloaded" == json.loads(error.body)["code"]
    release.set()
    await until(lambda: handled == CAPACITY + 1)


async def test_messages_that_wait_at_a_deactivation_are_rejected(mesh: AgentMesh, name: str) -> None:
    """Messages that have not reached the agent's queue are rejected as `overloaded`, not dropped."""
    release = asyncio.Event()

    @mesh.agent(
        AgentSpec(name=name),
        sources=[mesh.subject_source(f"{name}.in")],
        active_when=mesh.kv_condition(f"{name}.on", lambda text: text == "on", initial=True),
    )
    async def handler(message: MeshMessage[int]) -> None:
        await release.wait()

    errors = await errors_of(mesh, name)
    for number in range(CAPACITY + 3):
        await mesh.publish(f"{name}.in", str(number))
    await mesh.kv.put(f"{name}.on", "off")
    assert ["overloaded"] * 3 == [json.loads(error.body)["code"] for error in await take(errors, 3)]
    release.set()


@pytest.mark.parametrize("returns_nothing", [True, False], ids=["no-output", "server-subject"])
async def test_some_sources_send_no_reply(mesh: AgentMesh, name: str, *, returns_nothing: bool) -> None:
    """A handler without an output sends no reply, nor does one on the subjects of the server."""
    connection = node_of(mesh).connection
    subject = f"{name}.service" if returns_nothing else f"$JS.EVENT.{name}"
    handled = asyncio.Event()

    async def without_output(message: MeshMessage[int]) -> None:
        handled.set()

    async def with_output(message: MeshMessage[int]) -> str:
        handled.set()
        return "of the source"

    handler = without_output if returns_nothing else with_output
    mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(subject)])(handler)
    await mesh.catalog()
    requests: list[Message] = []
    await connection.subscribe(subject, requests.append)
    replies: asyncio.Queue[Message] = asyncio.Queue()
    reply = node_of(mesh).inbox.register(replies.put_nowait)
    await connection.publish(subject, b"7", reply=reply)
    await asyncio.wait_for(handled.wait(), 10)
    await connection.flush()
    await connection.publish(reply, b"of the service")
    assert [b"of the service"] == [message.body for message in await take(replies)]
    assert [b"7"] == [message.body for message in requests]


@pytest.mark.parametrize("topic", ["errors", "logs"])
async def test_failures_on_errors_and_log_events_are_not_published(
    mesh: AgentMesh, name: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Agents with sources on all errors, or on all log events, do not trigger each other endlessly."""
    handled: list[tuple[str, object]] = []
    for number in range(2):

        @mesh.agent(
            AgentSpec(name=f"{name}.{number}"), sources=[mesh.subject_source(f"mesh.{topic}.{name}.>")]
        )
        async def collector(message: MeshMessage[dict[str, object]]) -> None:
            if message.data.get("event") != "agent_registered":
                handled.append((message.subject, message.data.get("event")))
            raise ValueError("cannot be collected")

    @mesh.agent(AgentSpec(name=f"{name}.failing"))
    async def failing() -> str:
        raise ValueError("once")

    await mesh.catalog()
    for each in ("0", "1", "failing"):
        node_of(mesh).router.logs.set_level(f"{name}.{each}", "debug")
    with pytest.raises(HandlerError):
        await mesh.call(f"{name}.failing")
    events = [None] if topic == "errors" else ["request_received", "request_failed"]
    expected = [(f"mesh.{topic}.{name}.failing", event) for event in events for _ in range(2)]
    await until(lambda: len(handled) >= len(expected))
    for _ in range(3):  # messages that these failures would cause arrive meanwhile
        await flush(mesh)
        await asyncio.sleep(0.01)
    assert sorted(map(str, expected)) == sorted(map(str, handled))
    assert f"{name}.0 failed on a message of mesh.{topic}.{name}.failing" in caplog.text
