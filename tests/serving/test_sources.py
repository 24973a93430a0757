"""Agents driven by messages and by changes of the shared state."""

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

Source = SubjectSource | KVSource


Word = Annotated[str, Field(max_length=9)]


class Order(BaseModel):
    item: str


class Strict(BaseModel):
    """A model whose author never thought of None."""

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
        (None, "whatever", None),
    ],
    ids=["model", "dict", "text", "text or none", "short text", "any text", "any JSON", "bytes", "nothing"],
)
async def test_a_message_drives_the_handler(
    mesh: AgentMesh, name: str, hint: Any, payload: Order | str | bytes, expected: object
) -> None:
    """Each message on the subject, with its data as the declared type."""
    got = declare_driven(mesh, name, hint, mesh.subject_source(f"{name}.in.*"))
    await mesh.catalog()
    await mesh.publish(f"{name}.in.a", payload)
    await mesh.publish(f"{name}.other", payload)
    await mesh.publish(f"{name}.in.b", payload)
    assert [expected, expected] == await take(got, 2)
    assert got.empty()


async def test_a_message_comes_with_its_subject_and_headers(mesh: AgentMesh, name: str) -> None:
    """`MeshMessage[Model]` has all of it."""
    got = declare_driven(mesh, name, MeshMessage[Order], mesh.subject_source(f"{name}.*"))
    await mesh.catalog()
    await mesh.publish(f"{name}.a", Order(item="tea"), headers={"X-Mine": "yes"})
    [message] = await take(got)
    assert (f"{name}.a", Order(item="tea")) == (message.subject, message.data)
    assert "yes" == message.headers["X-Mine"]


async def test_a_queue_group_shares_and_others_all_get(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """With a queue group each message goes to one mesh, without one to each."""
    other = new_mesh()
    shared = [
        declare_driven(m, f"{name}.a", str, m.subject_source(name, queue_group="g")) for m in (mesh, other)
    ]
    each = [declare_driven(m, f"{name}.b", str, m.subject_source(name)) for m in (mesh, other)]
    async with other:
        await other.catalog()
        await mesh.catalog()
        for number in range(40):
            await mesh.publish(name, str(number))
        for got in each:
            assert [str(n) for n in range(40)] == await take(got, 40)
        await flush(mesh)
        await flush(other)
        assert 40 == sum(got.qsize() for got in shared)


async def test_a_request_on_the_subject_is_answered(mesh: AgentMesh, name: str) -> None:
    """A message with a reply subject gets what the handler gives back."""

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[int]) -> int:
        return message.data * 2

    await mesh.catalog()
    answer = await node_of(mesh).inbox.request(f"{name}.in", b"21", timeout=10)
    assert b"42" == answer.body
    assert "ok" == read_headers(answer.head)[subjects.STATUS]


async def test_what_fails_is_told_and_the_next_one_handled(mesh: AgentMesh, name: str) -> None:
    """Input that does not fit and handlers that raise go to `mesh.errors`, as those of requests do."""
    handled: asyncio.Queue[str] = asyncio.Queue()

    @mesh.agent(AgentSpec(name=name), sources=[mesh.subject_source(f"{name}.in")])
    async def handler(message: MeshMessage[Order]) -> None:
        if message.data.item == "bad":
            raise ValueError("cannot pack that")
        if message.data.item == "more":
            raise MeshError("quota", "used up", details={"left": 0})
        handled.put_nowait(message.data.item)

    heard, events = await errors_of(mesh, name), asyncio.Queue[Message]()
    await node_of(mesh).connection.subscribe(subjects.logs(name), events.put_nowait)
    for payload in ("no order", Order(item="bad"), b"", Order(item="more"), Order(item="good")):
        await mesh.publish(f"{name}.in", payload)
    assert ["good"] == await take(handled)
    told = [json.loads(message.body) for message in await take(heard, 4)]
    codes = ["handler_error", "invalid_input", "invalid_input", "quota"]
    assert codes == sorted(each["code"] for each in told)
    assert [name] * 4 == [envelope["agent"] for envelope in told]
    assert {"left": 0} in [envelope["details"] for envelope in told]
    logged = [json.loads(message.body) for message in await take(events, 4)]
    kinds = ["validation_error" if code == "invalid_input" else "request_failed" for code in codes]
    assert sorted(zip(kinds, codes, strict=True)) == sorted((e["event"], e["data"]["code"]) for e in logged)


