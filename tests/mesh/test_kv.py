"""The shared state: texts, bytes and models, changed together by many, watched across restarts."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path

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
from openagentmesh.bus.server import EmbeddedServer
from pydantic import BaseModel

from tests.serving.test_router import node_of


class Plan(BaseModel):
    steps: list[str] = []


async def take(watch: AsyncGenerator[str, None]) -> str:
    async with asyncio.timeout(20):
        return await anext(watch)


async def test_a_text_comes_back_as_it_was_put(mesh: AgentMesh, name: str) -> None:
    """Revisions grow; texts and bytes that are text are the same; delete takes it away, twice is fine."""
    first = await mesh.kv.put(name, "grüße")
    assert first < await mesh.kv.put(name, "grüße".encode())
    assert "grüße" == await mesh.kv.get(name)
    await mesh.kv.delete(name)
    await mesh.kv.delete(name)
    with pytest.raises(NotFound, match=name) as caught:
        await mesh.kv.get(name)
    assert {"key": name} == caught.value.details
    await mesh.kv.put(name, "")
    assert "" == await mesh.kv.get(name)


async def test_create_is_for_keys_that_are_not_there(mesh: AgentMesh, name: str) -> None:
    """Of ten who create a key at once one succeeds; a deleted key can be created again."""
    results = await asyncio.gather(
        *[mesh.kv.create(name, str(number)) for number in range(10)], return_exceptions=True
    )
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
    assert tried.committed
    assert Plan(steps=["one", "two", "three"]) == await mesh.kv.get_model(f"{name}.a", Plan)
    await mesh.kv.put_model(f"{name}.b", Plan())
    listed = await mesh.kv.list_models(name, Plan)
    assert {f"{name}.a": 3, f"{name}.b": 0} == {entry.key: len(entry.value.steps) for entry in listed}


@pytest.mark.parametrize("stored", [b"{", b'{"steps": 1}', b"\xff"])
async def test_what_is_no_such_model_is_told(mesh: AgentMesh, name: str, stored: bytes) -> None:
    """Anybody may have written there: the error names the key and the model, and is JSON."""
    await mesh.kv.put(name, stored)
    with pytest.raises(InvalidInput, match=f"'{name}' is no Plan") as caught:
        await mesh.kv.get_model(name, Plan)
    json.dumps(caught.value.details)


async def test_bytes_that_are_no_text_are_listed_not_read(mesh: AgentMesh, name: str) -> None:
    """`get` is for texts, and says what to use instead."""
    await mesh.kv.put(name, b"\xff\x00")
    with pytest.raises(InvalidInput, match="list"):
        await mesh.kv.get(name)
    assert [b"\xff\x00"] == [entry.value for entry in await mesh.kv.list(name)]


@pytest.mark.parametrize("key", ["", " ", "a b", ".a", "a.", "a..b", "a.*", ">", "é", "x" * 5000, 7, None])
async def test_what_cannot_be_a_key_is_refused(mesh: AgentMesh, name: str, key: str) -> None:
    """Nothing of it reaches the server, and the connection lives on."""
    for attempt in (mesh.kv.put(key, "x"), mesh.kv.get(key), mesh.kv.delete(key), mesh.kv.create(key, "x")):
        with pytest.raises(InvalidInput, match="key"):
            await attempt
    await mesh.kv.put(name, "x")
    assert 0 == node_of(mesh).bus.reconnects


async def test_what_cannot_be_a_value_is_refused(mesh: AgentMesh, name: str) -> None:
    """Numbers and models want another method; what is too large is `payload_too_large`."""
    for value in (7, Plan(), None):
        with pytest.raises(InvalidInput, match="put_model"):
            await mesh.kv.put(name, value)  # type: ignore[arg-type]
    with pytest.raises(PayloadTooLarge):
        await mesh.kv.put(name, "x" * 2_000_000)
    await mesh.kv.put(name, "x")
    assert "x" == await mesh.kv.get(name)


async def test_before_connecting_everything_is_connection_failed() -> None:
    """The shared state is there once the mesh is."""
    kv = AgentMesh().kv
    with pytest.raises(ConnectionFailed):
        await kv.get("key")
    with pytest.raises(ConnectionFailed):
        await anext(kv.watch("key"))
    with pytest.raises(ConnectionFailed):
        async with kv.cas("key"):
            pass


async def test_a_watch_tells_what_is_there_and_each_change(mesh: AgentMesh, name: str) -> None:
    """A key, or all keys of a pattern; deletions are not told."""
    await mesh.kv.put(f"{name}.a.status", "old")
    async with aclosing(mesh.kv.watch(f"{name}.*.status")) as watch:
        assert "old" == await take(watch)
        await mesh.kv.delete(f"{name}.a.status")
        await mesh.kv.put(f"{name}.b.other", "not this")
        await mesh.kv.put(f"{name}.b.status", "new")
        assert "new" == await take(watch)


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store thrown away"])
async def test_a_watch_outlives_a_restart_of_the_server(name: str, tmp_path: Path, *, kept: bool) -> None:
    """What was told is not told again, what changes afterwards is, also on a server that lost all."""
    server = EmbeddedServer(store=str(tmp_path) if kept else "")
    await server.start()
    try:
        async with AgentMesh(server.url) as mesh, aclosing(mesh.kv.watch(name)) as watch:
            await mesh.kv.put(name, "before")
            assert "before" == await take(watch)
            coming = asyncio.ensure_future(anext(watch))
            await server.stop()
            bus = node_of(mesh).bus
            while bus.connected:
                await asyncio.sleep(0.01)
            server = EmbeddedServer(server.port, str(tmp_path) if kept else "")
            await server.start()
            await bus.until_connected()
            await mesh.kv.put(name, "after")
            async with asyncio.timeout(20):
                assert "after" == await coming
    finally:
        await server.stop()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200))
def test_any_text_survives(url: str, text: str) -> None:
    """Texts of any characters come back, but for those that UTF-8 has no bytes for."""

    async def run() -> None:
        async with AgentMesh(url) as mesh:
            await mesh.kv.put("any.text", text)
            assert text == await mesh.kv.get("any.text")

    asyncio.run(run())
