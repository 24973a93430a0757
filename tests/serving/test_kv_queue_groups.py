"""KV sources with a queue group: its members share the changes of the shared state."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh, AgentSpec, KVEntry
from openagentmesh.protocol.subjects import CONTEXT_BUCKET

from tests.support.meshes import declare_driven, node_of, take
from tests.support.servers import restartable


async def test_each_change_goes_to_one_member_of_a_group(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """One of two members handles each change, also of changes made before either connected."""
    for number in range(5):
        await mesh.kv.put(f"{name}.k{number}", "before")
    other, handled = new_mesh(), asyncio.Queue[str]()
    for member in (mesh, other):

        @member.agent(AgentSpec(name=name), sources=[member.kv_source(f"{name}.*", queue_group=name)])
        async def handler(entry: KVEntry[str]) -> None:
            handled.put_nowait(entry.key)

    async with other:
        await mesh.catalog()
        for number in range(5, 20):
            await mesh.kv.put(f"{name}.k{number}", "after")
        assert sorted(f"{name}.k{number}" for number in range(20)) == sorted(await take(handled, 20))
    assert handled.empty()


@pytest.mark.parametrize("kept", [True, False], ids=["store kept", "store removed"])
@pytest.mark.parametrize("on_init", ["replay", "skip"])
async def test_a_group_continues_after_a_restart_of_the_server(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, on_init: Any, kept: bool
) -> None:
    """Changes made as soon as the connection is restored are handled immediately, and once."""
    monkeypatch.setattr("openagentmesh.transport.kv._PULL_S", 60.0)
    async with restartable(tmp_path if kept else "") as (mesh, restart):
        inputs = declare_driven(
            mesh, name, KVEntry[str], mesh.kv_source("k.*", queue_group="g", on_init=on_init)
        )
        await mesh.catalog()
        stream = node_of(mesh).connection.jetstream()
        while not any(i.name[:2] == "g-" for i in await stream.consumers_info(f"KV_{CONTEXT_BUCKET}")):
            await asyncio.sleep(0.01)
        await mesh.kv.put("k.a", "1")
        assert ["1"] == [entry.value for entry in await take(inputs)]
        await restart()
        await mesh.kv.put("k.b", "2")
        await mesh.kv.put("k.c", "3")
        assert ["2", "3"] == [entry.value for entry in await take(inputs, 2)]


async def test_changes_that_a_closing_member_did_not_handle_go_to_another(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A change that it finished is not repeated; one that it fetched is delivered before its ack timeout."""
    started, closing, handled = asyncio.Event(), new_mesh(), asyncio.Queue[str]()
    for member in (closing, mesh):

        @member.agent(AgentSpec(name=name), sources=[member.kv_source(f"{name}.*", queue_group=name)])
        async def handler(entry: KVEntry[str]) -> None:
            started.set()
            await asyncio.sleep(0.05)
            handled.put_nowait(entry.key)

        if member is closing:
            async with closing:
                await mesh.kv.put(f"{name}.a", "x")
                await started.wait()
                await mesh.kv.put(f"{name}.b", "made while the only member is busy")
    await mesh.catalog()
    assert [f"{name}.a", f"{name}.b"] == await take(handled, 2)
    assert handled.empty()


async def test_the_ack_timeout_of_a_group_follows_the_current_settings(
    new_mesh: Callable[[], AgentMesh], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart with a longer timeout, another member gets an unfinished change later."""
    ack_timeouts = []
    for grace in (10.0, 20.0):
        monkeypatch.setattr("openagentmesh.serving.feeds._GROUP_GRACE_S", grace)
        async with new_mesh() as mesh:
            inputs = declare_driven(mesh, name, KVEntry[str], mesh.kv_source(f"{name}.*", queue_group=name))
            await mesh.kv.put(f"{name}.a", str(grace))
            await take(inputs)
            groups = await node_of(mesh).connection.jetstream().consumers_info(f"KV_{CONTEXT_BUCKET}")
            ack_timeouts += [group.config.ack_wait or 0 for group in groups if group.name.startswith(name)]
    assert [ack_timeouts[0] + 10.0] == ack_timeouts[1:]