async def test_a_responder_with_sources_is_still_called(mesh: AgentMesh, name: str) -> None:
    """Sources are besides requests, not instead of them."""
    got = declare_driven(mesh, name, Order, mesh.subject_source(f"{name}.in"))
    assert {} == await mesh.call(name, Order(item="called"))
    await mesh.publish(f"{name}.in", Order(item="sent"))
    assert ["called", "sent"] == [order.item for order in await take(got, 2)]


async def test_what_only_sources_drive_is_not_called(mesh: AgentMesh, name: str) -> None:
    """It is in the catalog as no agent to call, and calls are refused in the protocol's words."""
    declare_driven(mesh, name, MeshMessage[Order], mesh.subject_source(f"{name}.in"))
    [entry] = await mesh.catalog(channel=name)
    assert (False, False) == (entry.invocable, entry.streaming)
    with pytest.raises(
        InvocationMismatch, match=f"^Agent '{name}' is a background task and cannot be called$"
    ):
        await mesh.call(name, {})


async def test_changes_of_keys_come_in_order_one_at_a_time(mesh: AgentMesh, name: str) -> None:
    """What is there first, then each change; the next one waits until the handler is done."""
    at_work, most = 0, 0
    got: asyncio.Queue[KVEntry[str | None]] = asyncio.Queue()
    await mesh.kv.put(f"{name}.a", "there")

    @mesh.agent(AgentSpec(name=name), sources=[mesh.kv_source(f"{name}.>")])
    async def handler(entry: KVEntry[str | None]) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.002)
        at_work -= 1
        got.put_nowait(entry)

    await mesh.catalog()
    assert ["there"] == [entry.value for entry in await take(got)]
    for number in range(10):
        await mesh.kv.put(f"{name}.k{number}", str(number))
    await mesh.kv.delete(f"{name}.a")
    await mesh.kv.put(f"{name}x.other", "not this")
    entries = await take(got, 11)
    assert [*map(str, range(10)), None] == [entry.value for entry in entries]
    assert f"{name}.a" == entries[-1].key
    assert sorted(entry.revision for entry in entries) == [entry.revision for entry in entries]
    assert (1, True) == (most, got.empty())


@pytest.mark.parametrize("hint", [Order, KVEntry[Order], Strict])
async def test_deletions_come_to_those_who_can_take_them(mesh: AgentMesh, name: str, hint: Any) -> None:
    """A handler for values only is mutually exclusiveered; values are read as its model."""
    await mesh.kv.put_model(f"{name}.a", Order(item="1"))
    got = declare_driven(mesh, name, hint, mesh.kv_source(f"{name}.*", on_init="skip"))
    await mesh.catalog()
    await asyncio.wait_for(sources_started(mesh, name), 10)
    await mesh.kv.delete(f"{name}.a")
    await mesh.kv.put_model(f"{name}.a", Order(item="2"))
    [given] = await take(got)
    assert "2" == (given.value if isinstance(given, KVEntry) else given).item


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store thrown away"])
async def test_nothing_is_lost_or_repeated_over_a_restart(name: str, tmp_path: Path, *, kept: bool) -> None:
    """What changed while this mesh was away comes afterwards, what was told before does not."""

    async def meanwhile(kv: KV) -> None:
        await kv.put("k.c", "2")
        await kv.delete("k.b")
        await kv.put("k.d", "2")

    async with restartable(tmp_path if kept else "") as (mesh, restart):
        got = declare_driven(mesh, name, KVEntry[str | None], mesh.kv_source("k.*"))
        for key in ("k.a", "k.b", "k.c"):
            await mesh.kv.put(key, "1")
        assert ["1", "1", "1"] == [entry.value for entry in await take(got, 3)]
        await restart(meanwhile if kept else None)
        # What a new server does not have was deleted.
        told = {"k.c": "2", "k.b": None, "k.d": "2"} if kept else dict.fromkeys(("k.a", "k.b", "k.c"))
        assert told == {entry.key: entry.value for entry in await take(got, 3)}
        await mesh.kv.put("k.b", "3")
        await mesh.kv.put("k.e", "3")
        assert [("k.b", "3"), ("k.e", "3")] == [(e.key, e.value) for e in await take(got, 2)]
        assert got.empty()


