"""Gates: on and off by a key or a message, without leaving the catalog."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, Cancelled, Condition, MeshError, MeshMessage, NotAvailable
from openagentmesh.protocol import codec, subjects
from openagentmesh.protocol.errors import InvalidAgent
from openagentmesh.registry import presence
from openagentmesh.state.kv import KV
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import flush, node_of, reconnects
from tests.support.servers import restartable


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)


def gated(mesh: AgentMesh, name: str, condition: Condition) -> None:
    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def agent() -> str:
        return mesh.instance_id


async def events_of(mesh: AgentMesh, name: str) -> asyncio.Queue[str]:
    """The agent's log events: `info agent_activated`."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    def receive(message: Message) -> None:
        heard.put_nowait("{level} {event}".format_map(json.loads(message.body)))

    await node_of(mesh).connection.subscribe(subjects.logs(name), receive)
    await flush(mesh)
    return heard


async def told(heard: asyncio.Queue[str], event: str) -> None:
    async with asyncio.timeout(20):
        while await heard.get() != f"info {event}":
            pass


def is_open(mesh: AgentMesh, name: str) -> bool:
    route = node_of(mesh).router.get(name)
    assert route is not None
    assert route.gate is not None
    return route.gate.is_open


async def wait_served(mesh: AgentMesh, name: str, *, open_: bool) -> None:
    async with asyncio.timeout(5):
        while is_open(mesh, name) != open_:
            await asyncio.sleep(0.005)


async def test_a_key_turns_an_agent_on_and_off(mesh: AgentMesh, name: str) -> None:
    """Off it is not available, though in catalog, registry and record; on it answers; both are told."""
    heard = await events_of(mesh, name)
    gated(mesh, name, mesh.kv_condition(f"{name}.mode", lambda mode: mode == "on"))
    await mesh.catalog()
    for _ in range(2):
        for ask in (mesh.call, mesh.send):
            with pytest.raises(NotAvailable):
                await ask(name)
        assert name in {entry.name for entry in await mesh.catalog()}
        assert name == (await mesh.contract(name)).name
        assert name in (await presence.read_records(node_of(mesh).buckets))[mesh.instance_id].agents
        await mesh.kv.put(f"{name}.mode", "on")
        await told(heard, "agent_activated")
        assert mesh.instance_id == await mesh.call(name)
        await mesh.kv.put(f"{name}.mode", "off")
        await told(heard, "agent_deactivated")


async def test_a_message_turns_an_agent_on_and_off(mesh: AgentMesh, name: str) -> None:
    """The predicate is given what a subscriber would get; what it cannot judge changes nothing."""
    gated(mesh, name, mesh.subject_condition(f"{name}.*", lambda status: status["open"]))
    await mesh.catalog()
    assert not is_open(mesh, name)
    connection = node_of(mesh).connection
    await connection.publish(f"{name}.status", b'{"open": true}')
    await wait_served(mesh, name, open_=True)
    await connection.publish(f"{name}.status", b"junk")
    await connection.publish(f"{name}.status", b"")
    await connection.publish(f"{name}.status", b"{}")
    await connection.flush()
    assert mesh.instance_id == await mesh.call(name)
    await connection.publish(f"{name}.status", b'{"open": false}')
    await wait_served(mesh, name, open_=False)


@pytest.mark.parametrize("initial", [True, False])
async def test_before_anything_is_known_it_is_as_it_begins(
    mesh: AgentMesh, name: str, *, initial: bool
) -> None:
    """No key and no message yet: `initial`; a deleted key is no key."""
    gated(mesh, f"{name}.a", mesh.kv_condition(f"{name}.k", lambda text: text == "on", initial=initial))
    gated(mesh, f"{name}.b", mesh.subject_condition(name, bool, initial=initial))
    await mesh.catalog()
    assert (initial, initial) == (is_open(mesh, f"{name}.a"), is_open(mesh, f"{name}.b"))
    await mesh.kv.put(f"{name}.k", "off" if initial else "on")
    await wait_served(mesh, f"{name}.a", open_=not initial)
    await mesh.kv.delete(f"{name}.k")
    await wait_served(mesh, f"{name}.a", open_=initial)


