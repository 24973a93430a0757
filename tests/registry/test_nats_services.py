"""NATS' own tools find our agents: `$SRV.PING`, `INFO` and `STATS`, as its client writes and reads them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.micro import add_service
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats, ServiceVerb, control_subject
from openagentmesh import AgentMesh, AgentSpec, ConnectionFailed, Host, MeshError, PermissionDenied
from openagentmesh.registry import nats_services
from openagentmesh.registry.presence import Presence
from openagentmesh.runtime.config import Config, HostSection, MeshSection

from tests.support.meshes import node_of
from tests.support.modules import MESH, agent, write
from tests.support.servers import running_server
from tests.support.waiting import until


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    """The official client, as NATS' tools are built on one."""
    connected = await nats.connect(url)
    yield connected
    await connected.close()


async def ask(client: Client, verb: str, name: str | None = None, id_: str | None = None) -> list[Any]:
    """All answers that come before the server has answered something that was asked later."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    subject = control_subject(ServiceVerb[verb], name, id_)
    await client.publish(subject, b"", reply=inbox)
    await client.flush()
    found = []
    while True:
        try:
            answer = await answers.next_msg(timeout=0.3)
            if answer.data:  # without, it is NATS' word that nobody is there
                found.append(json.loads(answer.data))
        except nats.errors.TimeoutError:
            await answers.unsubscribe()
            return found


async def ours(client: Client, verb: str, name: str) -> list[Any]:
    """The answers about agents of one test."""
    return [each for each in await ask(client, verb) if each["metadata"].get("agent", "").startswith(name)]


@pytest.fixture
async def serving(url: str, name: str) -> AsyncIterator[AgentMesh]:
    mesh = AgentMesh(url)

    @mesh.agent(AgentSpec(name=f"{name}.asked", description="Answers.", version="1.2.3", tags=["a", "b"]))
    async def asked(what: str) -> str:
        if what == "refuse":
            raise PermissionDenied("not you")
        if what == "odd":
            raise ValueError("?" * 10_000)
        await asyncio.sleep(0.01)
        return what

    @mesh.agent(AgentSpec(name=f"{name}.counts", version="first"))
    async def counts(number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    @mesh.agent(AgentSpec(name=f"{name}.ticks"))
    async def ticks() -> AsyncIterator[int]:
        await asyncio.sleep(60)
        yield 1

    async with mesh:
        yield mesh


async def test_agents_are_listed_as_services(serving: AgentMesh, client: Client, name: str) -> None:
    """Those that can be called, by names that NATS allows; the true name and version are in the metadata."""
    found = [ServicePing.from_dict(each) for each in await ours(client, "PING", name)]
    assert [(f"{name}-asked", "1.2.3"), (f"{name}-counts", "0.0.0")] == sorted(
        (ping.name, ping.version) for ping in found
    )
    assert {"io.nats.micro.v1.ping_response"} == {ping.type for ping in found}
    assert 2 == len({ping.id for ping in found})
    [counts] = [ping.metadata for ping in found if ping.name == f"{name}-counts"]
    assert {
        "agent": f"{name}.counts", "version": "first", "kind": "streamer", "tags": "", "active": "yes",
        "instance_id": node_of(serving).instance_id,
    } == counts  # fmt: skip


async def test_one_service_is_described(serving: AgentMesh, client: Client, name: str) -> None:
    """By name, and by name and id: where it is asked, and what it is for. Nobody else answers."""
    [id_] = [each["id"] for each in await ask(client, "PING", f"{name}-asked")]
    for asked in ((f"{name}-asked", None), (f"{name}-asked", id_)):
        [answer] = await ask(client, "INFO", *asked)
        info = ServiceInfo.from_dict(answer)
        assert ("Answers.", "io.nats.micro.v1.info_response") == (info.description, info.type)
        [endpoint] = info.endpoints
        reply = await client.request(endpoint.subject, b'"hi"', timeout=5)
        assert b'"hi"' == reply.data
        assert endpoint.queue_group
    for asked in ((f"{name}-nobody", None), (f"{name}-asked", "other"), (f"{name}.asked", None)):
        assert [] == await ask(client, "INFO", *asked)


async def test_statistics_agree_with_what_was_asked(serving: AgentMesh, client: Client, name: str) -> None:
    """Requests, errors, the last one, and how long the handlers took."""
    for what in ("hi", "refuse", "hi", "odd"):
        try:
            await serving.call(f"{name}.asked", what)
        except MeshError:
            assert what in {"refuse", "odd"}
    assert [0, 1, 2] == [number async for number in serving.stream(f"{name}.counts", 3)]
    [answer] = await ask(client, "STATS", f"{name}-asked")
    stats = ServiceStats.from_dict(answer)
    [endpoint] = stats.endpoints
    assert (4, 2) == (endpoint.num_requests, endpoint.num_errors)
    assert str(endpoint.last_error).startswith("handler_error: ?")
    assert 500 == len(str(endpoint.last_error))
    assert 20_000_000 < endpoint.processing_time < 10_000_000_000
    assert endpoint.processing_time // 4 == endpoint.average_processing_time
    assert "io.nats.micro.v1.stats_response" == stats.type
    [counts] = await ask(client, "STATS", f"{name}-counts")
    assert (1, 0, "") == tuple(
        counts["endpoints"][0][key] for key in ("num_requests", "num_errors", "last_error")
    )


async def test_services_of_others_stand_beside_ours(serving: AgentMesh, client: Client, name: str) -> None:
    """A service made with the official library, and an agent of a second host, are listed together."""
    async with (
        await add_service(client, name=f"{name}-theirs", version="0.1.0", metadata={"agent": f"{name}."}),
        AgentMesh(node_of(serving).connection.target.url) as other,
    ):

        @other.agent(AgentSpec(name=f"{name}.asked", version="1.2.3"))
        async def asked(what: str) -> str:
            return what

        await other.catalog()
        found = sorted(each["name"] for each in await ours(client, "PING", name))
    assert [f"{name}-asked", f"{name}-asked", f"{name}-counts", f"{name}-theirs"] == found


async def test_reloads_change_what_is_listed(url: str, client: Client, name: str, tmp_path: Path) -> None:
    """A new version, a new agent, and one that is gone; in a host without agents there is nothing."""
    old = MESH + agent(f"{name}.a")
    write(tmp_path / "agents", {"a.py": old})
    section = HostSection(agents=["agents"], entry_points=False)
    async with Host(Config(folder=tmp_path, mesh=MeshSection(url=url), host=section)) as host:
        [listed] = await ours(client, "PING", name)
        assert f"{name}-a" == listed["name"]
        new = old.replace("AgentSpec(", "AgentSpec(version='2.0.0', ") + agent(f"{name}.b")
        write(tmp_path / "agents", {"a.py": new})
        await host.reload()

        async def both() -> bool:
            found = {each["name"]: each["version"] for each in await ours(client, "PING", name)}
            return found == {f"{name}-a": "2.0.0", f"{name}-b": "0.1.0"}

        await until(both)
        (tmp_path / "agents/a.py").unlink()
        await host.reload()
        await host.wait_retired()
        assert [] == await ours(client, "PING", name)


async def test_a_gated_agent_is_listed_and_says_that_it_is_off(
    mesh: AgentMesh, client: Client, name: str
) -> None:
    """As it is in the catalog."""
    condition = mesh.subject_condition(f"{name}.on", bool)

    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def gated(what: str) -> str:
        return what

    await mesh.catalog()
    [listed] = await ours(client, "PING", name)
    assert "no" == listed["metadata"]["active"]
    await mesh.publish(f"{name}.on", "on")

    async def is_on() -> bool:
        [now] = await ours(client, "PING", name)
        return bool(now["metadata"]["active"] == "yes")

    await until(is_on)


async def test_who_only_asks_is_not_listed(mesh: AgentMesh, client: Client) -> None:
    """A mesh without agents answers none of these questions, and NATS says that nobody is there."""
    with pytest.raises(nats.errors.NoRespondersError):
        await nobody(mesh)


async def nobody(mesh: AgentMesh) -> None:
    """Ask on a server where only one caller is connected."""
    with running_server("-js") as url:
        async with AgentMesh(url):
            connected = await nats.connect(url)
            try:
                await connected.request("$SRV.PING", b"", timeout=5)
            finally:
                await connected.close()


async def test_strange_questions_are_not_answered(serving: AgentMesh, client: Client, name: str) -> None:
    """Unknown verbs, too many words, no reply subject, any payload: nothing comes, and nothing breaks."""
    for subject in ("$SRV.PONG", "$SRV.PING.a.b.c", "$SRV.ping", f"$SRV.PING.{name}.asked.x"):
        with pytest.raises(nats.errors.TimeoutError):
            await client.request(subject, b"\xff{", timeout=0.1)
    await client.publish("$SRV.PING", b"")
    [answer] = await ask(client, "PING", f"{name}-asked")
    assert f"{name}.asked" == answer["metadata"]["agent"]


async def test_questions_have_a_bound(
    serving: AgentMesh, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks too much at once is not answered; the next question is."""
    monkeypatch.setattr(nats_services, "_MAX_WAITING", 0)
    assert [] == await ours(client, "PING", name)
    monkeypatch.undo()
    assert 2 == len(await ours(client, "PING", name))


