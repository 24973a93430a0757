"""Two contracts under one name: told loudly, refused, or let be."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from openagentmesh import AgentMesh, AgentSpec
from openagentmesh.agent.agent import AgentVersion, declare
from openagentmesh.agent.handler import TypeCache
from openagentmesh.mesh.node import ContractPolicy, Node
from openagentmesh.protocol.codec import new_id
from openagentmesh.transport.connection import Target
from pydantic import BaseModel


class Old(BaseModel):
    text: str


class Wider(BaseModel):
    text: str
    language: str = "en"


class Other(BaseModel):
    document: str


def agent(name: str, model: type[BaseModel]) -> AgentVersion:
    async def handler(req: BaseModel) -> str:
        return model.__name__

    handler.__annotations__["req"] = model
    return declare(AgentSpec(name=name, description="d"), handler, TypeCache())


@asynccontextmanager
async def serving(url: str, served: AgentVersion, policy: ContractPolicy) -> AsyncIterator[Node]:
    node = Node(Target(url), new_id(), contract_policy=policy)
    await node.start([served])
    try:
        yield node
    finally:
        await node.stop(1)


async def test_an_incompatible_contract_is_told_loudly(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By default it is served all the same, after a warning that names the agent and the change."""
    caplog.set_level(logging.WARNING)
    async with serving(url, agent(name, Old), "warn"), serving(url, agent(name, Other), "warn") as node:
        assert not node.refused
        assert node.router.get(name) is not None
    [told] = [r.getMessage() for r in caplog.records if "incompatible" in r.getMessage()]
    assert name in told
    assert "'document'" in told


async def test_an_incompatible_contract_is_refused_where_that_is_the_policy(
    url: str, name: str, mesh: AgentMesh
) -> None:
    """With `refuse` the newcomer joins no queue group, changes no contract, and says why."""
    async with serving(url, agent(name, Old), "warn"), serving(url, agent(name, Other), "refuse") as node:
        assert node.router.get(name) is None
        assert "'document'" in node.refused[name]
        assert node.refused == node.status().refused
        assert ["Old"] * 20 == [await mesh.call(name, {"text": "x"}) for _ in range(20)]
        schema = (await mesh.contract(name)).input_schema
        assert schema is not None
        assert ["text"] == list(schema["properties"])


async def test_what_was_refused_does_not_withdraw_the_others(url: str, name: str, mesh: AgentMesh) -> None:
    """When a host that was refused stops, the agent stays in the catalog and answers."""
    async with serving(url, agent(name, Old), "warn"):
        async with serving(url, agent(name, Other), "refuse"):
            pass
        assert name in {entry.name for entry in await mesh.catalog()}
        assert "Old" == await mesh.call(name, {"text": "x"})


@pytest.mark.parametrize("policy", ["warn", "refuse"])
async def test_contracts_that_go_together_share_the_requests(
    url: str, name: str, policy: ContractPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """A new optional field is no reason to warn or to refuse: a rolling upgrade works."""
    async with serving(url, agent(name, Old), policy), serving(url, agent(name, Wider), policy) as node:
        assert node.router.get(name) is not None
    assert not [r for r in caplog.records if "incompatible" in r.getMessage()]


async def test_nothing_is_compared_where_that_is_the_policy(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `allow` nobody is warned."""
    async with serving(url, agent(name, Old), "allow"), serving(url, agent(name, Other), "allow") as node:
        assert node.router.get(name) is not None
    assert not [r for r in caplog.records if "incompatible" in r.getMessage()]


async def test_only_live_instances_count(url: str, name: str) -> None:
    """A contract that nobody serves any more is replaced without a word."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(url, agent(name, Old), "refuse"))
    async with serving(url, agent(name, Other), "refuse") as node:
        assert not node.refused
