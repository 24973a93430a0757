"""Subscriptions to publishers, channels and subjects: what they yield, and how they end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    ConnectionFailed,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshMessage,
    MeshTimeout,
    NotFound,
    Overloaded,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers, write_headers
from openagentmesh.transport.server import EmbeddedServer

from tests.support.headers import HEADS
from tests.support.meshes import (
    Publisher,
    Text,
    background_of,
    declare_background,
    flush,
    is_subscribed,
    listen,
    node_of,
    read,
    reconnects,
    restart_soon,
    run_forever,
    serve,
    start_reading,
)
from tests.support.waiting import until

FAILURE = MeshError("quota", "used up", details={"left": 0})


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing mesh waits only this long for messages that are on their way."""
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)


async def test_a_subscription_to_a_publisher_ends_with_its_run(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """All subscribers, also two of one mesh, get every event in order until the publisher returns."""
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    async with new_mesh() as other:
        readers = [await start_reading(each, each.subscribe(agent=name)) for each in (mesh, other, other)]
        publisher.emit(*range(100), None)
        assert [list(range(100))] * 3 == [await reading for reading in readers]


async def test_the_failure_of_a_publisher_is_raised(mesh: AgentMesh, name: str) -> None:
    """Its subscriber gets the events before the failure, then the error with the author's code."""
    restart_soon(mesh)
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    got: list[int] = []

    async def recorded() -> AsyncGenerator[int, None]:
        async for number in mesh.subscribe(agent=name):
            got.append(number)
            yield number

    reading = await start_reading(mesh, recorded())
    publisher.emit(1, 2, FAILURE)
    with pytest.raises(MeshError) as caught:
        await reading
    error, expected = caught.value, ("quota", "used up", name, {"left": 0})
    assert ([1, 2], expected) == (got, (error.code, error.message, error.agent, error.details))


async def test_an_unknown_agent_is_not_found(mesh: AgentMesh, name: str) -> None:
    """Subscribing to an unregistered name raises NotFound."""
    with pytest.raises(NotFound) as caught:
        await read(mesh.subscribe(agent=name, timeout=10))
    assert name == caught.value.agent


@pytest.mark.parametrize("owner", [True, False], ids=["own", "other"])
async def test_a_subscription_to_an_agent_that_is_not_a_publisher_is_rejected(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, owner: bool
) -> None:
    """The errors for streamers, responders and watchers have the texts that tools match on."""
    serve(mesh, f"{name}.responder")
    declare_background(mesh, f"{name}.watcher", "watcher", run_forever)

    @mesh.agent(AgentSpec(name=f"{name}.streamer"))
    async def stream(req: Text) -> AsyncIterator[Text]:
        yield req

    await mesh.catalog()
    async with new_mesh() as other:
        for agent, suffix in (
            ("streamer", "streams responses to requests. Use stream() instead"),
            ("responder", "does not publish events. Use call() instead"),
            ("watcher", "is a background task and does not publish events"),
        ):
            with pytest.raises(InvocationMismatch) as caught:
                await read((mesh if owner else other).subscribe(agent=f"{name}.{agent}"))
            assert f"Agent '{name}.{agent}' {suffix}" == caught.value.message


async def test_a_subscription_to_a_channel_continues_when_a_publisher_ends_or_fails(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The events of all publishers of the channel are yielded, those of other channels are not."""
    restart_soon(mesh)
    names = [name, f"{name}.a", f"{name}.b", f"{name}.deep.down.c", f"{name}x.other"]
    publishers = {each: Publisher(mesh, each) for each in names}
    serve(mesh, f"{name}.echo")
    await mesh.catalog()
    async with new_mesh() as other:
        reading = await start_reading(other, other.subscribe(channel=name, messages=True), 6)
        copies = await listen(mesh, subjects.errors(f"{name}.b"))
        publishers[f"{name}.a"].emit(1, None)
        publishers[f"{name}.b"].emit(2, FAILURE)
        publishers[f"{name}x.other"].emit(-1)
        await copies.get()
        assert {"text": "ok"} == await mesh.call(f"{name}.echo", {"text": "no event"})
        publishers[f"{name}.b"].emit(3)
        publishers[f"{name}.deep.down.c"].emit(4, 5)
        publishers[name].emit(6)
        events: list[MeshMessage[int]] = await reading
    assert {1, 2, 3, 4, 5, 6} == {event.data for event in events}
    agents = [(event.data, event.agent) for event in sorted(events, key=lambda event: event.data)]
    assert [
        (number, names[index]) for number, index in zip(range(1, 7), (1, 2, 2, 3, 3, 0), strict=True)
    ] == (agents)


async def test_messages_have_their_agent_subject_and_headers(mesh: AgentMesh, name: str) -> None:
    """With `messages=True` an event is a MeshMessage; one that is not a publisher's has no agent."""
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    reading = await start_reading(mesh, mesh.subscribe(agent=name, messages=True), 1)
    publisher.emit(7)
    headers = {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mesh-Stream-Seq": "0", "X-Mesh-Stream-End": "false"}
    [event] = await reading
    assert (MeshMessage(f"mesh.agent.{name}.events", 7, headers), name) == (event, event.agent)
    reading = await start_reading(mesh, mesh.subscribe(subject=f"news.{name}.*", messages=True), 1)
    await mesh.publish(f"news.{name}.today", Text(text="x"))
    [message] = await reading
    assert ("", f"news.{name}.today", {"text": "x"}) == (message.agent, message.subject, message.data)


@pytest.mark.parametrize(
    ("wanted", "subject"),
    [("agent", "mesh.agent.{}.events"), ("channel", "mesh.agent.{}.>"), ("subject", "{}")],
)
async def test_no_event_within_the_timeout_raises_mesh_timeout(
    mesh: AgentMesh, name: str, wanted: str, subject: str
) -> None:
    """Requests to the channel's agents do not count as events."""
    declare_background(mesh, name, "publisher", run_forever)
    serve(mesh, f"{name}.echo")
    await mesh.catalog()
    reading = await start_reading(mesh, mesh.subscribe(**{wanted: name}, timeout=0.3))  # type: ignore[call-overload]
    async with asyncio.timeout(5):
        while not reading.done():
            await mesh.call(f"{name}.echo", {"text": "no event"})
            await asyncio.sleep(0.02)
    with pytest.raises(MeshTimeout) as caught:
        await reading
    assert f"No message on {subject.format(name)} within 0.3s" == caught.value.message


@pytest.mark.parametrize("bound", [{"_MAX_BUFFERED": 5}, {"_MAX_BYTES": 50}], ids=["messages", "bytes"])
@pytest.mark.parametrize("continues", [False, True], ids=["burst", "more-arrives-while-reading"])
async def test_a_subscriber_that_is_too_slow_is_overloaded(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, continues: bool, bound: dict[str, int]
) -> None:
    """It gets all messages before the first one that was dropped, then Overloaded."""
    for limit, value in bound.items():
        monkeypatch.setattr(f"openagentmesh.client.subscriptions.{limit}", value)
    got: list[dict[str, str]] = []
    async with aclosing(mesh.subscribe(subject=name)) as messages:
        first = asyncio.ensure_future(anext(messages))
        while not node_of(mesh).events._subscriptions:
            await asyncio.sleep(0)
        await mesh.publish(name, Text(text="0"))
        got.append(await first)
        for number in range(1, 10):
            await mesh.publish(name, Text(text=str(number)))
        await flush(mesh)
        with pytest.raises(Overloaded, match="behind"):
            while len(got) < 20:
                got.append(await anext(messages))
                if continues:
                    await mesh.publish(name, Text(text=str(len(got) + 8)))
                    await flush(mesh)
    assert [{"text": str(number)} for number in range(6)] == got


@pytest.mark.parametrize("how", ["break", "error", "cancel", "timeout"])
async def test_ending_the_iteration_unsubscribes(mesh: AgentMesh, name: str, how: str) -> None:
    """However the iteration ends, the server has no subscription to the subject afterwards."""
    subject = f"news.{name}"

    async def iterate() -> None:
        async for _ in mesh.subscribe(subject=subject, timeout=0.2 if how == "timeout" else None):
            if how == "break":
                break
            if how == "error":
                raise ZeroDivisionError

    iterating = asyncio.create_task(iterate())

    async def is_unsubscribed() -> bool:
        return not await is_subscribed(mesh, subject)

    await until(lambda: is_subscribed(mesh, subject))
    await mesh.publish(subject, "news")
    if how == "cancel":
        iterating.cancel()
    await asyncio.wait([iterating], timeout=10)
    assert iterating.done()
    if not iterating.cancelled():
        expected = {"error": ZeroDivisionError, "timeout": MeshTimeout}.get(how, type(None))
        assert isinstance(iterating.exception(), expected)
    await until(is_unsubscribed)
    assert not node_of(mesh).events._subscriptions


@pytest.mark.parametrize(
    ("payload", "kind", "body"),
    [
        (Text(text="é"), "application/json", '{"text":"é"}'.encode()),
        ("plain wörds", "text/plain", "plain wörds".encode()),
        (b"\x00\xff{", "application/octet-stream", b"\x00\xff{"),
    ],
    ids=["model", "text", "bytes"],
)
async def test_a_published_payload_is_received(
    mesh: AgentMesh, name: str, payload: Text | str | bytes, kind: str, body: bytes
) -> None:
    """Each kind of payload has its content type on the wire, by which the subscriber decodes it."""
    raw = await listen(mesh, name)
    reading = await start_reading(mesh, mesh.subscribe(subject=name, messages=True), 1)
    await mesh.publish(name, payload, headers={"X-Mine": "é: yes"})
    [message] = await reading
    data = payload.model_dump() if isinstance(payload, Text) else payload
    assert (data, "é: yes") == (message.data, message.headers["X-Mine"])
    on_wire, own = await raw.get(), {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mine": "é: yes"}
    assert (body, own | {"X-Mesh-Content-Type": kind}) == (on_wire.body, read_headers(on_wire.head))


async def test_publishing_on_an_invalid_subject_is_rejected(mesh: AgentMesh) -> None:
    """Wildcards, blanks and empty words raise ValueError, and nothing is sent."""
    for bad in ("", " ", "a b", "a..b", ".a", "a.", "*", "a.*", ">", "a*", "a\r\nPUB x", "a\t", "x" * 5000):
        with pytest.raises(ValueError, match="wildcards"):
            await mesh.publish(bad, "x")
    with pytest.raises(InvalidInput, match="line break"):
        await mesh.publish("good", "x", headers={"X-Mine": "a\r\nX-Mesh-Status: error"})
    await flush(mesh)
    assert reconnects(mesh) == 0


async def test_a_subscription_needs_one_valid_target(mesh: AgentMesh, name: str) -> None:
    """No target, two targets, and an invalid channel raise ValueError."""
    for wrong in ({}, {"agent": name, "subject": name}, {"channel": "a.*"}, {"channel": "a b"}):
        with pytest.raises(ValueError, match=r"agent|channel"):
            await read(mesh.subscribe(**wrong, timeout=5))  # type: ignore[call-overload]


async def test_a_body_that_does_not_match_its_content_type_stays_bytes(mesh: AgentMesh, name: str) -> None:
    """A message of another client that cannot be decoded is yielded as bytes."""
    malformed: list[tuple[dict[str, str], bytes]] = [
        ({}, b"{malformed"),
        ({"X-Mesh-Content-Type": "application/json"}, b"\xff"),
        ({"X-Mesh-Content-Type": "text/plain"}, b"\xff\xfe"),
        ({"X-Mesh-Content-Type": "application/octet-stream"}, b"[1]"),
        ({"X-Mesh-Stream-Seq": "x", "X-Mesh-Stream-End": "perhaps"}, b"[" * 5000),
    ]
    reading = await start_reading(mesh, mesh.subscribe(subject=name), len(malformed))
    for headers, body in malformed:
        await node_of(mesh).connection.publish(name, body, write_headers(headers))
    assert [body for _, body in malformed] == await reading


async def test_a_subscription_survives_a_restart_of_the_server() -> None:
    """Publisher and subscribers wait during the outage, and continue the same run afterwards."""
    server = EmbeddedServer()
    await server.start()
    async with AgentMesh(server.url) as provider, AgentMesh(server.url) as subscriber:
        publisher = Publisher(provider, "news.clock")
        await provider.catalog()
        targets = ({"agent": "news.clock"}, {"channel": "news"}, {"subject": "mesh.agent.news.*.events"})
        readers = [await start_reading(subscriber, subscriber.subscribe(**each), 2) for each in targets]  # type: ignore[call-overload]
        publisher.emit(1)
        await flush(subscriber)
        await server.stop()
        publisher.emit(*range(2, 50))
        restarted = EmbeddedServer(server.port)
        await restarted.start()
        await until(lambda: reconnects(subscriber) and reconnects(provider))
        await flush(subscriber)
        publisher.emit(100)
        for reading in readers:
            found = await reading
            assert sorted(found) == found
            assert found[-1] > 1
        run = background_of(provider, "news.clock")
        assert ("running", 0, "") == (run.state, run.restarts, run.error)
    await restarted.stop()


async def test_closing_the_mesh_fails_all_subscriptions(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """When the connection is closed for good, subscribers get ConnectionFailed."""
    declare_background(mesh, name, "publisher", run_forever)
    await mesh.catalog()
    async with new_mesh() as other:
        targets = ({"agent": name}, {"channel": name}, {"subject": f"news.{name}"})
        readers = [await start_reading(other, other.subscribe(**each)) for each in targets]  # type: ignore[call-overload]
    async with asyncio.timeout(5):
        results = await asyncio.gather(*readers, return_exceptions=True)
    assert [ConnectionFailed] * 3 == [type(result) for result in results]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(HEADS, st.binary(max_size=30)), max_size=20))
def test_malformed_events_do_not_end_a_subscription_to_a_channel(
    url: str, junk: list[tuple[bytes, bytes]]
) -> None:
    """Whatever is published on a channel's subjects, the next valid event is received."""

    async def run() -> None:
        async with AgentMesh(url) as mesh:
            connection, channel = node_of(mesh).connection, f"junk{mesh.instance_id}"

            async def valid() -> AsyncGenerator[object, None]:
                async for event in mesh.subscribe(channel=channel, messages=True):
                    if event.agent.endswith(".valid"):
                        yield event.data

            reading = await start_reading(mesh, valid(), 1)
            for number, (head, body) in enumerate(junk):
                await connection.publish(f"mesh.agent.{channel}.{number}.events", body, head)
            await connection.publish(f"mesh.agent.{channel}.valid.events", b'"news"')
            assert ["news"] == await reading

    asyncio.run(run())
