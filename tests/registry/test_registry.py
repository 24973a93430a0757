"""The registry and the catalog: at scale, after removals by peers, with malformed values."""

import asyncio
import time

import pytest
from openagentmesh import AgentMesh, AgentSpec, ConnectionFailed
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import decode_catalog
from openagentmesh.transport.server import EmbeddedServer

from tests.support.meshes import Text, node_of, serve
from tests.support.waiting import until


async def catalog_key(node: Node) -> list[str]:
    """The names in the catalog's single key."""
    document = await node.buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY)
    return [entry.name for entry in decode_catalog(document)]


async def test_thirty_hosts_that_start_together_all_register(url: str, mesh: AgentMesh, name: str) -> None:
    """Every agent of every host is in the catalog, and none is after their stop."""
    meshes = [AgentMesh(url) for _ in range(30)]
    for number, provider in enumerate(meshes):
        for part in range(3):
            serve(provider, f"{name}.h{number}.p{part}")
    await asyncio.gather(*[provider.__aenter__() for provider in meshes])
    listed = [entry.name for entry in await mesh.catalog(channel=name)]
    await asyncio.gather(*[provider.__aexit__(None, None, None) for provider in meshes])
    assert {f"{name}.h{n}.p{p}" for n in range(30) for p in range(3)} == set(listed)
    assert len(listed) == 90
    assert [] == await mesh.catalog(channel=name)


async def test_ten_thousand_agents_in_one_host() -> None:
    """They do not fit into the catalog's single key, but are listed, found and called."""
    server = EmbeddedServer()
    await server.start()
    provider = AgentMesh(server.url)
    for number in range(10_000):

        @provider.agent(AgentSpec(name=f"many.a{number}", description="one of many agents " * 4))
        async def same(req: Text) -> Text:
            return req

    async with provider, AgentMesh(server.url) as caller:
        began = time.perf_counter()
        listed = {entry.name for entry in await caller.catalog()}
        assert {f"many.a{number}" for number in range(10_000)} == listed
        assert 0 < len(await catalog_key(node_of(caller))) < 10_000
        assert time.perf_counter() - began < 20
        assert {"text": "x"} == await caller.call("many.a9999", {"text": "x"})
        assert "many.a9999" == (await caller.contract("many.a9999")).name
    await server.stop()


async def test_a_contract_that_a_peer_removes_is_published_again(
    mesh: AgentMesh, url: str, name: str
) -> None:
    """A replica of the published SDK deletes the contract when it stops; a live instance restores it."""
    serve(mesh, name)
    await mesh.catalog()  # the agent is registered
    async with AgentMesh(url) as other:
        assert [name] == [entry.name for entry in await other.catalog(channel=name)]
        node = node_of(other)
        await node.registry.withdraw([], everywhere=[name])

        async def is_listed() -> bool:
            return name in await catalog_key(node)

        await until(is_listed)
        assert name == (await other.contract(name)).name


async def test_publishing_a_removed_contract_is_retried(
    mesh: AgentMesh, url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the server does not answer in time, the contract is published later."""
    serve(mesh, name)
    await mesh.catalog()
    registry, failures = node_of(mesh).registry, 0
    restore = registry.restore

    async def restore_failing_twice() -> None:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise ConnectionFailed("no answer")
        await restore()

    monkeypatch.setattr(registry, "restore", restore_failing_twice)
    async with AgentMesh(url) as other:
        node = node_of(other)
        await node.registry.withdraw([], everywhere=[name])

        async def is_listed() -> bool:
            return name in await catalog_key(node)

        await until(is_listed)
        assert 2 == failures


@pytest.mark.parametrize("value", [b"", b"text", b"{}", b'["x", 1, null]', b'[{"name": 5}]', b"\xff"])
async def test_a_malformed_catalog_key_hides_no_agents(mesh: AgentMesh, name: str, value: bytes) -> None:
    """With any value in the key agents are listed, and the next registration repairs it."""
    serve(mesh, f"{name}.a")
    await mesh.catalog()
    node = node_of(mesh)
    await node.buckets.put(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY, value)
    assert [f"{name}.a"] == [entry.name for entry in await mesh.catalog(channel=name)]
    serve(mesh, f"{name}.b")
    assert {f"{name}.a", f"{name}.b"} == {entry.name for entry in await mesh.catalog(channel=name)}
    assert f"{name}.b" in await catalog_key(node)


async def test_a_malformed_contract_is_left_out(mesh: AgentMesh, name: str) -> None:
    """A registry key that is not a contract is left out of the catalog; all other agents are listed."""
    serve(mesh, f"{name}.good")
    await mesh.catalog()
    node = node_of(mesh)
    await node.buckets.put(subjects.REGISTRY_BUCKET, f"{name}.bad", b"{not a contract")
    assert [f"{name}.good"] == [entry.name for entry in await mesh.catalog(channel=name)]
    assert [f"{name}.good"] == [contract.name for contract in await mesh.discover(channel=name)]
    await node.buckets.delete_all(subjects.REGISTRY_BUCKET, [f"{name}.bad"])