async def test_a_server_that_forbids_it_changes_nothing_else(name: str, tmp_path: Path) -> None:
    """Where `$SRV.>` may not be subscribed to, agents are served all the same."""
    (tmp_path / "server.conf").write_text(
        'authorization { users = [{ user: u, password: p, permissions: { subscribe: { deny: "$SRV.>" } } }] }'
    )
    with running_server("-js", "-sd", str(tmp_path), "-c", str(tmp_path / "server.conf")) as url:
        async with AgentMesh(url.replace("//", "//u:p@")) as mesh:

            @mesh.agent(AgentSpec(name=name))
            async def asked(what: str) -> str:
                return what

            assert "hi" == await mesh.call(name, "hi")


async def test_who_is_leaving_is_not_listed(url: str, client: Client, name: str) -> None:
    """While the last requests are finished, nobody is sent there any more."""
    go, runs = asyncio.Event(), asyncio.Event()
    mesh = AgentMesh(url)

    @mesh.agent(AgentSpec(name=name))
    async def slow(what: str) -> str:
        runs.set()
        await go.wait()
        return what

    async with AgentMesh(url) as caller:
        await mesh.__aenter__()
        asking = asyncio.create_task(caller.call(name, "hi"))
        await runs.wait()
        leaving = asyncio.create_task(mesh.__aexit__(None, None, None))

        async def unlisted() -> bool:
            return await ours(client, "PING", name) == []

        await until(unlisted)
        assert not leaving.done()
        go.set()
        assert "hi" == await asking
        await leaving


async def test_a_start_at_the_second_go_answers_once(
    url: str, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance that could not be recorded at once does not listen twice from then on."""
    announce, failures = Presence.announce, 1

    async def announce_the_second_time(presence: Presence, agents: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ConnectionFailed("JetStream is away for a moment")
        await announce(presence, agents)

    monkeypatch.setattr(Presence, "announce", announce_the_second_time)
    async with AgentMesh(url) as mesh:

        @mesh.agent(AgentSpec(name=name))
        async def asked(what: str) -> str:
            return what

        with suppress(ConnectionFailed):
            await mesh.catalog()
        await mesh.catalog()
        assert 1 == len(await ours(client, "PING", name))
