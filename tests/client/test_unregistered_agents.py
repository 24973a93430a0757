"""Agents of other implementations: in a queue group, but not in the registry."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, NotFound
from openagentmesh.client import pending
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import write_headers
from openagentmesh.registry import liveness
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.inbox import Inbox
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import node_of, reconnects

OK = write_headers({subjects.STATUS: "ok"})


@pytest.fixture
async def peer(new_mesh: Callable[[], AgentMesh]) -> AsyncIterator[Connection]:
    """The connection of another process."""
    async with new_mesh() as other:
        yield node_of(other).connection


@pytest.fixture
async def received(peer: Connection, name: str) -> asyncio.Queue[bytes]:
    """The requests that an unregistered instance of the agent `name` receives, and answers."""
    requests: asyncio.Queue[bytes] = asyncio.Queue()
    answers = set()

    def answer(message: Message) -> None:
        requests.put_nowait(message.body)
        if message.reply:
            answers.add(asyncio.create_task(peer.publish(message.reply, b'"here"', OK)))

    await peer.subscribe(subjects.agent(name), answer, subjects.queue_group(name))
    await peer.flush()
    return requests


async def test_an_unregistered_agent_receives_calls_and_sends(
    mesh: AgentMesh, name: str, received: asyncio.Queue[bytes]
) -> None:
    """Each request reaches it once, and its missing contract causes no error."""
    replies: asyncio.Queue[str] = asyncio.Queue()
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    await node_of(mesh).connection.subscribe(
        f"{name}.answers", lambda message: answers.put_nowait(message.body)
    )
    assert "here" == await mesh.call(name, 1)
    for is_unknown in (False, True):
        if is_unknown:  # as after some seconds
            node_of(mesh).pending._known.clear()
        await mesh.send(name, 2)
        await mesh.send(name, 3, on_reply=replies.put_nowait)
        await mesh.send(name, 4, reply_to=f"{name}.answers")
        async with asyncio.timeout(10):
            assert ("here", b'"here"') == (await replies.get(), await answers.get())
    async with asyncio.timeout(10):
        assert [1, 2, 3, 4, 2, 3, 4] == [int(await received.get()) for _ in range(7)]
    assert (True, True, True) == (received.empty(), replies.empty(), answers.empty())


@pytest.mark.usefixtures("received")
async def test_an_unregistered_agent_is_not_found_while_503s_are_hidden(mesh: AgentMesh, name: str) -> None:
    """While a subscription to `mesh.>` keeps NATS from answering 503, a send raises NotFound."""
    await node_of(mesh).connection.subscribe("mesh.>", lambda _message: None)
    for reply_to in (None, f"{name}.answers"):
        with pytest.raises(NotFound):
            await mesh.send(name, 1, reply_to=reply_to)


async def test_a_name_is_looked_up_again_after_a_while(
    mesh: AgentMesh, peer: Connection, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While 503s are hidden, an agent that has answered and disappeared without a notice is not found."""
    monkeypatch.setattr(pending, "_KNOWN_FOR_S", 0.05)
    requests: asyncio.Queue[Message] = asyncio.Queue()
    sid = await peer.subscribe(subjects.agent(name), requests.put_nowait)
    await peer.flush()
    call = asyncio.create_task(mesh.call(name, 1))
    await peer.publish((await requests.get()).reply, b'"here"', OK)
    assert "here" == await call
    await peer.unsubscribe(sid)
    await peer.subscribe("mesh.>", lambda _message: None)
    await peer.flush()
    async with asyncio.timeout(10):
        with pytest.raises(NotFound):
            while True:
                await mesh.send(name, 1)


async def test_a_request_survives_the_reconnect_of_its_instance(
    mesh: AgentMesh, peer: Connection, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ping without a responder, and three that are not answered, do not fail the request."""
    results: asyncio.Queue[bool | None] = asyncio.Queue()
    monkeypatch.setattr(liveness, "_PING_S", 0.05)
    is_dead = liveness.is_dead

    async def recorded(inbox: Inbox, instance_id: str) -> bool | None:
        result = await is_dead(inbox, instance_id)
        if results.empty():  # it reconnects, but is too busy to answer
            await peer.subscribe(subjects.host(name, "ping"), lambda _message: None)
            await peer.flush()
        results.put_nowait(result)
        return result

    monkeypatch.setattr(liveness, "is_dead", recorded)
    requests: asyncio.Queue[Message] = asyncio.Queue()
    await peer.subscribe(subjects.agent(name), requests.put_nowait)
    await peer.flush()
    call = asyncio.create_task(mesh.call(name, 1))
    reply = (await requests.get()).reply
    accepted = {subjects.STATUS: "accepted", subjects.INSTANCE_ID: name}
    await peer.publish(reply, b"", write_headers(accepted))
    async with asyncio.timeout(10):
        assert [True, None, None, None] == [await results.get() for _ in range(4)]
    await peer.publish(reply, b'"late"', OK)
    assert "late" == await call


async def test_an_acknowledgement_with_an_invalid_instance_is_harmless(
    peer: Connection, mesh: AgentMesh, name: str
) -> None:
    """An instance id that cannot be part of a subject is not pinged; the answer still arrives."""
    requests: asyncio.Queue[Message] = asyncio.Queue()
    await peer.subscribe(subjects.agent(name), requests.put_nowait)
    await peer.flush()
    call = asyncio.create_task(mesh.call(name, 1))
    reply = (await requests.get()).reply
    accepted = {subjects.STATUS: "accepted", subjects.INSTANCE_ID: "a b"}
    await peer.publish(reply, b"", write_headers(accepted))
    await asyncio.sleep(1.5)  # longer than the interval of pings
    await peer.publish(reply, b'"late"', OK)
    assert "late" == await call
    assert 0 == reconnects(mesh)
