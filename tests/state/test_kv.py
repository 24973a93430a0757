"""The shared state: texts, bytes and models, concurrent changes, and watches across restarts."""

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


class Unserializable(BaseModel):
    value: Any


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
METHODS: list[Callable[[KV, str], Awaitable[object]]] = [
    *READERS,
    lambda kv, key: kv.put(key, "x"),
    lambda kv, key: kv.delete(key),
    lambda kv, key: kv.create(key, "x"),
    lambda kv, key: kv.put_model(key, Plan()),
    lambda kv, key: anext(kv.watch(key)),  # the only one that takes wildcards
]


async def test_a_text_is_put_read_and_deleted(mesh: AgentMesh, name: str) -> None:
    """Revisions increase, bytes in UTF-8 are read as text, and deleting a missing key is no error."""
    first = await mesh.kv.put(name, "grüße")
    assert first < await mesh.kv.put(name, "grüße".encode())
    assert "grüße" == await mesh.kv.get(name)
    await mesh.kv.delete(name)
    await mesh.kv.delete(name)
    with pytest.raises(NotFound):
        await mesh.kv.get(name)
    await mesh.kv.put(name, "")
    assert "" == await mesh.kv.get(name)


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "never-created"])
async def test_reading_a_missing_key_raises_not_found(mesh: AgentMesh, name: str, *, deleted: bool) -> None:
    """All methods that read a key raise NotFound with the key, and write nothing."""
    if deleted:
        await mesh.kv.put(name, "x")
        await mesh.kv.delete(name)
    for read in READERS:
        with pytest.raises(NotFound, match=f"'{name}'") as caught:
            await read(mesh.kv, name)
        assert {"key": name} == caught.value.details
    assert [] == await mesh.kv.list(name)


async def test_a_key_is_created_once(mesh: AgentMesh, name: str) -> None:
    """Of ten concurrent creations of a key one succeeds; a deleted key can be created again."""
    creating = [mesh.kv.create(name, str(number)) for number in range(10)]
    results = await asyncio.gather(*creating, return_exceptions=True)
    assert 9 == sum(isinstance(result, KVKeyExists) for result in results)
    winner = next(i for i, result in enumerate(results) if isinstance(result, int))
    assert str(winner) == await mesh.kv.get(name)
    await mesh.kv.delete(name)
    await mesh.kv.create(name, "again")
    assert "again" == await mesh.kv.get(name)


async def test_concurrent_updates_are_all_applied(mesh: AgentMesh, name: str) -> None:
    """Twenty concurrent increments, by functions and coroutine functions, add twenty."""
    await mesh.kv.put(name, "0")

    async def increment(text: str) -> str:
        await asyncio.sleep(0)
        return str(int(text) + 1)

    plain = [mesh.kv.update(name, lambda text: str(int(text) + 1), max_retries=50) for _ in range(10)]
    await asyncio.gather(*plain, *[mesh.kv.update(name, increment, max_retries=50) for _ in range(10)])
    assert "20" == await mesh.kv.get(name)


@pytest.mark.parametrize(("max_retries", "expected"), [(3, 3), (0, 1)])
async def test_an_update_fails_after_its_last_attempt(
    mesh: AgentMesh, name: str, max_retries: int, expected: int
) -> None:
    """When each attempt conflicts, KVConflict has their number, and the concurrent value stays."""
    await mesh.kv.put(name, "0")
    attempts = 0

    async def conflicting(text: str) -> str:
        nonlocal attempts
        attempts += 1
        await mesh.kv.put(name, f"other {attempts}")
        return "mine"

    with pytest.raises(KVConflict, match=f"{expected} times") as caught:
        await mesh.kv.update(name, conflicting, max_retries=max_retries)
    assert {"key": name, "tries": expected} == caught.value.details
    assert (expected, f"other {expected}") == (attempts, await mesh.kv.get(name))


async def test_compare_and_set_detects_concurrent_changes(mesh: AgentMesh, name: str) -> None:
    """After a concurrent change `cas` raises KVConflict, and `try_cas` leaves the draft uncommitted."""
    await mesh.kv.put(name, "1")
    async with mesh.kv.cas(name) as draft:
        draft.value = "2"
    assert "2" == await mesh.kv.get(name)
    assert draft.committed
    with pytest.raises(KVConflict) as caught:
        async with mesh.kv.cas(name) as draft:
            await mesh.kv.put(name, "concurrent")
            draft.value = "3"
    assert name == caught.value.details["key"]
    async with mesh.kv.try_cas(name) as draft:
        await mesh.kv.put(name, "concurrent again")
        draft.value = "4"
    assert (False, True) == (draft.committed, draft.attempted_write)
    assert "concurrent again" == await mesh.kv.get(name)