async def test_what_is_on_at_the_start_is_callable_at_once(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The gate is looked at before `async with mesh` has entered."""
    await mesh.kv.put(name, "on")
    provider = new_mesh()
    gated(provider, name, provider.kv_condition(name, lambda text: text == "on"))
    async with provider:
        assert provider.instance_id == await mesh.call(name)


async def test_what_is_off_here_is_served_there(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """An instance that is off leaves the requests to the others."""
    other = new_mesh()
    gated(mesh, name, mesh.kv_condition(f"{name}.here", bool))
    gated(other, name, other.kv_condition(f"{name}.there", bool, initial=True))
    async with other:
        await mesh.catalog()
        assert {other.instance_id} == {await mesh.call(name) for _ in range(20)}


@pytest.mark.parametrize("patient", [True, False], ids=["finished", "cut"])
async def test_what_runs_gets_time_when_it_is_turned_off(
    mesh: AgentMesh, name: str, *, patient: bool
) -> None:
    """It finishes within `drain_timeout`, and is cancelled and answered after it."""
    started, go = asyncio.Event(), asyncio.Event()
    condition = mesh.kv_condition(name, lambda text: text == "on", drain_timeout=20 if patient else 0.05)

    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def slow() -> str:
        started.set()
        await go.wait()
        return "done"

    await mesh.kv.put(name, "on")
    await mesh.catalog()
    call = asyncio.create_task(mesh.call(name))
    await started.wait()
    await mesh.kv.put(name, "off")
    await wait_served(mesh, name, open_=False)
    if patient:
        go.set()
        assert "done" == await call
    else:
        with pytest.raises(Cancelled):
            await call


async def test_a_gate_holds_for_everything_an_agent_does(mesh: AgentMesh, name: str) -> None:
    """Publishers, watchers and sources run only while it is on, and begin again when it is on again."""
    runs: dict[str, int] = {"publisher": 0, "watcher": 0}
    ended: asyncio.Queue[str] = asyncio.Queue()
    got: asyncio.Queue[int] = asyncio.Queue()
    condition = mesh.kv_condition(name, lambda text: text == "on")

    @mesh.agent(AgentSpec(name=f"{name}.publisher"), active_when=condition)
    async def publisher() -> AsyncIterator[int]:
        runs["publisher"] += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.put_nowait("publisher")

    @mesh.agent(AgentSpec(name=f"{name}.watcher"), active_when=condition)
    async def watcher() -> None:
        runs["watcher"] += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended.put_nowait("watcher")

    @mesh.agent(
        AgentSpec(name=f"{name}.driven"), sources=[mesh.subject_source(f"{name}.in")], active_when=condition
    )
    async def driven(message: MeshMessage[int]) -> None:
        got.put_nowait(message.data)

    heard = await events_of(mesh, f"{name}.driven")
    await mesh.catalog()
    await node_of(mesh).connection.publish(f"{name}.in", b"0")
    for number in (1, 2):
        await mesh.kv.put(name, "on")
        await told(heard, "agent_activated")
        await node_of(mesh).connection.publish(f"{name}.in", str(number).encode())
        async with asyncio.timeout(20):
            assert number == await got.get()
            while set(runs.values()) != {number}:
                await asyncio.sleep(0.005)
        await mesh.kv.put(name, "off")
        await told(heard, "agent_deactivated")
        async with asyncio.timeout(20):
            assert {"publisher", "watcher"} == {await ended.get(), await ended.get()}
        await node_of(mesh).connection.publish(f"{name}.in", b"9")
        await flush(mesh)
    assert got.empty()


async def test_after_a_burst_of_changes_the_last_one_holds(mesh: AgentMesh, name: str) -> None:
    """However fast the key changes, the agent ends up as it says."""
    judged: set[str] = set()

    def on(text: str) -> bool:
        judged.add(text)
        return text.startswith("on")

    gated(mesh, name, mesh.kv_condition(name, on))
    await mesh.catalog()
    for last in ("on 1", "off 2", "on 3"):
        for _ in range(10):
            await mesh.kv.put(name, "on")
            await mesh.kv.put(name, "off")
        await mesh.kv.put(name, last)
        async with asyncio.timeout(20):
            while last not in judged:
                await asyncio.sleep(0.005)
        await wait_served(mesh, name, open_=last.startswith("on"))
    # It may still be closing for the last "off", and is on after that.
    assert mesh.instance_id == await settled_call(mesh, name)
    assert is_open(mesh, name)


async def test_a_predicate_that_raises_changes_nothing(
    mesh: AgentMesh, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the agent; the next value counts again."""

    def strict(text: str) -> bool:
        return {"on": True, "off": False}[text]

    gated(mesh, name, mesh.kv_condition(name, strict))
    await mesh.kv.put(name, "on")
    await mesh.catalog()
    await mesh.kv.put(name, "neither")
    async with asyncio.timeout(20):
        while name not in caplog.text:
            await asyncio.sleep(0.005)
    assert mesh.instance_id == await mesh.call(name)
    await mesh.kv.put(name, "off")
    await wait_served(mesh, name, open_=False)


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store thrown away"])
async def test_a_gate_is_right_again_after_a_restart(name: str, tmp_path: Path, *, kept: bool) -> None:
    """It follows the keys on the new server, whatever became of them while it was away."""

    async def meanwhile(kv: KV) -> None:
        await kv.put(f"{name}.b", "off")
        await kv.put(f"{name}.c", "on")
        await kv.delete(f"{name}.d")

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        for key in ("a", "b", "c", "d"):
            gated(mesh, f"{name}.{key}", mesh.kv_condition(f"{name}.{key}", lambda text: text == "on"))
            await mesh.kv.put(f"{name}.{key}", "off" if key == "c" else "on")
            await mesh.catalog()
            await wait_served(mesh, f"{name}.{key}", open_=key != "c")
        await restart(meanwhile if kept else None)
        for key in ("b", "d", "c", "a"):
            await wait_served(mesh, f"{name}.{key}", open_=kept and key in {"a", "c"})
        for key in ("a", "b"):
            await mesh.kv.put(f"{name}.{key}", "on")
            assert mesh.instance_id == await settled_call(mesh, f"{name}.{key}")


async def settled_call(mesh: AgentMesh, name: str) -> Any:
    await mesh.catalog()
    await wait_served(mesh, name, open_=True)
    async with asyncio.timeout(20):
        while True:
            try:
                return await mesh.call(name)
            except MeshError:
                await asyncio.sleep(0.02)


async def test_swapping_a_gated_agent_keeps_one_gate(mesh: AgentMesh, name: str) -> None:
    """Declared again with another condition, the old one says nothing any more."""
    gated(mesh, name, mesh.kv_condition(f"{name}.old", lambda text: text == "on"))
    await mesh.kv.put(f"{name}.old", "on")
    await mesh.catalog()
    assert mesh.instance_id == await mesh.call(name)
    gated(mesh, name, mesh.kv_condition(f"{name}.new", lambda text: text == "on"))
    with pytest.raises(NotAvailable):
        await mesh.call(name)
    await mesh.kv.put(f"{name}.old", "off")
    await mesh.kv.put(f"{name}.old", "on")
    await mesh.kv.put(f"{name}.new", "on")
    await wait_served(mesh, name, open_=True)
    assert mesh.instance_id == await mesh.call(name)


async def test_what_a_subject_said_holds_for_the_next_version(mesh: AgentMesh, name: str) -> None:
    """Declared again it is as its own predicate makes of the last message, not as it began."""
    gated(mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text == "on"))
    await mesh.catalog()
    await mesh.publish(f"{name}.switch", "on")
    await wait_served(mesh, name, open_=True)
    for number in range(2):
        gated(mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text in {"on", "yes"}))
        assert mesh.instance_id == await mesh.call(name), number
    gated(mesh, name, mesh.subject_condition(f"{name}.switch", lambda text: text != "on"))
    with pytest.raises(NotAvailable):
        await mesh.call(name)


