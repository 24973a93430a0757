"""Sources: messages and changes of the shared state that trigger agents."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    ConnectionFailed,
    InvalidAgent,
    InvocationMismatch,
    KVEntry,
    KVSource,
    MeshError,
    MeshMessage,
    SubjectSource,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import read_headers
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.state.kv import KV
from openagentmesh.transport.nats_client import Message
from pydantic import BaseModel, Field, model_validator

from tests.support.meshes import declare_driven, errors_of, flush, node_of, sources_started, take
from tests.support.servers import restartable

Word = Annotated[str, Field(max_length=9)]


class Order(BaseModel):
    item: str


class Strict(BaseModel):
    """A model whose validator fails on None."""

    item: str

    @model_validator(mode="before")
    @classmethod
    def stripped(cls, value: dict[str, str]) -> dict[str, str]:
        return {"item": value["item"].strip()}


@pytest.mark.parametrize(
    ("hint", "payload", "expected"),
    [
        (Order, Order(item="tea"), Order(item="tea")),
        (dict[str, str], Order(item="tea"), {"item": "tea"}),
        (str, "plain text", "plain text"),
        (str | None, "plain text", "plain text"),
        (Word, "word", "word"),
        (Any, "plain text", "plain text"),
        (Any, Order(item="tea"), {"item": "tea"}),
        (bytes, b"\x00\xff", b"\x00\xff"),
        (None, "any", None),
    ],
    ids=["model", "dict", "text", "text or none", "short text", "any text", "any JSON", "bytes", "nothing"],
)
async def test_each_message_triggers_the_handler(
    mesh: AgentMesh, name: str, hint: Any, payload: Order | str | bytes, expected: object
) -> None:
    """The handler gets the data of each message on the subject as its declared type."""
    inputs = declare_driven(mesh, name, hint, mesh.subject_source(f"{name}.in.*"))
    await mesh.catalog()
    await mesh.publish(f"{name}.in.a", payload)
    await mesh.publish(f"{name}.other", payload)
    await mesh.publish(f"{name}.in.b", payload)
    assert [expected, expected] == await take(inputs, 2)
    assert inputs.empty()


async def test_a_mesh_message_has_subject_and_headers(mesh: AgentMesh, name: str) -> None:
    """A handler of `MeshMessage[Model]` gets data, subject and headers."""
    inputs = declare_driven(mesh, name, MeshMessage[Order], mesh.subject_source(f"{name}.*"))
    await mesh.catalog()
    await mesh.publish(f"{name}.a", Order(item="tea"), headers={"X-Custom": "yes"})
    [message] = await take(inputs)
    assert (f"{name}.a", Order(item="tea")) == (message.subject, message.data)
    assert "yes" == message.headers["X-Custom"]


async def test_a_queue_group_distributes_messages(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """With a queue group one mesh gets each message, without one all meshes get it."""
    other = new_mesh()
    shared = [
        declare_driven(m, f"{name}.a", str, m.subject_source(name, queue_group="g")) for m in (mesh, other)
    ]
    broadcast = [declare_driven(m, f"{name}.b", str, m.subject_source(name)) for m in (mesh, other)]
    async with other:
        await other.catalog()
        await mesh.catalog()
        for number in range(40):
            await mesh.publish(name, str(number))
        for inputs in broadcast:
            assert [str(n) for n in range(40)] == await take(inputs, 40)
        await flush(mesh)
        await flush(other)
        assert 40 == sum(inputs.qsize() for inputs in shared)


async def test_a_message_with_a_reply_subject_is_answered(mesh: AgentMesh, name: str) -> None:
    """The reply is the result of the handler."""

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> int:
        return message.data * 2

    await mesh.catalog()
    answer = await node_of(mesh).inbox.request(f"{name}.in", b"21", timeout=10)
    assert b"42" == answer.body
    assert "ok" == read_headers(answer.head)[subjects.STATUS]


async def test_a_failure_is_published_and_the_next_message_is_handled(mesh: AgentMesh, name: str) -> None:
    """Invalid input and exceptions are published on `mesh.errors`, as for requests."""
    handled: asyncio.Queue[str] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[Order]) -> None:
        if message.data.item == "bad":
            raise ValueError("cannot pack that")
        if message.data.item == "more":
            raise MeshError("quota", "used up", details={"left": 0})
        handled.put_nowait(message.data.item)

    errors, events = await errors_of(mesh, name), asyncio.Queue[Message]()
    await node_of(mesh).connection.subscribe(subjects.logs(name), events.put_nowait)
    for payload in ("no order", Order(item="bad"), b"", Order(item="more"), Order(item="good")):
        await mesh.publish(f"{name}.in", payload)
    assert ["good"] == await take(handled)
    envelopes = [json.loads(message.body) for message in await take(errors, 4)]
    codes = ["handler_error", "invalid_input", "invalid_input", "quota"]
    assert codes == sorted(envelope["code"] for envelope in envelopes)
    assert [name] * 4 == [envelope["agent"] for envelope in envelopes]
    assert {"left": 0} in [envelope["details"] for envelope in envelopes]
    logged = [json.loads(message.body) for message in await take(events, 4)]
    kinds = ["validation_error" if code == "invalid_input" else "request_failed" for code in codes]
    assert sorted(zip(kinds, codes, strict=True)) == sorted((e["event"], e["data"]["code"]) for e in logged)


async def test_a_responder_with_sources_answers_requests(mesh: AgentMesh, name: str) -> None:
    """An agent that takes a plain input is called and triggered."""
    inputs = declare_driven(mesh, name, Order, mesh.subject_source(f"{name}.in"))
    assert {} == await mesh.call(name, Order(item="called"))
    await mesh.publish(f"{name}.in", Order(item="sent"))
    assert ["called", "sent"] == [order.item for order in await take(inputs, 2)]


async def test_a_driven_agent_cannot_be_called(mesh: AgentMesh, name: str) -> None:
    """It is not invocable in the catalog; a call raises InvocationMismatch with the protocol's message."""
    declare_driven(mesh, name, MeshMessage[Order], mesh.subject_source(f"{name}.in"))
    [entry] = await mesh.catalog(channel=name)
    assert (False, False) == (entry.invocable, entry.streaming)
    with pytest.raises(
        InvocationMismatch, match=f"^Agent '{name}' is a background task and cannot be called$"
    ):
        await mesh.call(name, {})


