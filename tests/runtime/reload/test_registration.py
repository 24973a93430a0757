"""Agents that change while they are being registered, and registrations that fail."""

import asyncio
from typing import Any

import pytest
from openagentmesh import MeshTimeout
from openagentmesh.mesh import reconciler
from openagentmesh.mesh.node import Node
from openagentmesh.registry.presence import Presence, read_records
from openagentmesh.registry.registry import Registry

from tests.support.host_bench import Bench
from tests.support.modules import MESH, agent
from tests.support.waiting import until


class Registration:
    """Events: a registration has `compared` contracts, and may `proceed`."""

    def __init__(self) -> None:
        self.compared, self.proceed = asyncio.Event(), asyncio.Event()
        self.proceed.set()


@pytest.fixture
def registration(monkeypatch: pytest.MonkeyPatch) -> Registration:
    """Registrations that wait for the test, after they have compared the contracts of other hosts."""
    created, check = Registration(), Node._check_conflicts

    async def check_and_wait(self: Node, names: Any) -> None:
        await check(self, names)
        created.compared.set()
        await created.proceed.wait()

    monkeypatch.setattr(Node, "_check_conflicts", check_and_wait)
    return created


async def test_a_reload_during_a_registration_keeps_the_newest_version(
    bench: Bench, registration: Registration
) -> None:
    """A version that is saved while the contract of the previous one is published is the one that serves."""

    def version(result: int, number: str) -> dict[str, str]:
        return {
            "a.py": f"{MESH}@mesh.agent(AgentSpec(name={bench.name!r}, version={number!r}))\n"
            f"async def handler(req: dict) -> int:\n    return {result}\n"
        }

    async with bench.serve(version(1, "1.0.0")) as host:
        registration.compared.clear()
        registration.proceed.clear()
        await bench.reloaded(version(2, "2.0.0"))
        await registration.compared.wait()
        await bench.reloaded(version(3, "2.0.0"))
        registration.proceed.set()
        await host.node.wait_served()
        assert 3 == await bench.call()


async def test_an_agent_removed_and_restored_during_its_registration_serves(
    bench: Bench, registration: Registration
) -> None:
    """A new file is deleted and written again before its agent is registered: the agent serves."""
    files = {"a.py": MESH + agent(f"{bench.name}.a")}
    async with bench.serve({"z.py": MESH + agent(f"{bench.name}.z")}) as host:
        registration.compared.clear()
        registration.proceed.clear()
        await bench.reloaded(files)
        await registration.compared.wait()
        bench.path("a.py").unlink()
        await bench.reloaded()
        await bench.reloaded(files)
        registration.proceed.set()
        await host.node.wait_served()
        await host.wait_retired()
        assert "ok" == await bench.call(".a")


async def test_an_agent_removed_during_the_comparison_of_its_contract_is_not_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is deleted while its contract is compared is not reported as refused."""
    compared, proceed = asyncio.Event(), asyncio.Event()

    async def served_elsewhere(_: Presence) -> set[str]:
        return {f"{bench.name}.b"}

    async def conflicts(_: Registry, contracts: Any) -> dict[str, list[str]]:
        names = [contract.name for contract in contracts]
        if names:
            compared.set()
            await proceed.wait()
        return {name: ["input changed"] for name in names}

    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}, contract="refuse") as host:
        monkeypatch.setattr(Presence, "served_elsewhere", served_elsewhere)
        monkeypatch.setattr(Registry, "conflicts", conflicts)
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b")})
        await compared.wait()
        bench.path("b.py").unlink()
        await bench.reloaded()
        proceed.set()
        await host.node.reconciler.wait_idle()
        assert {} == host.node.refused


async def test_a_failed_registration_is_retried(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails while the connection stays is retried without a reconnect."""
    monkeypatch.setattr(reconciler, "_FIRST_RETRY_S", 0.05)
    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}) as host:
        restore, failures = Presence.restore, list[int]()

        async def fail_once(self: Presence) -> None:
            if not failures:
                failures.append(1)
                raise MeshTimeout("the server did not answer")
            await restore(self)

        monkeypatch.setattr(Presence, "restore", fail_once)
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b")})
        await bench.listed(".a", ".b")

        async def is_recorded() -> bool:
            records = await read_records(host.node.buckets)
            return f"{bench.name}.b" in records[host.node.instance_id].agents

        await until(is_recorded)
        assert failures


async def test_a_contract_above_the_max_payload_is_refused(bench: Bench) -> None:
    """The error has both sizes, and later agents are registered."""
    big = f"{MESH}@mesh.agent(AgentSpec(name={bench.name + '.big'!r}, description='x' * 1_200_000))\n"
    big += "async def big(req: dict) -> int:\n    return 1\n"
    async with bench.serve({"a.py": MESH + agent(f"{bench.name}.a")}):
        result = await bench.refused({"big.py": big})
        assert "its contract has 2400" in result.error
        assert "the server's max_payload is 1048576" in result.error
        await bench.reloaded({"c.py": MESH + agent(f"{bench.name}.c")})
        await bench.listed(".a", ".c")
