"""Callers: what they are told, and how soon."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
from openagentmesh import (
    AgentDied,
    AgentMesh,
    AgentSpec,
    Cancelled,
    ConnectionFailed,
    InvalidInput,
    InvocationMismatch,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
    PayloadTooLarge,
)
from openagentmesh.protocol import subjects
from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.messages import DeathNotice
from pydantic import BaseModel

from tests.support.meshes import Text, flush, node_of, reconnects, serve


async def use(mesh: AgentMesh, verb: str, name: str, payload: object = None) -> object:
    """Call or stream to the end."""
    if verb == "call":
        return await mesh.call(name, payload, timeout=20)
    return [chunk async for chunk in mesh.stream(name, payload, timeout=20)]


@pytest.fixture(params=[False, True], ids=["quiet", "somebody-listens-to-everything"])
async def crowd(request: pytest.FixtureRequest, mesh: AgentMesh) -> AsyncIterator[None]:
    """With and without a subscriber on `mesh.>`, which keeps NATS from saying that nobody is there."""
    if request.param:
        sid = await node_of(mesh).connection.subscribe("mesh.>", lambda _: None)
        await flush(mesh)
        yield
        await node_of(mesh).connection.unsubscribe(sid)
    else:
        yield


@pytest.mark.usefixtures("crowd")
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_an_unknown_agent_is_not_found_at_once(mesh: AgentMesh, name: str, verb: str) -> None:
    """A name that nobody registered fails long before the timeout."""
    began = time.perf_counter()
    with pytest.raises(NotFound) as caught:
        await use(mesh, verb, name)
    assert time.perf_counter() - began < 5
    assert (name, 32) == (caught.value.agent, len(caught.value.request_id))


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_registered_agent_that_is_away_is_not_available(
    mesh: AgentMesh, name: str, verb: str
) -> None:
    """In the catalog but with nobody there: another error, as soon."""
    serve(mesh, name)
    await mesh.catalog()
    contract = (await mesh.contract(name)).model_copy(update={"name": f"{name}.ghost"})
    if verb == "stream":
        contract.capabilities["streaming"] = True
    await node_of(mesh).registry.publish([AgentContract.from_document(contract.to_registry_json().encode())])
    with pytest.raises(NotAvailable):
        await use(mesh, verb, f"{name}.ghost")


@pytest.mark.parametrize("bad", ["", "a b", "a..b", ".a", "a.", "*", "a.>", "a\r\nPUB x", "ä", "x" * 300])
async def test_bad_names_are_refused_here(mesh: AgentMesh, bad: str) -> None:
    """What cannot be a subject never reaches the server, and the connection lives on."""
    for verb in ("call", "stream"):
        with pytest.raises(InvalidInput, match="is not an agent's name"):
            await use(mesh, verb, bad)
    assert reconnects(mesh) == 0


async def test_wrong_verbs_of_own_agents(mesh: AgentMesh, name: str) -> None:
    """The texts that tools match on."""
    serve(mesh, name)

    @mesh.agent(AgentSpec(name=f"{name}.s"))
    async def stream(req: Text) -> AsyncIterator[Text]:
        yield req

    with pytest.raises(InvocationMismatch, match=r"does not support streaming\. Use call\(\) instead"):
        await use(mesh, "stream", name, {})
    with pytest.raises(InvocationMismatch, match=r"is streaming-only\. Use stream\(\) instead"):
        await use(mesh, "call", f"{name}.s", {})


@pytest.mark.parametrize(
    ("streaming", "what"),
    [(True, "is a publisher and cannot be"), (False, "is a background task and cannot be")],
)
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_agents_that_take_no_requests(
    mesh: AgentMesh, name: str, verb: str, streaming: bool, what: str
) -> None:
    """A peer's publisher or watcher has nobody at its subject; the contract says why."""
    serve(mesh, name)
    contract = await mesh.contract(name)
    contract.name, contract.capabilities = f"{name}.p", {"invocable": False, "streaming": streaming}
    await node_of(mesh).registry.publish([AgentContract.from_document(contract.to_registry_json().encode())])
    with pytest.raises(InvocationMismatch, match=what):
        await use(mesh, verb, f"{name}.p")


async def test_payloads(mesh: AgentMesh, name: str) -> None:
    """Models, JSON values, bytes and nothing go out as the protocol says."""

    @mesh.agent(AgentSpec(name=name))
    async def length(req: list[int] | str | None = None) -> object:
        return req

    assert [1, 2] == await mesh.call(name, [1, 2])
    assert "text" == await mesh.call(name, "text")
    assert [3] == await mesh.call(name, b"[3]")
    assert {} == await mesh.call(name)
    with pytest.raises(InvalidInput, match="as JSON"):
        await mesh.call(name, object())
    with pytest.raises(InvalidInput):
        await mesh.call(name, b"{")


async def test_headers_that_would_break_the_message_are_refused(mesh: AgentMesh, name: str) -> None:
    """A line break in a header is an error of the caller, not a second header."""
    with pytest.raises(InvalidInput, match="line break"):
        await mesh.call(name, {}, headers={"X-Mine": "a\r\nX-Mesh-Stream: true"})


