"""The handle: registering, verbs, local meshes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, AgentSpec, CatalogEntry, ConnectionFailed, InvalidAgent, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.protocol.status import AgentStatus, NodeStatus

from tests.support.meshes import Text, node_of, serve


async def test_before_connecting_every_verb_says_so() -> None:
    """A mesh outside its `async with` raises ConnectionFailed that says what to do."""
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


async def test_entering_twice_is_refused(new_mesh: Callable[[], AgentMesh]) -> None:
    """One mesh is one connection; a second `async with` inside the first is an error."""
    async with new_mesh() as mesh:
        with pytest.raises(ConnectionFailed, match="already"):
            await mesh.__aenter__()


async def test_an_agent_declared_while_connected_is_up_for_the_next_verb(mesh: AgentMesh, name: str) -> None:
    """The next call, and the next catalog, know an agent that was declared just before."""
    serve(mesh, name)
    assert {"text": "ok"} == await mesh.call(name, {})
    serve(mesh, f"{name}.b")
    assert [name, f"{name}.b"] == [entry.name for entry in await mesh.catalog(channel=name)]


async def test_declaring_a_name_again_replaces_the_handler(mesh: AgentMesh, name: str) -> None:
    """The new handler and the new contract serve, and the catalog moves the name to its end."""
    serve(mesh, name, "old")
    serve(mesh, f"{name}.other")
    assert {"text": "old"} == await mesh.call(name, {})
    serve(mesh, name, "new", version="2.0.0")
    assert {"text": "new"} == await mesh.call(name, {})
    assert [f"{name}.other", name] == [entry.name for entry in await mesh.catalog(channel=name)]
    assert "2.0.0" == (await mesh.contract(name)).version


async def test_the_decorator_without_parentheses_is_refused() -> None:
    """`@mesh.agent` alone would register nothing; it is an error that shows the right form."""
    mesh = AgentMesh()

    async def lost(req: Text) -> Text:
        return req

    with pytest.raises(InvalidAgent, match=r"@mesh\.agent\(AgentSpec.*'lost'"):
        mesh.agent(lost)  # type: ignore[arg-type]


async def test_a_decorated_function_stays_a_function(new_mesh: Callable[[], AgentMesh], name: str) -> None:
    """A handler can be called and tested without any mesh."""

    @new_mesh().agent(AgentSpec(name=name))
    async def handler(req: Text) -> Text:
        return req

    assert Text(text="x") == await handler(Text(text="x"))


async def test_the_docstring_is_the_default_description(mesh: AgentMesh, name: str) -> None:
    """A spec without a description takes the handler's docstring."""

    @mesh.agent(AgentSpec(name=name))
    async def handler(req: Text) -> Text:
        """Says it all."""
        return req

    assert "Says it all." == (await mesh.contract(name)).description


async def test_the_catalog_can_be_filtered(mesh: AgentMesh, name: str) -> None:
    """Channel, tags, streaming and invocable each narrow the list, all of them together too."""
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


async def test_discover_gives_full_contracts(mesh: AgentMesh, name: str) -> None:
    """Each contract has the schemas that the catalog leaves out."""
    serve(mesh, name)
    [contract] = await mesh.discover(channel=name)
    assert await mesh.contract(name) == contract
    assert contract.input_schema is not None
    assert {"text"} == set(contract.input_schema["properties"])


async def test_an_unknown_contract_is_not_found(mesh: AgentMesh, name: str) -> None:
    """Names that nobody has, and names that nobody can have."""
    for wrong in (name, "no good", "", "*", "a..b"):
        with pytest.raises(NotFound):
            await mesh.contract(wrong)


async def test_a_local_mesh_serves_what_was_declared() -> None:
    """`mesh.local()` is the same mesh with its agents, on a server of its own, and goes away."""
    mesh = AgentMesh("nats://nowhere.invalid:4222")
    serve(mesh, "one")
    async with mesh.local() as same:
        assert same is mesh
        assert mesh.url.startswith("nats://127.0.0.1:")
        assert {"text": "ok"} == await mesh.call("one", {})
    assert "nats://nowhere.invalid:4222" == mesh.url
    with pytest.raises(ConnectionFailed):
        await mesh.call("one", {})


async def test_local_of_the_class_is_a_new_mesh() -> None:
    """`AgentMesh.local()` starts empty, and agents declared inside are served."""
    async with AgentMesh.local() as mesh:
        assert [] == await mesh.catalog()
        serve(mesh, "two")
        assert [CatalogEntry(name="two", description="d")] == await mesh.catalog()
        assert {"text": "ok"} == await mesh.call("two", {})


async def test_leaving_deregisters(mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str) -> None:
    """After a clean stop the agent is in no list any more, and nobody answers for it."""
    provider = new_mesh()
    serve(provider, name)
    async with provider:
        assert {"text": "ok"} == await mesh.call(name, {})
    assert [] == await mesh.catalog(channel=name)
    with pytest.raises(NotFound):
        await mesh.call(name, {}, timeout=5)


async def test_one_of_two_replicas_leaves(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """While another instance serves an agent, it stays in the catalog and answers."""
    first, second = new_mesh(), new_mesh()
    serve(first, name, "first")
    serve(second, name, "second")
    async with first:
        async with second:
            answers = [(await mesh.call(name, {}))["text"] for _ in range(40)]
        assert {"first", "second"} == set(answers)
        assert [name] == [entry.name for entry in await mesh.catalog(channel=name)]
        assert {"text": "first"} == await mesh.call(name, {})


async def test_a_mesh_can_be_used_again(new_mesh: Callable[[], AgentMesh], name: str) -> None:
    """After leaving, the same mesh connects and serves once more."""
    mesh = new_mesh()
    serve(mesh, name)
    for _ in range(2):
        async with mesh:
            assert {"text": "ok"} == await mesh.call(name, {})


async def test_calls_of_one_mesh_run_side_by_side(mesh: AgentMesh, name: str) -> None:
    """Many calls under way at once each get their own answer."""

    @mesh.agent(AgentSpec(name=name))
    async def same(req: Text) -> Text:
        return req

    texts = [f"{n}é\n\"'" for n in range(300)]
    results = await asyncio.gather(*[mesh.call(name, Text(text=text)) for text in texts])
    assert texts == [result["text"] for result in results]


async def test_a_host_with_much_to_tell_tells_what_fits(mesh: AgentMesh) -> None:
    """Whoever asks gets an answer, however long the words of the agents' last errors are."""
    node = node_of(mesh)
    node.status = lambda: NodeStatus(agents=[AgentStatus(name="a", last_error="é" * 1000)] * 1000)
    answer = await node.inbox.request(subjects.host(mesh.instance_id, "info"), timeout=10)
    told = json.loads(answer.body)["agents"]
    assert 100 < len(told) < 1000
    assert len(answer.body) <= node.connection.max_payload