async def test_a_concurrent_deletion_is_a_conflict(mesh: AgentMesh, name: str) -> None:
    """Also when the key was created again with the same value, since its revision differs."""
    for created_again in (False, True):
        await mesh.kv.put(name, "1")
        async with mesh.kv.try_cas(name) as draft:
            draft.value = "2"
            await mesh.kv.delete(name)
            if created_again:
                await mesh.kv.create(name, "1")
        assert (False, True) == (draft.committed, draft.attempted_write)
        assert created_again == bool(await mesh.kv.list(name))


async def test_an_unchanged_draft_is_not_written(mesh: AgentMesh, name: str) -> None:
    """The revision stays the same when the value does, and when the block raises."""
    revision = await mesh.kv.put(name, "1")
    async with mesh.kv.try_cas(name) as draft:
        pass
    assert (True, False) == (draft.committed, draft.attempted_write)
    with suppress(ValueError):
        async with mesh.kv.cas(name) as draft:
            draft.value = "2"
            raise ValueError
    assert ("1", revision) == (await mesh.kv.get(name), (await mesh.kv.list(name))[0].revision)


async def test_models_are_put_read_changed_and_listed(mesh: AgentMesh, name: str) -> None:
    """All methods for models validate and serialize values with the model's class."""
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
async def test_a_value_that_does_not_match_the_model_is_invalid(
    mesh: AgentMesh, name: str, stored: bytes
) -> None:
    """The error names the key and the model, and its details are JSON."""
    await mesh.kv.put(name, stored)
    with pytest.raises(InvalidInput, match=f"'{name}' is not a Plan") as caught:
        await mesh.kv.get_model(name, Plan)
    json.dumps(caught.value.details)


async def test_a_key_that_is_being_replaced_is_listed_once(mesh: AgentMesh, url: str, name: str) -> None:
    """A key that exists all the time is in every list, once, while it is written concurrently."""
    keys = [f"{name}.{number}" for number in range(20)]
    async with AgentMesh(url) as other:

        async def replace_all() -> None:
            while True:
                await asyncio.gather(*[other.kv.put(key, "new") for key in keys])

        await asyncio.gather(*[other.kv.put(key, "old") for key in keys])
        replacing = asyncio.create_task(replace_all())
        for _ in range(60):
            assert sorted(keys) == sorted(entry.key for entry in await mesh.kv.list(f"{name}."))
        await cancel_and_wait(replacing)


async def test_bytes_that_are_not_text_are_read_with_list_only(mesh: AgentMesh, name: str) -> None:
    """`get` raises InvalidInput and names the method to use instead."""
    await mesh.kv.put(name, b"\xff\x00")
    with pytest.raises(InvalidInput, match="list"):
        await mesh.kv.get(name)
    assert [b"\xff\x00"] == [entry.value for entry in await mesh.kv.list(name)]


@pytest.mark.parametrize(
    "key", ["", " ", "a b", ".a", "a.", "a..b", "a.*", ">", "é", "a\n", "x" * 5000, 7, None, b"a", ["a"]]
)
async def test_an_invalid_key_is_rejected(mesh: AgentMesh, name: str, key: str) -> None:
    """All methods raise InvalidInput, nothing is sent, and the connection stays open."""
    for use in METHODS[:-1] if key in ("a.*", ">") else METHODS:
        with pytest.raises(InvalidInput, match="key is"):
            await use(mesh.kv, key)
    await mesh.kv.put(name, "x")
    assert 0 == reconnects(mesh)


@given(key=st.text(max_size=8) | st.text("ab./*>_=- \n\x00é", max_size=8))
def test_a_key_is_checked_before_the_connection(key: str) -> None:
    """Without a connection an invalid key raises InvalidInput, a valid one ConnectionFailed."""
    expected = ConnectionFailed if KEY.fullmatch(key) else InvalidInput

    async def run() -> None:
        for use in METHODS[:-1]:
            with pytest.raises(expected):
                await use(AgentMesh().kv, key)

    asyncio.run(run())


@pytest.mark.parametrize("pattern", ["", "a b", "a.>.b", "a*", "a..*", ".>", "x" * 5000, None])
async def test_an_invalid_pattern_is_rejected(pattern: str) -> None:
    """Wildcards stand for whole words, `>` only at the end; patterns are checked before the connection."""
    with pytest.raises(InvalidInput, match="key is"):
        await anext(AgentMesh().kv.watch(pattern))


