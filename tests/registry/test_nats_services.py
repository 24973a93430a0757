"""NATS service discovery: answers to `$SRV.PING`, `INFO` and `STATS`, read with the official client."""

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

from tests.support.modules import MESH, agent, write
from tests.support.servers import running_server
from tests.support.waiting import until


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    """The official client."""
    connected = await nats.connect(url)
    yield connected
    await connected.close()


async def request(client: Client, verb: str, name: str | None = None, id_: str | None = None) -> list[Any]:
    """All answers to a request, until none has arrived for 0.3 seconds."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    subject = control_subject(ServiceVerb[verb], name, id_)
    await client.publish(subject, b"", reply=inbox)
    await client.flush()
    found = []
    while True:
        try:
            answer = await answers.next_msg(timeout=0.3)
            if answer.data:  # a 503 has none
                found.append(json.loads(answer.data))
        except nats.errors.TimeoutError:
            await answers.unsubscribe()
            return found


async def services_of(client: Client, name: str, verb: str = "PING") -> list[Any]:
    """The answers about agents of one test."""
    answers = await request(client, verb)
    return [each for each in answers if each["metadata"].get("agent", "").startswith(name)]


@pytest.fixture
async def serving(url: str, name: str) -> AsyncIterator[AgentMesh]:
    """A mesh with a responder, a streamer and a publisher."""
    mesh = AgentMesh(url)

    @mesh.agent(AgentSpec(name=f"{name}.echo", description="Answers.", version="1.2.3", tags=["a", "b"]))
    async def echo(text: str) -> str:
        if text == "refuse":
            raise PermissionDenied("not permitted")
        if text == "fail":
            raise ValueError("?" * 10_000)
        await asyncio.sleep(0.01)
        return text

    @mesh.agent(AgentSpec(name=f"{name}.counter", version="first"))
    async def counter(number: int) -> AsyncIterator[int]:
        for each in range(number):
            yield each

    @mesh.agent(AgentSpec(name=f"{name}.ticks"))
    async def ticks() -> AsyncIterator[int]:
        await asyncio.sleep(60)
        yield 1

    async with mesh:
        yield mesh


async def test_invocable_agents_are_listed_as_services(serving: AgentMesh, client: Client, name: str) -> None:
    """Services have names and versions that NATS allows; the agent's own are in the metadata."""
    found = [ServicePing.from_dict(each) for each in await services_of(client, name)]
    assert [(f"{name}-counter", "0.0.0"), (f"{name}-echo", "1.2.3")] == sorted(
        (ping.name, ping.version) for ping in found
    )
    assert {"io.nats.micro.v1.ping_response"} == {ping.type for ping in found}
    assert 2 == len({ping.id for ping in found})
    [metadata] = [ping.metadata for ping in found if ping.name == f"{name}-counter"]
    assert {
        "agent": f"{name}.counter", "version": "first", "kind": "streamer", "tags": "", "active": "yes",
        "instance_id": serving.instance_id,
    } == metadata  # fmt: skip


async def test_info_describes_the_services_of_a_name_or_an_id(
    serving: AgentMesh, client: Client, name: str
) -> None:
    """The answer has the description and an endpoint that can be called; no other service answers."""
    [id_] = [each["id"] for each in await request(client, "PING", f"{name}-echo")]
    for filters in ((f"{name}-echo", None), (f"{name}-echo", id_)):
        [answer] = await request(client, "INFO", *filters)
        info = ServiceInfo.from_dict(answer)
        assert ("Answers.", "io.nats.micro.v1.info_response") == (info.description, info.type)
        [endpoint] = info.endpoints
        reply = await client.request(endpoint.subject, b'"hi"', timeout=5)
        assert b'"hi"' == reply.data
        assert endpoint.queue_group
    for filters in ((f"{name}-unknown", None), (f"{name}-echo", "other"), (f"{name}.echo", None)):
        assert [] == await request(client, "INFO", *filters)


async def test_stats_count_requests_errors_and_time(serving: AgentMesh, client: Client, name: str) -> None:
    """The answer has the number of requests and errors, the last error, and the time of the handlers."""
    for text in ("hi", "refuse", "hi", "fail"):
        try:
            await serving.call(f"{name}.echo", text)
        except MeshError:
            assert text in {"refuse", "fail"}
    assert [0, 1, 2] == [number async for number in serving.stream(f"{name}.counter", 3)]
    [answer] = await request(client, "STATS", f"{name}-echo")
    stats = ServiceStats.from_dict(answer)
    [endpoint] = stats.endpoints
    assert (4, 2) == (endpoint.num_requests, endpoint.num_errors)
    assert str(endpoint.last_error).startswith("handler_error: ?")
    assert 500 == len(str(endpoint.last_error))
    assert 20_000_000 < endpoint.processing_time < 10_000_000_000
    assert endpoint.processing_time // 4 == endpoint.average_processing_time
    assert "io.nats.micro.v1.stats_response" == stats.type
    [counter] = await request(client, "STATS", f"{name}-counter")
    assert (1, 0, "") == tuple(
        counter["endpoints"][0][key] for key in ("num_requests", "num_errors", "last_error")
    )


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")  # in that library
async def test_replicas_and_services_of_the_official_library_are_listed_together(
    serving: AgentMesh, client: Client, name: str
) -> None:
    """Each instance of an agent is a service, listed together with services of other programs."""
    async with (
        await add_service(client, name=f"{name}-official", version="0.1.0", metadata={"agent": f"{name}."}),
        AgentMesh(serving.url) as other,
    ):

        @other.agent(AgentSpec(name=f"{name}.echo", version="1.2.3"))
        async def echo(text: str) -> str:
            return text

        await other.catalog()
        found = sorted(each["name"] for each in await services_of(client, name))
    assert [f"{name}-counter", f"{name}-echo", f"{name}-echo", f"{name}-official"] == found


