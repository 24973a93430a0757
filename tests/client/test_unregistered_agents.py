"""Providers of other makes: in a queue group, but not in the registry; and what they may write."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import AgentMesh, NotFound
from openagentmesh.protocol import subjects
from openagentmesh.protocol.headers import write_headers
from openagentmesh.transport.connection import Connection
from openagentmesh.transport.nats_client import Message

from tests.support.meshes import node_of, reconnects

OK = write_headers({subjects.STATUS: "ok"})


@pytest.fixture
async def stranger(new_mesh: Callable[[], AgentMesh]) -> AsyncIterator[Connection]:
    """A connection that is no agent's."""
    async with new_mesh() as other:
        yield node_of(other).connection


@pytest.fixture
async def provider(stranger: Connection, name: str) -> asyncio.Queue[bytes]:
    """Somebody answers for `name`, and says so nowhere; gives what was asked."""
    asked: asyncio.Queue[bytes] = asyncio.Queue()
    answers = set()

    def answer(message: Message) -> None:
        asked.put_nowait(message.body)
        if message.reply:
            answers.add(asyncio.create_task(stranger.publish(message.reply, b'"here"', OK)))

    await stranger.subscribe(subjects.agent(name), answer, subjects.queue_group(name))
    await stranger.flush()
    return asked


async def test_it_is_called_and_sent_to(mesh: AgentMesh, name: str, provider: asyncio.Queue[bytes]) -> None:
    """Each request reaches it, once, and no error is made of its missing contract."""
    replies: asyncio.Queue[str] = asyncio.Queue()
    answers: asyncio.Queue[bytes] = asyncio.Queue()
    await node_of(mesh).connection.subscribe(
        f"{name}.answers", lambda message: answers.put_nowait(message.body)
    )
    assert "here" == await mesh.call(name, 1)
    for forgotten in (False, True):
        if forgotten:  # as after some seconds
            node_of(mesh).pending._known.clear()
        await mesh.send(name, 2)
        await mesh.send(name, 3, on_reply=replies.put_nowait)
        await mesh.send(name, 4, reply_to=f"{name}.answers")
        async with asyncio.timeout(10):
            assert ("here", b'"here"') == (await replies.get(), await answers.get())
    async with asyncio.timeout(10):
        asked = [int(await provider.get()) for _ in range(7)]
    assert [1, 2, 3, 4, 2, 3, 4] == asked
    assert (True, True, True) == (provider.empty(), replies.empty(), answers.empty())


async def test_where_nobody_is_told_it_counts_as_unknown(
    mesh: AgentMesh, name: str, provider: asyncio.Queue[bytes]
) -> None:
    """While somebody listens to everything nothing tells that it is there; a send says so at once."""
    await node_of(mesh).connection.subscribe("mesh.>", lambda _message: None)
    for reply_to in (None, f"{name}.answers"):
        with pytest.raises(NotFound):
            await mesh.send(name, 1, reply_to=reply_to)


async def test_an_instance_that_is_none_costs_nobody_the_connection(
    stranger: Connection, mesh: AgentMesh, name: str
) -> None:
    """Who has a request in hand says so itself, and may say anything; the answer still comes."""
    asked: asyncio.Queue[Message] = asyncio.Queue()
    await stranger.subscribe(subjects.agent(name), asked.put_nowait)
    await stranger.flush()
    call = asyncio.create_task(mesh.call(name, 1))
    reply = (await asked.get()).reply
    accepted = {subjects.STATUS: "accepted", subjects.INSTANCE_ID: "a b"}
    await stranger.publish(reply, b"", write_headers(accepted))
    await asyncio.sleep(1.5)  # it would have been asked whether it lives by now
    await stranger.publish(reply, b'"late"', OK)
    assert "late" == await call
    assert 0 == reconnects(mesh)
