"""AgentMesh: declaring agents, the catalog, connecting and closing, local meshes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, AgentSpec, CatalogEntry, ConnectionFailed, InvalidAgent, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.protocol.status import AgentStatus, NodeStatus

from tests.support.meshes import Text, node_of, serve


async def test_every_verb_raises_connection_failed_without_a_connection() -> None:
    """Outside of `async with mesh:` the error names what to do."""
    mesh = AgentMesh()
    for verb in (
        mesh.call("x"),
        mesh.catalog(),
        mesh.contract("x"),
        mesh.discover(),
        anext(mesh.stream("x")),
    ):
        with pytest.raises(ConnectionFailed, match="async with mesh"):
            await verb


async def test_entering_a_connected_mesh_is_rejected(new_mesh: Callable[[], AgentMesh]) -> None:
    """A second `async with` inside the first one raises ConnectionFailed."""
    async with new_mesh() as mesh:
        with pytest.raises(ConnectionFailed, match="already"):
            await mesh.__aenter__()


async def test_an_agent_declared_while_connected_is_served_before_the_next_verb(
    mesh: AgentMesh, name: str
) -> None:
    """The next call reaches it, and the next catalog lists it."""
    serve(mesh, name)
    assert {"text": "ok"} == await mesh.call(name, {})
    serve(mesh, f"{name}.b")
    assert [name, f"{name}.b"] == [entry.name for entry in await mesh.catalog(channel=name)]


async def test_declaring_a_name_again_replaces_the_agent(mesh: AgentMesh, name: str) -> None:
    """Handler and contract are replaced, and the name moves to the end of the catalog."""
    serve(mesh, name, "old")
    serve(mesh, f"{name}.other")
    assert {"text": "old"} == await mesh.call(name, {})
    serve(mesh, name, "new", version="2.0.0")
    assert {"text": "new"} == await mesh.call(name, {})
    assert [f"{name}.other", name] == [entry.name for entry in await mesh.catalog(channel=name)]
    assert "2.0.0" == (await mesh.contract(name)).version


async def test_the_decorator_without_parentheses_is_rejected() -> None:
    """`@mesh.agent` alone would register nothing; the error shows the correct form."""
    mesh = AgentMesh()

    async def undeclared(req: Text) -> Text:
        return req

    with pytest.raises(InvalidAgent, match=r"@mesh\.agent\(AgentSpec.*'undeclared'"):
        mesh.agent(undeclared)  # type: ignore[arg-type]


async def test_a_decorated_function_can_be_called_directly(
    new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """A handler can be called and tested without a connection."""

    @new_mesh().agent(AgentSpec(name=name))
    async def handler(req: Text) -> Text:
        return req

    assert Text(text="x") == await handler(Text(text="x"))


async def test_the_docstring_is_the_default_description(mesh: AgentMesh, name: str) -> None:
    """The description of a spec without one is the handler's docstring."""

    @mesh.agent(AgentSpec(name=name))
    async def handler(req: Text) -> Text:
        """Repeat the input."""
        return req

    assert "Repeat the input." == (await mesh.contract(name)).description


async def test_the_catalog_can_be_filtered(mesh: AgentMesh, name: str) -> None:
    """By channel, tags, streaming and invocable, and by several of them together."""
    serve(mesh, f"{name}.a", tags=["x", "y"])
    serve(mesh, f"{name}.a.deep", tags=["x"])

    @mesh.agent(AgentSpec(name=f"{name}.s", tags=["y"]))
    async def stream(req: Text) -> AsyncIterator[Text]:
        yield req

    async def names(**filters: object) -> list[str]:
        found = await mesh.catalog(**{"channel": name} | filters)  # type: ignore[arg-type]
        return [entry.name.removeprefix(f"{name}.") for entry in found]

    assert ["a", "a.deep", "s"] == await names()
    assert ["a", "a.deep"] == await names(channel=f"{name}.a")
    assert ["a"] == await names(tags=["x", "y"])
    assert ["s"] == await names(streaming=True)
    assert ["a", "a.deep"] == await names(streaming=False)
    assert [] == await names(invocable=False)
    assert [] == await names(channel=f"{name}.a", streaming=True)
    assert [] == await names(channel=name[:-1] + "zzz")