async def test_a_key_of_the_maximum_length_is_usable(mesh: AgentMesh) -> None:
    """It is created, watched, deleted and listed."""
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
    "value", [7, "\ud800", Unserializable(value=object())], ids=["number", "surrogate", "not-serializable"]
)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_a_value_that_cannot_be_stored_is_rejected(
    mesh: AgentMesh, name: str, write: Callable[[KV, str, Any], Awaitable[object]], value: object
) -> None:
    """Every method that writes raises InvalidInput with the key, and the stored value stays."""
    await mesh.kv.put_model(name, Plan(steps=["before"]))
    with pytest.raises(InvalidInput, match=f"'{name}'"):
        await write(mesh.kv, name, value)
    assert Plan(steps=["before"]) == await mesh.kv.get_model(name, Plan)


@pytest.mark.parametrize("over", [-200, -20, 0, 1, 1_000_000])
async def test_a_value_around_the_size_limit_is_stored_or_too_large(
    mesh: AgentMesh, name: str, over: int
) -> None:
    """A write near the server's limit, which includes headers, succeeds or raises PayloadTooLarge."""
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


async def test_all_methods_raise_connection_failed_without_a_connection(url: str, name: str) -> None:
    """Before the mesh is connected, and after it was closed."""
    mesh = AgentMesh(url)
    for _ in range(2):
        for use in (*METHODS, KV.list):
            with pytest.raises(ConnectionFailed):
                await use(mesh.kv, name)
        async with mesh:
            await mesh.kv.put(name, "x")


async def test_a_watch_yields_the_existing_values_and_each_change(mesh: AgentMesh, name: str) -> None:
    """Of all keys that match the pattern; deletions are not yielded."""
    await mesh.kv.put(f"{name}.a.status", "old")
    async with aclosing(mesh.kv.watch(f"{name}.*.status")) as watch:
        assert "old" == await take_next(watch)
        await mesh.kv.delete(f"{name}.a.status")
        await mesh.kv.put(f"{name}.b.other", "not this")
        await mesh.kv.put(f"{name}.b.status", "new")
        assert "new" == await take_next(watch)


@pytest.mark.parametrize("kept", [True, False], ids=["store-kept", "store-lost"])
async def test_a_watch_survives_a_restart_of_the_server(name: str, tmp_path: Path, *, kept: bool) -> None:
    """It yields changes during and after the outage, and no value twice."""

    async def change_during_the_outage(kv: KV) -> None:
        await kv.put(f"{name}.a", "during the outage")

    async with (
        restartable(tmp_path if kept else "") as (mesh, restart),
        aclosing(mesh.kv.watch(f"{name}.*")) as watch,
    ):
        for key in ("a", "b"):
            await mesh.kv.put(f"{name}.{key}", f"before {key}")
            assert f"before {key}" == await take_next(watch)
        await restart(change_during_the_outage if kept else None)
        await mesh.kv.put(f"{name}.c", "after")
        if kept:
            assert "during the outage" == await take_next(watch)
        assert "after" == await take_next(watch)


async def test_a_write_during_an_outage_is_completed_afterwards(name: str, tmp_path: Path) -> None:
    """It waits until the connection and the buckets are restored."""
    writing: list[asyncio.Task[int]] = []

    async def write_during_the_outage(_: KV) -> None:
        writing.append(asyncio.create_task(mesh.kv.put(name, "2")))

    async with restartable(tmp_path) as (mesh, restart):
        await mesh.kv.put(name, "1")
        await restart(write_during_the_outage)
        assert 1 < await asyncio.wait_for(writing[0], 20)
        assert "2" == await mesh.kv.get(name)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.text(max_size=200))
def test_any_text_is_stored_unchanged(url: str, text: str) -> None:
    """A text of any characters that UTF-8 can encode is read as it was written."""

    async def run() -> None:
        async with AgentMesh(url) as mesh:
            await mesh.kv.put("any.text", text)
            assert text == await mesh.kv.get("any.text")

    asyncio.run(run())


async def test_an_update_does_not_retry_a_conflict_of_its_function(mesh: AgentMesh, name: str) -> None:
    """A KVConflict that the function itself raises is the caller's; the function runs once."""
    await mesh.kv.put(name, "0")
    runs = 0

    def conflicting(text: str) -> str:
        nonlocal runs
        runs += 1
        raise KVConflict(text)

    with pytest.raises(KVConflict, match="0"):
        await mesh.kv.update(name, conflicting)
    assert 1 == runs
