"""Instances with incompatible contracts for one agent: warned about, refused, or allowed."""

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

INCOMPATIBLE = "contract incompatible with the one of another live instance"


class Old(BaseModel):
    text: str


class Wider(BaseModel):
    text: str
    language: str = "en"


class Other(BaseModel):
    document: str


class Stricter(BaseModel):
    text: str
    language: str


def agent(name: str, model: type[BaseModel]) -> AgentVersion:
    """An agent with the input type `model`, whose answer is the type's name."""

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


async def test_an_incompatible_contract_is_warned_about(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `warn` the agent is served, after a warning with its name and the breaking change."""
    caplog.set_level(logging.WARNING)
    async with serving(url, agent(name, Old), "warn"), serving(url, agent(name, Other), "warn") as node:
        assert not node.refused
        assert node.router.get(name) is not None
    [warning] = [message for message in caplog.messages if INCOMPATIBLE in message]
    assert name in warning
    assert "'document'" in warning


async def test_an_incompatible_contract_is_refused(url: str, name: str, mesh: AgentMesh) -> None:
    """With `refuse` the new instance joins no queue group, and the published contract stays."""
    async with serving(url, agent(name, Old), "warn"), serving(url, agent(name, Other), "refuse") as node:
        assert node.router.get(name) is None
        assert "'document'" in node.refused[name]
        assert node.refused == node.status().refused
        assert ["Old"] * 20 == [await mesh.call(name, {"text": "x"}) for _ in range(20)]
        schema = (await mesh.contract(name)).input_schema
        assert schema is not None
        assert ["text"] == list(schema["properties"])


@pytest.mark.parametrize(("first", "second"), [(Old, Stricter), (Stricter, Old)])
async def test_input_must_be_compatible_both_ways(
    url: str, name: str, first: type[BaseModel], second: type[BaseModel]
) -> None:
    """Replicas receive each other's requests, so a new required field is refused whichever instance joins."""
    async with (
        serving(url, agent(name, first), "refuse"),
        serving(url, agent(name, second), "refuse") as node,
    ):
        assert "'language'" in node.refused[name]


async def test_a_refused_instance_does_not_withdraw_the_agent(url: str, name: str, mesh: AgentMesh) -> None:
    """When an instance whose agent was refused stops, the agent stays in the catalog and answers."""
    async with serving(url, agent(name, Old), "warn"):
        async with serving(url, agent(name, Other), "refuse"):
            pass
        assert name in {entry.name for entry in await mesh.catalog()}
        assert "Old" == await mesh.call(name, {"text": "x"})


@pytest.mark.parametrize("policy", ["warn", "refuse"])
async def test_compatible_contracts_are_neither_warned_about_nor_refused(
    url: str, name: str, policy: ContractPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    """A new optional field is no breaking change, so that a rolling upgrade works."""
    async with serving(url, agent(name, Old), policy), serving(url, agent(name, Wider), policy) as node:
        assert node.router.get(name) is not None
    assert INCOMPATIBLE not in caplog.text


async def test_contracts_are_not_compared_with_the_policy_allow(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With `allow` an incompatible contract is served without a warning."""
    async with serving(url, agent(name, Old), "allow"), serving(url, agent(name, Other), "allow") as node:
        assert node.router.get(name) is not None
    assert INCOMPATIBLE not in caplog.text


async def test_only_contracts_of_live_instances_are_compared(url: str, name: str) -> None:
    """An instance with an incompatible contract is not refused after the other one has stopped."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(url, agent(name, Old), "refuse"))
    async with serving(url, agent(name, Other), "refuse") as node:
        assert not node.refused
