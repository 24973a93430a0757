"""One agent, served by the published SDK and by ours at once (protocol §2, §9)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openagentmesh import AgentMesh
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import decode_catalog

from tests.support.meshes import node_of
from tests.support.peers import OURS, CommandFailed, Peer, Script, interop_environment, wait_listed
from tests.support.waiting import until

# That one of two replicas gets none of so many calls does not happen.
ENOUGH = 100
Start = Callable[[str], Script]


@pytest.fixture
def start(stock_python: Path, stock: Peer, url: str, name: str) -> Iterator[Start]:
    """Starts a replica of one of the SDKs, run alone; it is there when this returns."""
    with ExitStack() as stack:

        def started(who: str) -> Script:
            python = stock_python if who == "stock" else OURS
            env = interop_environment(url, name, who)
            replica = stack.enter_context(Script(python, "replica.py", env))
            if who == "ours":
                replica.wait_for_log("serving 1 agent")
            else:
                wait_listed(stock, name, replica)
            return replica

        yield started


def who_answers(caller: Peer, name: str, count: int = ENOUGH) -> set[str]:
    """Who answers some calls; all are answered."""
    answers = caller.run("calls", name, {}, count)
    assert count == len(answers)
    return {answer["who"] for answer in answers}


async def is_published(mesh: AgentMesh, name: str) -> bool:
    """Whether an agent is in the catalog's key and in the registry, read from the server."""
    buckets = node_of(mesh).buckets
    document = await buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY)
    contract = await buckets.get(subjects.REGISTRY_BUCKET, name)
    return contract is not None and name in [entry.name for entry in decode_catalog(document)]


async def test_replicas_share_and_one_stays(
    start: Start, stock: Peer, ours: Peer, mesh: AgentMesh, name: str
) -> None:
    """Both answer; the stock one that stops takes the entry with it, and ours puts it back."""
    theirs, mine = start("stock"), start("ours")
    for caller in (stock, ours):
        assert {"stock", "ours"} == who_answers(caller, name)
    assert 0 == theirs.interrupt()

    await until(lambda: is_published(mesh, name))
    for caller in (stock, ours):
        assert {"ours"} == who_answers(caller, name)
        assert name == caller.run("contract", name)["name"]
    assert 0 == mine.interrupt(), mine.log
    assert not await is_published(mesh, name)


def test_a_stock_replica_stays_when_ours_stops(start: Start, stock: Peer, ours: Peer, name: str) -> None:
    """Callers of both SDKs are answered by the stock replica."""
    _, mine = start("stock"), start("ours")
    assert 0 == mine.interrupt(), mine.log
    for caller in (stock, ours):
        assert {"stock"} == who_answers(caller, name, 10)


@pytest.mark.parametrize("who", ["stock", "ours"])
def test_a_slow_stock_replica_stays_when_ours_stops(
    start: Start, callers: dict[str, Peer], name: str, who: str
) -> None:
    """It is waited for, although ours has taken the entry out of the catalog."""
    _, mine = start("stock"), start("ours")
    assert 0 == mine.interrupt(), mine.log
    assert {"who": "stock"} == callers[who].run("call", name, {"seconds": 1})


@pytest.mark.parametrize("who", ["stock", "ours"])
def test_what_a_stock_replica_works_at_when_ours_stops(
    start: Start, callers: dict[str, Peer], name: str, who: str, tmp_path: Path
) -> None:
    """Its caller gets the answer: the stop of another replica is no death of the agent."""
    theirs, release = start("stock"), tmp_path / "release"
    call = callers[who].start("call", name, {"until": str(release)})
    theirs.wait_for_log("holding")
    mine = start("ours")
    assert 0 == mine.interrupt(), mine.log
    release.touch()
    assert {"who": "stock"} == call.result()


def test_a_killed_stock_provider(start: Start, ours: Peer, name: str) -> None:
    """It leaves its entry behind, so our caller says `not_available`."""
    start("stock").kill()
    with pytest.raises(CommandFailed) as caught:
        ours.run("call", name, {})
    assert ("NotAvailable", name) == (caught.value.type, caught.value.agent)