async def test_changes_of_keys_are_handled_in_order_one_at_a_time(mesh: AgentMesh, name: str) -> None:
    """Existing keys come first, then each change; the next one waits until the handler has finished."""
    running, maximum = 0, 0
    inputs: asyncio.Queue[KVEntry[str | None]] = asyncio.Queue()
    await mesh.kv.put(f"{name}.a", "existing")

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.>")])
    async def handler(entry: KVEntry[str | None]) -> None:
        nonlocal running, maximum
        running += 1
        maximum = max(maximum, running)
        await asyncio.sleep(0.002)
        running -= 1
        inputs.put_nowait(entry)

    await mesh.catalog()
    assert ["existing"] == [entry.value for entry in await take(inputs)]
    for number in range(10):
        await mesh.kv.put(f"{name}.k{number}", str(number))
    await mesh.kv.delete(f"{name}.a")
    await mesh.kv.put(f"{name}x.other", "no match")
    entries = await take(inputs, 11)
    assert [*map(str, range(10)), None] == [entry.value for entry in entries]
    assert f"{name}.a" == entries[-1].key
    assert sorted(entry.revision for entry in entries) == [entry.revision for entry in entries]
    assert (1, True) == (maximum, inputs.empty())


@pytest.mark.parametrize("hint", [Order, KVEntry[Order], Strict])
async def test_deletions_are_not_delivered_to_handlers_of_values(
    mesh: AgentMesh, name: str, hint: Any
) -> None:
    """A handler whose type does not accept None gets no deletion, but the next value."""
    await mesh.kv.put_model(f"{name}.a", Order(item="1"))
    inputs = declare_driven(mesh, name, hint, mesh.kv_source(f"{name}.*", on_init="skip"))
    await mesh.catalog()
    await asyncio.wait_for(sources_started(mesh, name), 10)
    await mesh.kv.delete(f"{name}.a")
    await mesh.kv.put_model(f"{name}.a", Order(item="2"))
    [value] = await take(inputs)
    assert "2" == (value.value if isinstance(value, KVEntry) else value).item


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store removed"])
async def test_no_change_is_lost_or_repeated_by_a_restart_of_the_server(
    name: str, tmp_path: Path, *, kept: bool
) -> None:
    """Changes made while the mesh was disconnected are delivered afterwards, and none twice."""

    async def meanwhile(kv: KV) -> None:
        await kv.put("k.c", "2")
        await kv.delete("k.b")
        await kv.put("k.d", "2")

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        inputs = declare_driven(mesh, name, KVEntry[str | None], mesh.kv_source("k.*"))
        for key in ("k.a", "k.b", "k.c"):
            await mesh.kv.put(key, "1")
        assert ["1", "1", "1"] == [entry.value for entry in await take(inputs, 3)]
        await restart(meanwhile if kept else None)
        # A key that a new server does not have counts as deleted.
        expected = {"k.c": "2", "k.b": None, "k.d": "2"} if kept else dict.fromkeys(("k.a", "k.b", "k.c"))
        assert expected == {entry.key: entry.value for entry in await take(inputs, 3)}
        await mesh.kv.put("k.b", "3")
        await mesh.kv.put("k.e", "3")
        assert [("k.b", "3"), ("k.e", "3")] == [(e.key, e.value) for e in await take(inputs, 2)]
        assert inputs.empty()