async def test_a_new_version_waits_until_the_old_one_is_off(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declared again while it is being turned off, it is off, not half of it."""
    key, heard = f"{name}.on", await events_of(mesh, name)
    await mesh.kv.put(key, "on")
    gated(mesh, name, mesh.kv_condition(key, lambda text: text == "on"))
    assert mesh.instance_id == await mesh.call(name)
    leaving, go_on = asyncio.Event(), asyncio.Event()
    leave = node_of(mesh).connection.drain

    async def slowly(*sids: int) -> None:
        leaving.set()
        await go_on.wait()
        await leave(*sids)

    monkeypatch.setattr(node_of(mesh).connection, "drain", slowly)
    await mesh.kv.put(key, "off")
    await asyncio.wait_for(leaving.wait(), 10)
    gated(mesh, name, mesh.kv_condition(key, lambda text: text == "on"))
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    await mesh.catalog()
    await told(heard, "agent_deactivated")
    assert not is_open(mesh, name)
    with pytest.raises(NotAvailable):
        await mesh.call(name)


async def test_what_is_turned_on_again_serves_at_once(mesh: AgentMesh, name: str) -> None:
    """It does not wait for what still runs from before; that finishes too."""
    started, go = asyncio.Event(), asyncio.Event()

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda text: text == "on"))
    async def wait(text: str) -> str:
        if text == "slow":
            started.set()
            await go.wait()
        return text

    await mesh.kv.put(name, "on")
    await mesh.catalog()
    slow = asyncio.create_task(mesh.call(name, "slow"))
    await started.wait()
    await mesh.kv.put(name, "off")
    await wait_served(mesh, name, open_=False)
    await mesh.kv.put(name, "on")
    try:
        await wait_served(mesh, name, open_=True)
        assert "quick" == await mesh.call(name, "quick")
    finally:
        go.set()
        assert "slow" == await slow


async def test_a_publisher_that_is_turned_off_ends_its_events(mesh: AgentMesh, name: str) -> None:
    """Its subscribers get the end frame with the count; on again it counts from 0."""
    frames: asyncio.Queue[codec.Reply] = asyncio.Queue()
    receive = lambda message: frames.put_nowait(codec.decode_reply(message.head, message.body))  # noqa: E731
    await node_of(mesh).connection.subscribe(subjects.events(name), receive)

    @mesh.agent(AgentSpec(name=name), active_when=mesh.kv_condition(name, lambda text: text == "on"))
    async def publisher() -> AsyncIterator[int]:
        yield 7
        await asyncio.Event().wait()

    await mesh.catalog()
    for _ in range(2):
        await mesh.kv.put(name, "on")
        frame = await asyncio.wait_for(frames.get(), 10)
        assert (b"7", 0, False) == (frame.body, frame.seq, frame.end)
        await mesh.kv.put(name, "off")
        frame = await asyncio.wait_for(frames.get(), 10)
        assert (b"", 1, True, False) == (frame.body, frame.seq, frame.end, frame.error)
        await wait_served(mesh, name, open_=False)


@pytest.mark.parametrize("kind", ["key", "subject"])
async def test_a_predicate_may_raise_anything(mesh: AgentMesh, name: str, kind: str) -> None:
    """A cancellation that leaks from it ends neither the following nor the connection."""

    def strict(text: str) -> bool:
        if text == "neither":
            raise asyncio.CancelledError
        return text == "on"

    make, tell = (mesh.kv_condition, mesh.kv.put) if kind == "key" else (mesh.subject_condition, mesh.publish)
    gated(mesh, name, make(name, strict))
    await mesh.catalog()
    for text, open_ in (("on", True), ("neither", True), ("off", False), ("neither", False), ("on", True)):
        await tell(name, text)
        await wait_served(mesh, name, open_=open_)
    assert 0 == reconnects(mesh)


@pytest.mark.parametrize("word", ["", "a b", "a..b", ".a", "a.>.b", "x" * 5000, None, 7])
def test_keys_and_subjects_of_conditions_are_checked(word: Any) -> None:
    """What cannot be one is refused where it is declared, in words; a key condition is of one key."""
    mesh = AgentMesh()
    for make in (mesh.kv_condition, mesh.subject_condition):
        with pytest.raises(InvalidAgent, match="is invalid"):
            make(word, bool)
    with pytest.raises(InvalidAgent, match="is invalid"):
        mesh.kv_condition("a.*", bool)


@pytest.mark.parametrize(
    ("part", "wrong"), [("predicate", "on"), ("drain_timeout", -1), ("drain_timeout", "30")]
)
def test_what_is_no_condition_is_refused(part: str, wrong: Any) -> None:
    """What would fail when the mesh connects or the gate moves fails at its declaration."""
    for make in (AgentMesh().kv_condition, AgentMesh().subject_condition):
        with pytest.raises(InvalidAgent, match=part):
            make("a", **{"predicate": bool, part: wrong})
    with pytest.raises(InvalidAgent, match="active_when"):
        gated(AgentMesh(), "a", wrong)
