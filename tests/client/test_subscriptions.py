"""Events: who hears what, until when, and that no stranger breaks a feed."""

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

BROKEN = MeshError("quota", "used up", details={"left": 0})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that is left waits only so long for what is on its way."""
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)


async def test_a_feed_of_one_agent_ends_with_it(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Every event in order until the publisher returns; also a second time, from another mesh."""
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    async with new_mesh() as other:
        feeds = [await start_reading(one, one.subscribe(agent=name)) for one in (mesh, other, other)]
        publisher.emit(*range(100), None)
        assert [list(range(100))] * 3 == [await feed for feed in feeds]


async def test_a_publishers_failure_is_raised(mesh: AgentMesh, name: str) -> None:
    """Its subscriber gets the events before it, then the error with its own code."""
    restart_soon(mesh)
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    got: list[int] = []

    async def follow() -> AsyncGenerator[int, None]:
        async for number in mesh.subscribe(agent=name):
            got.append(number)
            yield number

    feed = await start_reading(mesh, follow())
    publisher.emit(1, 2, BROKEN)
    with pytest.raises(MeshError) as caught:
        await feed
    error, expected = caught.value, ("quota", "used up", name, {"left": 0})
    assert ([1, 2], expected) == (got, (error.code, error.message, error.agent, error.details))


async def test_an_unknown_agent_is_not_found(mesh: AgentMesh, name: str) -> None:
    """Nobody waits for the events of a name that nobody has."""
    with pytest.raises(NotFound) as caught:
        await read(mesh.subscribe(agent=name, timeout=10))
    assert name == caught.value.agent


@pytest.mark.parametrize("owner", [True, False], ids=["own", "other"])
async def test_those_who_emit_nothing_are_refused(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str, owner: bool
) -> None:
    """The texts that tools match on, for streamers, responders and watchers."""
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