async def streamer(order: Order) -> AsyncIterator[int]:
    yield 1


async def entry_handler(entry: KVEntry[str]) -> None:
    return


async def message_handler(message: MeshMessage[str]) -> None:
    return


@pytest.mark.parametrize(
    ("handler", "sources", "told"),
    [
        (streamer, [SubjectSource("a")], "is not sent anywhere"),
        (entry_handler, [SubjectSource("a")], "takes entry"),
        (message_handler, [KVSource("a")], "takes message"),
        (message_handler, [], "has none"),
        (message_handler, SubjectSource("a"), "source"),
        (message_handler, ["a"], "driven by"),
    ],
    ids=["streamer", "entry of a subject", "message of a key", "no source", "no list", "a text"],
)
def test_a_handler_that_does_not_fit_its_sources_is_refused(
    handler: Callable[..., Any], sources: Any, told: str
) -> None:
    """Where it is declared, in words, with file and line."""
    with pytest.raises(InvalidAgent, match=told) as caught:
        AgentMesh().agent(AgentSpec(name="a"), sources=sources)(handler)
    assert __file__ in str(caught.value)


@pytest.mark.parametrize("subject", ["", "a b", "a..b", "a.>.b", ".a", "x" * 5000, 7, b"a"])
def test_sources_that_cannot_be_are_refused(subject: Any) -> None:
    """A bad subject, pattern, group or word never reaches the server."""
    mesh = AgentMesh()
    for make in (mesh.subject_source, mesh.kv_source):
        with pytest.raises(InvalidAgent, match="is invalid"):
            make(subject)
    with pytest.raises(InvalidAgent, match="queue group"):
        mesh.subject_source("a", queue_group=subject)
    with pytest.raises(InvalidAgent, match="'replay' or 'skip'"):
        mesh.kv_source("a", on_init=subject)


async def test_a_text_that_is_none_is_invalid(mesh: AgentMesh, name: str) -> None:
    """A handler is never given a text that nobody wrote: bytes that are no UTF-8 are `invalid_input`."""
    got = declare_driven(mesh, name, str, mesh.kv_source(f"{name}.*"), mesh.subject_source(f"{name}.in"))
    heard = await errors_of(mesh, name)
    await mesh.kv.put(f"{name}.a", b"\xff")
    await mesh.publish(f"{name}.in", b"\xff")
    assert ["invalid_input"] * 2 == [json.loads(m.body)["code"] for m in await take(heard, 2)]
    assert got.empty()


@pytest.mark.parametrize("begin", ["well", "lost"])
async def test_what_is_there_can_be_skipped(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    """With `on_init="skip"` only changes count, also when the server is lost before all is known."""
    await mesh.kv.put(f"{name}.a", "there")
    buckets, failed = node_of(mesh).buckets, asyncio.Event()
    watch = buckets.watch

    async def lost() -> AsyncIterator[Any]:
        failed.set()
        raise ConnectionFailed("The server is away.")
        yield

    def lost_once(bucket: str, keys: str = ">") -> AsyncIterator[Any]:
        return watch(bucket, keys) if bucket != CONTEXT_BUCKET or failed.is_set() else lost()

    if begin == "lost":
        monkeypatch.setattr(buckets, "watch", lost_once)
    got = declare_driven(mesh, name, KVEntry[str], mesh.kv_source(f"{name}.*", on_init="skip"))
    await mesh.catalog()
    await asyncio.wait_for(sources_started(mesh, name), 10)
    await mesh.kv.put(f"{name}.b", "new")
    assert ["new"] == [entry.value for entry in await take(got)]


async def test_who_overhears_a_stream_does_not_end_it(mesh: AgentMesh, name: str) -> None:
    """A source that cannot read somebody else's request tells `mesh.errors`, not that one's reader."""
    got = declare_driven(mesh, f"{name}.audit", Order, mesh.subject_source(f"mesh.agent.{name}.>"))

    @mesh.agent(AgentSpec(name=f"{name}.gen"))
    async def gen(count: int) -> AsyncIterator[int]:
        for number in range(count):
            yield number

    heard = await errors_of(mesh, f"{name}.audit")
    assert [0, 1, 2] == [chunk async for chunk in mesh.stream(f"{name}.gen", 3)]
    [told] = await take(heard)
    assert "invalid_input" == json.loads(told.body)["code"]
    assert got.empty()