async def test_a_reload_changes_the_listed_services(
    url: str, client: Client, name: str, tmp_path: Path
) -> None:
    """New versions and agents are listed, removed agents are not."""
    old = MESH + agent(f"{name}.a")
    write(tmp_path / "agents", {"a.py": old})
    section = HostSection(agents=["agents"], entry_points=False)
    async with Host(Config(folder=tmp_path, mesh=MeshSection(url=url), host=section)) as host:
        [listed] = await services_of(client, name)
        assert f"{name}-a" == listed["name"]
        new = old.replace("AgentSpec(", "AgentSpec(version='2.0.0', ") + agent(f"{name}.b")
        write(tmp_path / "agents", {"a.py": new})
        await host.reload()

        async def both_are_listed() -> bool:
            found = {each["name"]: each["version"] for each in await services_of(client, name)}
            return found == {f"{name}-a": "2.0.0", f"{name}-b": "0.1.0"}

        await until(both_are_listed)
        (tmp_path / "agents/a.py").unlink()
        await host.reload()
        await host.wait_retired()
        assert [] == await services_of(client, name)


async def test_a_gated_agent_is_listed_with_its_state(mesh: AgentMesh, client: Client, name: str) -> None:
    """The metadata shows whether the agent's condition is true."""
    condition = mesh.subject_condition(f"{name}.on", bool)

    @mesh.agent(AgentSpec(name=name), active_when=condition)
    async def gated(text: str) -> str:
        return text

    await mesh.catalog()
    [listed] = await services_of(client, name)
    assert "no" == listed["metadata"]["active"]
    await mesh.publish(f"{name}.on", "on")

    async def is_active() -> bool:
        [now] = await services_of(client, name)
        return bool(now["metadata"]["active"] == "yes")

    await until(is_active)


async def test_a_mesh_without_agents_does_not_answer() -> None:
    """On a server with such a mesh only, NATS answers 503."""
    with running_server("-js") as url:
        async with AgentMesh(url):
            connected = await nats.connect(url)
            try:
                with pytest.raises(nats.errors.NoRespondersError):
                    await connected.request("$SRV.PING", b"", timeout=5)
            finally:
                await connected.close()


async def test_malformed_requests_are_not_answered(serving: AgentMesh, client: Client, name: str) -> None:
    """Unknown verbs, too many words and no reply subject get no answer; later requests do."""
    for subject in ("$SRV.PONG", "$SRV.PING.a.b.c", "$SRV.ping", f"$SRV.PING.{name}.echo.x"):
        with pytest.raises(nats.errors.TimeoutError):
            await client.request(subject, b"\xff{", timeout=0.1)
    await client.publish("$SRV.PING", b"")
    [answer] = await request(client, "PING", f"{name}-echo")
    assert f"{name}.echo" == answer["metadata"]["agent"]


async def test_the_queue_of_requests_is_bounded(
    serving: AgentMesh, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the queue is full, requests are dropped; afterwards they are answered."""
    monkeypatch.setattr(nats_services, "_MAX_WAITING", 0)
    assert [] == await services_of(client, name)
    monkeypatch.undo()
    assert 2 == len(await services_of(client, name))


async def test_agents_are_served_without_permission_for_discovery(name: str, tmp_path: Path) -> None:
    """When the server denies the subscription to `$SRV.>`, agents are served anyway."""
    (tmp_path / "server.conf").write_text(
        'authorization { users = [{ user: u, password: p, permissions: { subscribe: { deny: "$SRV.>" } } }] }'
    )
    with running_server("-js", "-sd", str(tmp_path), "-c", str(tmp_path / "server.conf")) as url:
        async with AgentMesh(url.replace("//", "//u:p@")) as mesh:

            @mesh.agent(AgentSpec(name=name))
            async def echo(text: str) -> str:
                return text

            assert "hi" == await mesh.call(name, "hi")


async def test_a_draining_mesh_is_not_listed(url: str, client: Client, name: str) -> None:
    """While its last requests finish, its agents are no services any more."""
    go, started = asyncio.Event(), asyncio.Event()
    mesh = AgentMesh(url)

    @mesh.agent(AgentSpec(name=name))
    async def slow(text: str) -> str:
        started.set()
        await go.wait()
        return text

    async with AgentMesh(url) as caller:
        await mesh.__aenter__()
        pending = asyncio.create_task(caller.call(name, "hi"))
        await started.wait()
        closing = asyncio.create_task(mesh.__aexit__(None, None, None))

        async def is_unlisted() -> bool:
            return await services_of(client, name) == []

        await until(is_unlisted)
        assert not closing.done()
        go.set()
        assert "hi" == await pending
        await closing


async def test_a_retried_start_subscribes_once(
    url: str, client: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the instance record is written at the second attempt only, each request is answered once."""
    announce, failures = Presence.announce, 1

    async def announce_failing_once(presence: Presence, agents: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ConnectionFailed("JetStream does not answer")
        await announce(presence, agents)

    monkeypatch.setattr(Presence, "announce", announce_failing_once)
    async with AgentMesh(url) as mesh:

        @mesh.agent(AgentSpec(name=name))
        async def echo(text: str) -> str:
            return text

        with suppress(ConnectionFailed):
            await mesh.catalog()
        await mesh.catalog()
        assert 1 == len(await services_of(client, name))