async def test_discover_returns_full_contracts(mesh: AgentMesh, name: str) -> None:
    """Each contract has the schemas, which the catalog does not contain."""
    serve(mesh, name)
    [contract] = await mesh.discover(channel=name)
    assert await mesh.contract(name) == contract
    assert contract.input_schema is not None
    assert {"text"} == set(contract.input_schema["properties"])


async def test_an_unknown_contract_is_not_found(mesh: AgentMesh, name: str) -> None:
    """For unregistered names, and for invalid ones."""
    for unknown in (name, "a b", "", "*", "a..b"):
        with pytest.raises(NotFound):
            await mesh.contract(unknown)


async def test_a_local_mesh_serves_the_declared_agents() -> None:
    """`mesh.local()` is the same mesh with its agents, on an embedded server that is stopped at the end."""
    mesh = AgentMesh("nats://nowhere.invalid:4222")
    serve(mesh, "one")
    async with mesh.local() as same:
        assert same is mesh
        assert mesh.url.startswith("nats://127.0.0.1:")
        assert {"text": "ok"} == await mesh.call("one", {})
    assert "nats://nowhere.invalid:4222" == mesh.url
    with pytest.raises(ConnectionFailed):
        await mesh.call("one", {})


async def test_local_of_the_class_creates_a_new_mesh() -> None:
    """`AgentMesh.local()` has no agents at first, and serves those declared in its block."""
    async with AgentMesh.local() as mesh:
        assert [] == await mesh.catalog()
        serve(mesh, "two")
        assert [CatalogEntry(name="two", description="d")] == await mesh.catalog()
        assert {"text": "ok"} == await mesh.call("two", {})


async def test_closing_a_mesh_deregisters_its_agents(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Afterwards the agent is not in the catalog, and calls raise NotFound."""
    provider = new_mesh()
    serve(provider, name)
    async with provider:
        assert {"text": "ok"} == await mesh.call(name, {})
    assert [] == await mesh.catalog(channel=name)
    with pytest.raises(NotFound):
        await mesh.call(name, {}, timeout=5)


async def test_an_agent_stays_registered_while_a_replica_serves_it(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """Two replicas share the requests; after one has stopped, the other one answers."""
    first, second = new_mesh(), new_mesh()
    serve(first, name, "first")
    serve(second, name, "second")
    async with first:
        async with second:
            answers = [(await mesh.call(name, {}))["text"] for _ in range(40)]
        assert {"first", "second"} == set(answers)
        assert [name] == [entry.name for entry in await mesh.catalog(channel=name)]
        assert {"text": "first"} == await mesh.call(name, {})


async def test_a_closed_mesh_can_be_connected_again(new_mesh: Callable[[], AgentMesh], name: str) -> None:
    """It serves the same agents as before."""
    mesh = new_mesh()
    serve(mesh, name)
    for _ in range(2):
        async with mesh:
            assert {"text": "ok"} == await mesh.call(name, {})


async def test_calls_of_one_mesh_are_concurrent(mesh: AgentMesh, name: str) -> None:
    """Of many concurrent calls each gets its own answer."""

    @mesh.agent(AgentSpec(name=name))
    async def same(req: Text) -> Text:
        return req

    texts = [f"{n}é\n\"'" for n in range(300)]
    results = await asyncio.gather(*[mesh.call(name, Text(text=text)) for text in texts])
    assert texts == [result["text"] for result in results]


async def test_the_status_of_many_agents_is_shortened_to_one_message(mesh: AgentMesh) -> None:
    """The reply to `oam status` has as many agents as fit, however long their last errors are."""
    node = node_of(mesh)
    node.status = lambda: NodeStatus(
        instance_id="i", agents=[AgentStatus(name="a", last_error="é" * 1000)] * 1000
    )
    answer = await node.inbox.request(subjects.host(mesh.instance_id, "info"), timeout=10)
    agents = json.loads(answer.body)["agents"]
    assert 100 < len(agents) < 1000
    assert len(answer.body) <= node.connection.max_payload