async def test_a_feed_of_a_channel_survives_its_agents(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """One ends, one fails, others are called meanwhile: the events of all the rest still come."""
    restart_soon(mesh)
    names = [name, f"{name}.a", f"{name}.b", f"{name}.deep.down.c", f"{name}x.stranger"]
    publishers = {one: Publisher(mesh, one) for one in names}
    serve(mesh, f"{name}.echo")
    await mesh.catalog()
    async with new_mesh() as other:
        feed = await start_reading(other, other.subscribe(channel=name, messages=True), 6)
        copies = await listen(mesh, subjects.errors(f"{name}.b"))
        publishers[f"{name}.a"].emit(1, None)
        publishers[f"{name}.b"].emit(2, BROKEN)
        publishers[f"{name}x.stranger"].emit(-1)
        await copies.get()
        assert {"text": "ok"} == await mesh.call(f"{name}.echo", {"text": "no event"})
        publishers[f"{name}.b"].emit(3)
        publishers[f"{name}.deep.down.c"].emit(4, 5)
        publishers[name].emit(6)
        events: list[MeshMessage[int]] = await feed
    assert {1, 2, 3, 4, 5, 6} == {event.data for event in events}
    agents = [(event.data, event.agent) for event in sorted(events, key=lambda event: event.data)]
    assert [
        (number, names[index]) for number, index in zip(range(1, 7), (1, 2, 2, 3, 3, 0), strict=True)
    ] == (agents)


async def test_messages_tell_where_they_come_from(mesh: AgentMesh, name: str) -> None:
    """With `messages=True` an event has its agent, subject, headers and data; others have no agent."""
    publisher = Publisher(mesh, name)
    await mesh.catalog()
    feed = await start_reading(mesh, mesh.subscribe(agent=name, messages=True), 1)
    publisher.emit(7)
    headers = {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mesh-Stream-Seq": "0", "X-Mesh-Stream-End": "false"}
    [event] = await feed
    assert (MeshMessage(f"mesh.agent.{name}.events", 7, headers), name) == (event, event.agent)
    feed = await start_reading(mesh, mesh.subscribe(subject=f"news.{name}.*", messages=True), 1)
    await mesh.publish(f"news.{name}.today", Text(text="x"))
    [message] = await feed
    assert ("", f"news.{name}.today", {"text": "x"}) == (message.agent, message.subject, message.data)


@pytest.mark.parametrize(
    ("wanted", "subject"),
    [("agent", "mesh.agent.{}.events"), ("channel", "mesh.agent.{}.>"), ("subject", "{}")],
)
async def test_silence_is_a_timeout(mesh: AgentMesh, name: str, wanted: str, subject: str) -> None:
    """No event in time is MeshTimeout; requests to the channel's agents and other noise are no events."""
    declare_background(mesh, name, "publisher", run_forever)
    serve(mesh, f"{name}.echo")
    await mesh.catalog()
    feed = await start_reading(mesh, mesh.subscribe(**{wanted: name}, timeout=0.3))  # type: ignore[call-overload]
    async with asyncio.timeout(5):
        while not feed.done():
            await mesh.call(f"{name}.echo", {"text": "no event"})
            await asyncio.sleep(0.02)
    with pytest.raises(MeshTimeout) as caught:
        await feed
    assert f"No message on {subject.format(name)} within 0.3s" == caught.value.message


@pytest.mark.parametrize("bound", [{"_MAX_BUFFERED": 5}, {"_MAX_BYTES": 50}], ids=["messages", "bytes"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["a-burst", "more-comes-while-it-reads"])
async def test_a_slow_subscriber_is_told_so(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, goes_on: bool, bound: dict[str, int]
) -> None:
    """Who falls too far behind gets all until the first one that is lost, then Overloaded."""
    for limit, value in bound.items():
        monkeypatch.setattr(f"openagentmesh.client.subscriptions.{limit}", value)
    got: list[dict[str, str]] = []
    async with aclosing(mesh.subscribe(subject=name)) as feed:
        first = asyncio.ensure_future(anext(feed))
        while not node_of(mesh).events._subscriptions:
            await asyncio.sleep(0)
        await mesh.publish(name, Text(text="0"))
        got.append(await first)
        for number in range(1, 10):
            await mesh.publish(name, Text(text=str(number)))
        await flush(mesh)
        with pytest.raises(Overloaded, match="behind"):
            while len(got) < 20:
                got.append(await anext(feed))
                if goes_on:
                    await mesh.publish(name, Text(text=str(len(got) + 8)))
                    await flush(mesh)
    assert [{"text": str(number)} for number in range(6)] == got


@pytest.mark.parametrize("how", ["break", "error", "cancel", "timeout"])
async def test_leaving_the_loop_unsubscribes(mesh: AgentMesh, name: str, how: str) -> None:
    """However a subscriber leaves, the server has nobody on the subject afterwards."""
    subject = f"news.{name}"

    async def follow() -> None:
        async for _ in mesh.subscribe(subject=subject, timeout=0.2 if how == "timeout" else None):
            if how == "break":
                break
            if how == "error":
                raise ZeroDivisionError

    following = asyncio.create_task(follow())

    async def listened() -> bool:
        return await is_subscribed(mesh, subject)

    async def silent() -> bool:
        return not await is_subscribed(mesh, subject)

    await until(listened)
    await mesh.publish(subject, "news")
    if how == "cancel":
        following.cancel()
    await asyncio.wait([following], timeout=10)
    assert following.done()
    if not following.cancelled():
        expected = {"error": ZeroDivisionError, "timeout": MeshTimeout}.get(how, type(None))
        assert isinstance(following.exception(), expected)
    await until(silent)
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
async def test_what_is_published_arrives(
    mesh: AgentMesh, name: str, payload: Text | str | bytes, kind: str, body: bytes
) -> None:
    """Each kind of payload has its content type on the wire and is itself again for a subscriber."""
    raw = await listen(mesh, name)
    feed = await start_reading(mesh, mesh.subscribe(subject=name, messages=True), 1)
    await mesh.publish(name, payload, headers={"X-Mine": "é: yes"})
    [message] = await feed
    data = payload.model_dump() if isinstance(payload, Text) else payload
    assert (data, "é: yes") == (message.data, message.headers["X-Mine"])
    on_wire, own = await raw.get(), {"X-Mesh-Instance-Id": mesh.instance_id, "X-Mine": "é: yes"}
    assert (body, own | {"X-Mesh-Content-Type": kind}) == (on_wire.body, read_headers(on_wire.head))


async def test_nothing_can_be_published_on_a_bad_subject(mesh: AgentMesh) -> None:
    """Wildcards, blanks and empty words are a ValueError here, and never reach the server."""
    for bad in ("", " ", "a b", "a..b", ".a", "a.", "*", "a.*", ">", "a*", "a\r\nPUB x", "a\t", "x" * 5000):
        with pytest.raises(ValueError, match="wildcards"):
            await mesh.publish(bad, "x")
    with pytest.raises(InvalidInput, match="line break"):
        await mesh.publish("good", "x", headers={"X-Mine": "a\r\nX-Mesh-Status: error"})
    await flush(mesh)
    assert reconnects(mesh) == 0


async def test_a_subscriber_says_whose_events(mesh: AgentMesh, name: str) -> None:
    """Nobody's, two kinds at once, or a channel that is none: ValueError."""
    for wrong in ({}, {"agent": name, "subject": name}, {"channel": "a.*"}, {"channel": "a b"}):
        with pytest.raises(ValueError, match=r"agent|channel"):
            await read(mesh.subscribe(**wrong, timeout=5))  # type: ignore[call-overload]


async def test_what_is_no_json_arrives_as_bytes(mesh: AgentMesh, name: str) -> None:
    """A stranger's body that cannot be read is handed on as it is."""
    strange: list[tuple[dict[str, str], bytes]] = [
        ({}, b"{nonsense"),
        ({"X-Mesh-Content-Type": "application/json"}, b"\xff"),
        ({"X-Mesh-Content-Type": "text/plain"}, b"\xff\xfe"),
        ({"X-Mesh-Content-Type": "application/octet-stream"}, b"[1]"),
        ({"X-Mesh-Stream-Seq": "x", "X-Mesh-Stream-End": "perhaps"}, b"[" * 5000),
    ]
    feed = await start_reading(mesh, mesh.subscribe(subject=name), len(strange))
    for headers, body in strange:
        await node_of(mesh).connection.publish(name, body, write_headers(headers))
    assert [body for _, body in strange] == await feed


async def test_a_feed_outlives_a_restart_of_the_server() -> None:
    """While the server is away publisher and subscribers wait; afterwards the same run is heard."""
    server = EmbeddedServer()
    await server.start()
    async with AgentMesh(server.url) as provider, AgentMesh(server.url) as listener:
        publisher = Publisher(provider, "news.clock")
        await provider.catalog()
        wanted = ({"agent": "news.clock"}, {"channel": "news"}, {"subject": "mesh.agent.news.*.events"})
        feeds = [await start_reading(listener, listener.subscribe(**one), 2) for one in wanted]  # type: ignore[call-overload]
        publisher.emit(1)
        await flush(listener)
        await server.stop()
        publisher.emit(*range(2, 50))
        again = EmbeddedServer(server.port)
        await again.start()

        async def back() -> bool:
            return bool(reconnects(listener) and reconnects(provider))

        await until(back)
        await flush(listener)
        publisher.emit(100)
        for feed in feeds:
            found = await feed
            assert sorted(found) == found
            assert found[-1] > 1
        run = background_of(provider, "news.clock")
        assert ("running", 0, "") == (run.state, run.restarts, run.error)
    await again.stop()


async def test_leaving_the_mesh_ends_every_feed(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """When the connection closes for good nobody waits for ever: ConnectionFailed."""
    declare_background(mesh, name, "publisher", run_forever)
    await mesh.catalog()
    async with new_mesh() as other:
        wanted = ({"agent": name}, {"channel": name}, {"subject": f"news.{name}"})
        feeds = [await start_reading(other, other.subscribe(**one)) for one in wanted]  # type: ignore[call-overload]
    async with asyncio.timeout(5):
        results = await asyncio.gather(*feeds, return_exceptions=True)
    assert [ConnectionFailed] * 3 == [type(result) for result in results]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(HEADS, st.binary(max_size=30)), max_size=20))
def test_strangers_break_no_feed_of_a_channel(url: str, junk: list[tuple[bytes, bytes]]) -> None:
    """Whatever comes on a channel's subjects, the next event is heard."""

    async def run() -> None:
        async with AgentMesh(url) as mesh:
            connection, channel = node_of(mesh).connection, f"junk{mesh.instance_id}"

            async def good() -> AsyncGenerator[object, None]:
                async for event in mesh.subscribe(channel=channel, messages=True):
                    if event.agent.endswith(".good"):
                        yield event.data

            feed = await start_reading(mesh, good(), 1)
            for number, (head, body) in enumerate(junk):
                await connection.publish(f"mesh.agent.{channel}.{number}.events", body, head)
            await connection.publish(f"mesh.agent.{channel}.good.events", b'"news"')
            assert ["news"] == await feed

    asyncio.run(run())
