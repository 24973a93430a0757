"""The shared state: texts, bytes and models, changed together by many, watched across restarts."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openagentmesh import (
    AgentMesh,
    ConnectionFailed,
    InvalidInput,
    KVConflict,
    KVKeyExists,
    NotFound,
    PayloadTooLarge,
)
from openagentmesh.protocol import subjects
from openagentmesh.state.kv import KV, Draft
from openagentmesh.transport.tasks import cancel_and_wait
from pydantic import BaseModel

from tests.support.meshes import node_of, reconnects, take_next
from tests.support.servers import restartable

KEY = re.compile(r"[-/_=A-Za-z0-9]+(\.[-/_=A-Za-z0-9]+)*")


class Plan(BaseModel):
    steps: list[str] = []


class Unjson(BaseModel):
    thing: Any


async def enter(block: AbstractAsyncContextManager[Any]) -> None:
    async with block:
        pass


READERS: list[Callable[[KV, str], Awaitable[object]]] = [
    lambda kv, key: kv.get(key),
    lambda kv, key: kv.update(key, str),
    lambda kv, key: kv.get_model(key, Plan),
    lambda kv, key: enter(kv.cas(key)),
    lambda kv, key: enter(kv.try_cas(key)),
    lambda kv, key: enter(kv.cas_model(key, Plan)),
    lambda kv, key: enter(kv.try_cas_model(key, Plan)),
]
EVERYTHING: list[Callable[[KV, str], Awaitable[object]]] = [
    *READERS,
    lambda kv, key: kv.put(key, "x"),
    lambda kv, key: kv.delete(key),
    lambda kv, key: kv.create(key, "x"),
    lambda kv, key: kv.put_model(key, Plan()),
    lambda kv, key: anext(kv.watch(key)),  # may have wildcards
]


async def test_a_text_comes_back_as_it_was_put(mesh: AgentMesh, name: str) -> None:
    """Revisions grow; texts and bytes that are text are the same; delete takes it away, twice is fine."""
    first = await mesh.kv.put(name, "grüße")
    assert first < await mesh.kv.put(name, "grüße".encode())
    assert "grüße" == await mesh.kv.get(name)
    await mesh.kv.delete(name)
    await mesh.kv.delete(name)
    with pytest.raises(NotFound):
        await mesh.kv.get(name)
    await mesh.kv.put(name, "")
    assert "" == await mesh.kv.get(name)


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "never there"])
async def test_a_key_that_is_not_there_is_named(mesh: AgentMesh, name: str, *, deleted: bool) -> None:
    """Whatever wants to read it is told `not_found` and which key; nothing is written instead."""
    if deleted:
        await mesh.kv.put(name, "x")
        await mesh.kv.delete(name)
    for read in READERS:
        with pytest.raises(NotFound, match=f"'{name}'") as caught:
            await read(mesh.kv, name)
        assert {"key": name} == caught.value.details
    assert [] == await mesh.kv.list(name)


async def test_create_is_for_keys_that_are_not_there(mesh: AgentMesh, name: str) -> None:
    """Of ten who create a key at once one succeeds; a deleted key can be created again."""
    creating = [mesh.kv.create(name, str(number)) for number in range(10)]
    results = await asyncio.gather(*creating, return_exceptions=True)
    assert 9 == sum(isinstance(result, KVKeyExists) for result in results)
    winner = next(i for i, result in enumerate(results) if isinstance(result, int))
    assert str(winner) == await mesh.kv.get(name)
    await mesh.kv.delete(name)
    await mesh.kv.create(name, "again")
    assert "again" == await mesh.kv.get(name)


async def test_updates_of_many_all_count(mesh: AgentMesh, name: str) -> None:
    """Twenty increments at once, by plain and by async functions, are twenty."""
    await mesh.kv.put(name, "0")

    async def increment(text: str) -> str:
        await asyncio.sleep(0)
        return str(int(text) + 1)

    plain = [mesh.kv.update(name, lambda text: str(int(text) + 1), max_retries=50) for _ in range(10)]
    await asyncio.gather(*plain, *[mesh.kv.update(name, increment, max_retries=50) for _ in range(10)])
    assert "20" == await mesh.kv.get(name)


async def test_an_update_gives_up(mesh: AgentMesh, name: str) -> None:
    """When others are faster each time, that is told; what the others wrote stays."""
    await mesh.kv.put(name, "0")
    tries = 0

    async def slow(text: str) -> str:
        nonlocal tries
        tries += 1
        await mesh.kv.put(name, f"other {tries}")
        return "mine"

    with pytest.raises(KVConflict, match="3 times"):
        await mesh.kv.update(name, slow, max_retries=3)
    assert (3, "other 3") == (tries, await mesh.kv.get(name))


async def test_compare_and_set(mesh: AgentMesh, name: str) -> None:
    """`cas` writes at the end of its block unless others were faster; `try_cas` tells instead."""
    await mesh.kv.put(name, "1")
    async with mesh.kv.cas(name) as draft:
        draft.value = "2"
    assert "2" == await mesh.kv.get(name)
    assert draft.committed
    with pytest.raises(KVConflict) as caught:
        async with mesh.kv.cas(name) as draft:
            await mesh.kv.put(name, "theirs")
            draft.value = "3"
    assert name == caught.value.details["key"]
    async with mesh.kv.try_cas(name) as draft:
        await mesh.kv.put(name, "theirs again")
        draft.value = "4"
    assert (False, True) == (draft.committed, draft.attempted_write)
    assert "theirs again" == await mesh.kv.get(name)


async def test_a_key_that_was_deleted_meanwhile_is_a_conflict(mesh: AgentMesh, name: str) -> None:
    """Also when it was created again with the same value: that is another key."""
    for again in (False, True):
        await mesh.kv.put(name, "1")
        async with mesh.kv.try_cas(name) as draft:
            draft.value = "2"
            await mesh.kv.delete(name)
            if again:
                await mesh.kv.create(name, "1")
        assert (False, True) == (draft.committed, draft.attempted_write)
        assert again == bool(await mesh.kv.list(name))


async def test_a_draft_that_nobody_changed_is_not_written(mesh: AgentMesh, name: str) -> None:
    """The revision stays when the value does, and when the block raises."""
    revision = await mesh.kv.put(name, "1")
    async with mesh.kv.try_cas(name) as draft:
        pass
    assert (True, False) == (draft.committed, draft.attempted_write)
    with suppress(ValueError):
        async with mesh.kv.cas(name) as draft:
            draft.value = "2"
            raise ValueError
    assert ("1", revision) == (await mesh.kv.get(name), (await mesh.kv.list(name))[0].revision)


async def test_models(mesh: AgentMesh, name: str) -> None:
    """What is put as a model is read, changed and listed as one."""
    await mesh.kv.put_model(f"{name}.a", Plan(steps=["one"]))
    async with mesh.kv.cas_model(f"{name}.a", Plan) as draft:
        draft.value.steps.append("two")
    async with mesh.kv.try_cas_model(f"{name}.a", Plan) as tried:
        tried.value = Plan(steps=[*tried.value.steps, "three"])
    assert Plan(steps=["one", "two", "three"]) == await mesh.kv.get_model(f"{name}.a", Plan)
    await mesh.kv.put_model(f"{name}.b", Plan())
    listed = await mesh.kv.list_models(name, Plan)
    assert {f"{name}.a": 3, f"{name}.b": 0} == {entry.key: len(entry.value.steps) for entry in listed}


@pytest.mark.parametrize("stored", [b"{", b'{"steps": 1}', b"\xff"])
async def test_what_is_no_such_model_is_told(mesh: AgentMesh, name: str, stored: bytes) -> None:
    """Anybody may have written there: the error names the key and the model, and is JSON."""
    await mesh.kv.put(name, stored)
    with pytest.raises(InvalidInput, match=f"'{name}' is not a Plan") as caught:
        await mesh.kv.get_model(name, Plan)
    json.dumps(caught.value.details)


async def test_what_is_replaced_is_listed_all_the_same(mesh: AgentMesh, url: str, name: str) -> None:
    """A key that is there all the time is in every list, once, though others write it meanwhile."""
    keys = [f"{name}.{number}" for number in range(20)]
    async with AgentMesh(url) as other:

        async def replace_all() -> None:
            while True:
                await asyncio.gather(*[other.kv.put(key, "again") for key in keys])

        await asyncio.gather(*[other.kv.put(key, "once") for key in keys])
        replacing = asyncio.create_task(replace_all())
        for _ in range(60):
            assert sorted(keys) == sorted(entry.key for entry in await mesh.kv.list(f"{name}."))
        await cancel_and_wait(replacing)


async def test_bytes_that_are_no_text_are_listed_not_read(mesh: AgentMesh, name: str) -> None:
    """`get` is for texts, and says what to use instead."""
    await mesh.kv.put(name, b"\xff\x00")
    with pytest.raises(InvalidInput, match="list"):
        await mesh.kv.get(name)
    assert [b"\xff\x00"] == [entry.value for entry in await mesh.kv.list(name)]


@pytest.mark.parametrize(
    "key", ["", " ", "a b", ".a", "a.", "a..b", "a.*", ">", "é", "a\n", "x" * 5000, 7, None, b"a", ["a"]]
)
async def test_what_cannot_be_a_key_is_refused(mesh: AgentMesh, name: str, key: str) -> None:
    """By every method, in words; nothing of it reaches the server, and the connection lives on."""
    for use in EVERYTHING[:-1] if key in ("a.*", ">") else EVERYTHING:
        with pytest.raises(InvalidInput, match="key is"):
            await use(mesh.kv, key)
    await mesh.kv.put(name, "x")
    assert 0 == reconnects(mesh)


@given(key=st.text(max_size=8) | st.text("ab./*>_=- \n\x00é", max_size=8))
def test_a_key_is_judged_before_anything_is_sent(key: str) -> None:
    """Any text is refused as a key, or is one: then all it lacks is a connection."""
    expected = ConnectionFailed if KEY.fullmatch(key) else InvalidInput

    async def run() -> None:
        for use in EVERYTHING[:-1]:
            with pytest.raises(expected):
                await use(AgentMesh().kv, key)

    asyncio.run(run())


@pytest.mark.parametrize("pattern", ["", "a b", "a.>.b", "a*", "a..*", ".>", "x" * 5000, None])
async def test_what_cannot_be_watched_is_refused(pattern: str) -> None:
    """Wildcards stand for whole words, and `>` at the end only; that is judged before anything is sent."""
    with pytest.raises(InvalidInput, match="key is"):
        await anext(AgentMesh().kv.watch(pattern))


async def test_a_key_may_be_long(mesh: AgentMesh) -> None:
    """The longest key there can be is written, read, watched and deleted as any other."""
    key = "x" * subjects.MAX_SUBJECT
    await mesh.kv.create(key, "1")
    async with aclosing(mesh.kv.watch(key)) as watch:
        assert "1" == await take_next(watch)
    await mesh.kv.delete(key)
    assert [] == await mesh.kv.list(key)


async def set_draft(block: AbstractAsyncContextManager[Draft[Any]], value: object) -> None:
    async with block as draft:
        draft.value = value


WRITES: dict[str, Callable[[KV, str, Any], Awaitable[object]]] = {
    "put": lambda kv, key, value: kv.put(key, value),
    "update": lambda kv, key, value: kv.update(key, lambda _: value),
    "cas": lambda kv, key, value: set_draft(kv.cas(key), value),
    "put_model": lambda kv, key, value: kv.put_model(key, value),
    "cas_model": lambda kv, key, value: set_draft(kv.cas_model(key, Plan), value),
}


@pytest.mark.parametrize(
    "value", [7, "\ud800", Unjson(thing=object())], ids=["number", "surrogate", "no JSON"]
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_what_cannot_be_stored_is_refused(
    mesh: AgentMesh, name: str, write: Callable[[KV, str, Any], Awaitable[object]], value: object
) -> None:
    """However it is written it is InvalidInput that names the key, and what was there stays."""
    await mesh.kv.put_model(name, Plan(steps=["before"]))
    with pytest.raises(InvalidInput, match=f"'{name}'"):
        await write(mesh.kv, name, value)
    assert Plan(steps=["before"]) == await mesh.kv.get_model(name, Plan)


@pytest.mark.parametrize("over", [-200, -20, 0, 1, 1_000_000])
async def test_a_value_fits_or_is_too_large(mesh: AgentMesh, name: str, over: int) -> None:
    """Around the server's limit a write succeeds or is `payload_too_large`, headers counted."""
    value = "x" * (node_of(mesh).connection.max_payload + over)
    for key, write in ((f"{name}.put", mesh.kv.put), (f"{name}.create", mesh.kv.create)):
        try:
            await write(key, value)
        except PayloadTooLarge:
            assert over > -200
        else:
            assert over <= 0
            assert value == await mesh.kv.get(key)
            await mesh.kv.delete(key)
    assert 0 == reconnects(mesh)


