"""Replicas of one agent, served by the published SDK and by ours at once (protocol §2, §9)."""

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

# So many calls that each of two replicas receives some.
CALLS = 100
Start = Callable[[str], Script]


@pytest.fixture
def start(published_python: Path, published: Peer, url: str, name: str) -> Iterator[Start]:
    """Starts a replica with one of the SDKs, and waits until it serves."""
    with ExitStack() as stack:

        def started(sdk: str) -> Script:
            python = published_python if sdk == "published" else OURS
            env = interop_environment(url, name, sdk)
            replica = stack.enter_context(Script(python, "replica.py", env))
            if sdk == "ours":
                replica.wait_for_log("serving 1 agent")
            else:
                wait_listed(published, name, replica)
            return replica

        yield started


def replicas_that_answer(caller: Peer, name: str, count: int = CALLS) -> set[str]:
    """The replicas that answer so many calls."""
    answers = caller.run("calls", name, {}, count)
    assert count == len(answers)
    return {answer["replica"] for answer in answers}


async def is_published(mesh: AgentMesh, name: str) -> bool:
    """Whether an agent is in the catalog's key and in the registry, read from the server."""
    buckets = node_of(mesh).buckets
    document = await buckets.get(subjects.CATALOG_BUCKET, subjects.CATALOG_KEY)
    contract = await buckets.get(subjects.REGISTRY_BUCKET, name)
    return contract is not None and name in [entry.name for entry in decode_catalog(document)]


async def test_replicas_share_calls_until_one_stops(
    start: Start, published: Peer, ours: Peer, mesh: AgentMesh, name: str
) -> None:
    """Both answer; the published one removes the entry when it stops, and ours restores it."""
    theirs, mine = start("published"), start("ours")
    for caller in (published, ours):
        assert {"published", "ours"} == replicas_that_answer(caller, name)
    assert 0 == theirs.interrupt()

    await until(lambda: is_published(mesh, name))
    for caller in (published, ours):
        assert {"ours"} == replicas_that_answer(caller, name)
        assert name == caller.run("contract", name)["name"]
    assert 0 == mine.interrupt(), mine.log
    assert not await is_published(mesh, name)


def test_a_published_replica_answers_after_ours_has_stopped(
    start: Start, published: Peer, ours: Peer, name: str
) -> None:
    """After ours has stopped, the published replica answers callers of both SDKs."""
    _, mine = start("published"), start("ours")
    assert 0 == mine.interrupt(), mine.log
    for caller in (published, ours):
        assert {"published"} == replicas_that_answer(caller, name, 10)


@pytest.mark.parametrize("sdk", ["published", "ours"])
def test_a_slow_published_replica_answers_after_ours_has_stopped(
    start: Start, callers: dict[str, Peer], name: str, sdk: str
) -> None:
    """A caller waits for its reply, although ours has removed the agent from the catalog."""
    _, mine = start("published"), start("ours")
    assert 0 == mine.interrupt(), mine.log
    assert {"replica": "published"} == callers[sdk].run("call", name, {"seconds": 1})


@pytest.mark.parametrize("sdk", ["published", "ours"])
def test_a_running_call_of_a_published_replica_is_answered_after_ours_has_stopped(
    start: Start, callers: dict[str, Peer], name: str, sdk: str, tmp_path: Path
) -> None:
    """The caller gets the answer: when another replica stops, the agent has not died."""
    theirs, release = start("published"), tmp_path / "release"
    call = callers[sdk].start("call", name, {"until": str(release)})
    theirs.wait_for_log("holding")
    mine = start("ours")
    assert 0 == mine.interrupt(), mine.log
    release.touch()
    assert {"replica": "published"} == call.result()


def test_a_killed_published_provider_is_not_available(start: Start, ours: Peer, name: str) -> None:
    """Its catalog entry is not removed, so our caller raises `not_available`."""
    start("published").kill()
    with pytest.raises(CommandFailed) as caught:
        ours.run("call", name, {})
    assert ("NotAvailable", name) == (caught.value.type, caught.value.agent)