async def test_a_request_that_is_too_large(mesh: AgentMesh, name: str) -> None:
    """The caller is told both sizes, nothing is sent, and the connection lives on."""
    serve(mesh, name)
    for verb in ("call", "stream"):
        with pytest.raises(PayloadTooLarge) as caught:
            await use(mesh, verb, f"{name}.x", {"text": "x" * 2_000_000})
        assert caught.value.details["size"] > caught.value.details["limit"] == 1_048_576
    assert {"text": "ok"} == await mesh.call(name, {})
    assert reconnects(mesh) == 0


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_timeouts_are_mesh_errors(mesh: AgentMesh, name: str, verb: str) -> None:
    """No answer in time is MeshTimeout with the subject, never the bare builtin."""

    @mesh.agent(AgentSpec(name=f"{name}.call"))
    async def hang(req: Text) -> Text:
        await asyncio.sleep(60)
        return req

    @mesh.agent(AgentSpec(name=f"{name}.stream"))
    async def hang_too(req: Text) -> AsyncIterator[Text]:
        await asyncio.sleep(60)
        yield req

    with pytest.raises(MeshTimeout) as caught:
        if verb == "call":
            await mesh.call(f"{name}.call", {}, timeout=0.1)
        else:
            [chunk async for chunk in mesh.stream(f"{name}.stream", {}, timeout=0.1)]
    assert ("timeout", f"{name}.{verb}") == (caught.value.code, caught.value.agent)


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_death_notice_ends_the_wait(mesh: AgentMesh, name: str, verb: str) -> None:
    """When the last instance of an agent dies, those who wait for it are told at once."""
    started = asyncio.Event()

    @mesh.agent(AgentSpec(name=f"{name}.call"))
    async def hang(req: Text) -> Text:
        started.set()
        await asyncio.sleep(60)
        return req

    @mesh.agent(AgentSpec(name=f"{name}.stream"))
    async def hang_too(req: Text) -> AsyncIterator[Text]:
        started.set()
        await asyncio.sleep(60)
        yield req

    waiting = asyncio.create_task(use(mesh, verb, f"{name}.{verb}", {}))
    await started.wait()
    notice = DeathNotice(agent=f"{name}.{verb}", reason="disconnect", detected_at="now", instance_id="i")
    await node_of(mesh).connection.publish(subjects.death("x"), b"no notice")
    await node_of(mesh).connection.publish(subjects.death(notice.agent), notice.model_dump_json().encode())
    with pytest.raises(AgentDied) as caught:
        await waiting
    assert notice.model_dump() == caught.value.details


async def test_a_reply_that_is_no_json(mesh: AgentMesh, name: str) -> None:
    """A peer that answers nonsense is an error of the mesh."""

    async def answer(reply: str) -> None:
        await node_of(mesh).connection.publish(reply, b"{nonsense")

    answers: list[asyncio.Task[None]] = []
    await node_of(mesh).connection.subscribe(
        subjects.agent(name), lambda message: answers.append(asyncio.create_task(answer(message.reply)))
    )
    serve(mesh, f"{name}.x")
    contract = (await mesh.contract(f"{name}.x")).model_copy(update={"name": name})
    await node_of(mesh).registry.publish([contract])
    with pytest.raises(MeshError, match="not JSON"):
        await mesh.call(name)


async def test_a_cancelled_call_leaves_nothing_behind(mesh: AgentMesh, name: str) -> None:
    """After a cancel the caller waits for nothing and expects nothing."""
    started = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: BaseModel) -> None:
        started.set()
        await asyncio.sleep(60)

    call = asyncio.create_task(mesh.call(name, {}))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    node = node_of(mesh)
    assert not node.pending._pending


async def test_a_stopping_host_ends_its_streams(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The reader of a stream that a stopping host cuts is told so, after its chunks."""
    provider = new_mesh()

    @provider.agent(AgentSpec(name=name))
    async def chunks(req: Text) -> AsyncIterator[Text]:
        yield req
        await asyncio.sleep(60)

    await provider.__aenter__()
    stream = mesh.stream(name, {})
    assert {"text": ""} == await anext(stream)
    await node_of(provider).stop(0.1)
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_a_call_is_one_message_and_no_subscription(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first call of an agent, each is one message out; deaths are heard of without asking."""
    serve(mesh, name)
    await mesh.call(name, {})
    async with AgentMesh(mesh.url) as caller:
        await caller.call(name, {})
        client, written = node_of(caller).connection._client, list[bytes]()
        write = client.write

        async def counted(command: bytes) -> None:
            written.append(command)
            await write(command)

        monkeypatch.setattr(client, "write", counted)
        for _ in range(50):
            await caller.call(name, {})
        assert [b"HPUB"] * 50 == [command[:4] for command in written]


async def test_leaving_a_mesh_ends_its_own_calls(
    new_mesh: Callable[[], AgentMesh], mesh: AgentMesh, name: str
) -> None:
    """Who waits for an answer on a connection that closes is told at once."""
    started = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def hang(req: Text) -> Text:
        started.set()
        await asyncio.sleep(60)
        return req

    await mesh.catalog()
    async with new_mesh() as caller:
        call = asyncio.create_task(caller.call(name, {}, timeout=None))
        await started.wait()
    with pytest.raises(ConnectionFailed):
        await call


async def test_a_streams_request_id_must_fit_into_a_subject(mesh: AgentMesh, name: str) -> None:
    """An id of the caller's own that would break the wire is refused here."""
    for bad in ("a b", ">", "a.*"):
        with pytest.raises(InvalidInput, match="request id"):
            await anext(mesh.stream(name, {}, headers={"X-Mesh-Request-Id": bad}))
    assert reconnects(mesh) == 0