async def test_without_a_connection_everything_is_connection_failed(url: str, name: str) -> None:
    """Before it is connected and after it was left."""
    mesh = AgentMesh(url)
    for _ in range(2):
        for use in (*EVERYTHING, KV.list):
            with pytest.raises(ConnectionFailed):
                await use(mesh.kv, name)
        async with mesh:
            await mesh.kv.put(name, "x")


async def test_a_watch_tells_what_is_there_and_each_change(mesh: AgentMesh, name: str) -> None:
    """A key, or all keys of a pattern; deletions are not told."""
    await mesh.kv.put(f"{name}.a.status", "old")
    async with aclosing(mesh.kv.watch(f"{name}.*.status")) as watch:
        assert "old" == await take_next(watch)
        await mesh.kv.delete(f"{name}.a.status")
        await mesh.kv.put(f"{name}.b.other", "not this")
        await mesh.kv.put(f"{name}.b.status", "new")
        assert "new" == await take_next(watch)


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store thrown away"])
async def test_a_watch_outlives_a_restart_of_the_server(name: str, tmp_path: Path, *, kept: bool) -> None:
    """What was told is not told again, what changed while away and afterwards is."""

    async def meanwhile(kv: KV) -> None:
        await kv.put(f"{name}.a", "while away")

    async with (
        restartable(tmp_path if kept else "") as (mesh, restart),
        aclosing(mesh.kv.watch(f"{name}.*")) as watch,
    ):
        for key in ("a", "b"):
            await mesh.kv.put(f"{name}.{key}", f"before {key}")
            assert f"before {key}" == await take_next(watch)
        await restart(meanwhile if kept else None)
        await mesh.kv.put(f"{name}.c", "after")
        if kept:
            assert "while away" == await take_next(watch)
        assert "after" == await take_next(watch)


async def test_a_write_waits_for_a_server_that_comes_back(name: str, tmp_path: Path) -> None:
    """It is done once the connection and the buckets are there again."""
    writing: list[asyncio.Task[int]] = []

    async def meanwhile(_: KV) -> None:
        writing.append(asyncio.create_task(mesh.kv.put(name, "2")))

    async with restartable(tmp_path) as (mesh, restart):
        await mesh.kv.put(name, "1")
        await restart(meanwhile)
        assert 1 < await asyncio.wait_for(writing[0], 20)
        assert "2" == await mesh.kv.get(name)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.text(max_size=200))
def test_any_text_survives(url: str, text: str) -> None:
    """Texts of any characters come back, but for those that UTF-8 has no bytes for."""

    async def run() -> None:
        async with AgentMesh(url) as mesh:
            await mesh.kv.put("any.text", text)
            assert text == await mesh.kv.get("any.text")

    asyncio.run(run())