async def streamer(order: Order) -> AsyncIterator[int]:
    yield 1


async def entry_handler(entry: KVEntry[str]) -> None:
    return


async def message_handler(message: MeshMessage[str]) -> None:
    return


@pytest.mark.parametrize(
    ("handler", "sources", "problem"),
    [
        (streamer, [SubjectSource("a")], "is not sent anywhere"),
        (entry_handler, [SubjectSource("a")], "takes entry"),
        (message_handler, [KVSource("a")], "takes message"),
        (message_handler, [], "has none"),
        (message_handler, SubjectSource("a"), "source"),
        (message_handler, ["a"], "driven by"),
    ],
    ids=["streamer", "entry of a subject", "message of a key", "no source", "not a list", "not a source"],
)
def test_a_handler_that_does_not_fit_its_sources_is_rejected(
    handler: Callable[..., Any], sources: Any, problem: str
) -> None:
    """The error at its declaration contains the problem and the file."""
    with pytest.raises(InvalidAgent, match=problem) as caught:
        AgentMesh().agent(AgentSpec(name="a"), sources=sources)(handler)
    assert __file__ in str(caught.value)


@pytest.mark.parametrize("subject", ["", "a b", "a..b", "a.>.b", ".a", "x" * 5000, 7, b"a"])
def test_invalid_sources_are_rejected(subject: Any) -> None:
    """An invalid subject, pattern, queue group or `on_init` raises InvalidAgent."""
    mesh = AgentMesh()
    for make in (mesh.subject_source, mesh.kv_source):
        with pytest.raises(InvalidAgent, match="is invalid"):
            make(subject)
    with pytest.raises(InvalidAgent, match="queue group"):
        mesh.subject_source("a", queue_group=subject)
    with pytest.raises(InvalidAgent, match="'replay' or 'skip'"):
        mesh.kv_source("a", on_init=subject)


async def test_invalid_utf8_for_a_text_is_invalid_input(mesh: AgentMesh, name: str) -> None:
    """Bytes that are not UTF-8 are not passed to a handler of texts, from either kind of source."""
    inputs = declare_driven(mesh, name, str, mesh.kv_source(f"{name}.*"), mesh.subject_source(f"{name}.in"))
    errors = await errors_of(mesh, name)
    await mesh.kv.put(f"{name}.a", b"\xff")
    await mesh.publish(f"{name}.in", b"\xff")
    assert ["invalid_input"] * 2 == [json.loads(m.body)["code"] for m in await take(errors, 2)]
    assert inputs.empty()


@pytest.mark.parametrize("is_interrupted", [False, True], ids=["connected", "interrupted"])
async def test_existing_keys_can_be_skipped(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, *, is_interrupted: bool
) -> None:
    """With `on_init="skip"` only changes are delivered, also after the first watch has failed."""
    await mesh.kv.put(f"{name}.a", "existing")
    buckets, failed = node_of(mesh).buckets, asyncio.Event()
    watch = buckets.watch

    async def fail() -> AsyncIterator[Any]:
        failed.set()
        raise ConnectionFailed("The server is unreachable.")
        yield

    def fail_once(bucket: str, keys: str = ">") -> AsyncIterator[Any]:
        return watch(bucket, keys) if bucket != CONTEXT_BUCKET or failed.is_set() else fail()

    if is_interrupted:
        monkeypatch.setattr(buckets, "watch", fail_once)
    inputs = declare_driven(mesh, name, KVEntry[str], mesh.kv_source(f"{name}.*", on_init="skip"))
    await mesh.catalog()
    await asyncio.wait_for(sources_started(mesh, name), 10)
    await mesh.kv.put(f"{name}.b", "new")
    assert ["new"] == [entry.value for entry in await take(inputs)]


async def test_a_source_on_request_subjects_does_not_disturb_a_stream(mesh: AgentMesh, name: str) -> None:
    """Its failure on another agent's request is published on `mesh.errors`, and not sent to the caller."""
    inputs = declare_driven(mesh, f"{name}.audit", Order, mesh.subject_source(f"mesh.agent.{name}.>"))

    @mesh.agent(AgentSpec(name=f"{name}.gen"))
    async def gen(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    errors = await errors_of(mesh, f"{name}.audit")
    assert [0, 1, 2] == [chunk async for chunk in mesh.stream(f"{name}.gen", 3)]
    [error] = await take(errors)
    assert "invalid_input" == json.loads(error.body)["code"]
    assert inputs.empty()
