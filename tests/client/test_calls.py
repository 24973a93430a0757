"""Calls and streams as the caller sees them: payloads, errors, and how soon they are raised."""

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

from tests.support.meshes import Text, flush, node_of, pending_instance, reconnects, serve


async def request(mesh: AgentMesh, verb: str, name: str, payload: object = None) -> object:
    """Call, or stream to the end."""
    if verb == "call":
        return await mesh.call(name, payload, timeout=20)
    return [chunk async for chunk in mesh.stream(name, payload, timeout=20)]


@pytest.fixture(params=[False, True], ids=["no-subscriber", "subscriber-of-all-subjects"])
async def wildcard_subscriber(request: pytest.FixtureRequest, mesh: AgentMesh) -> AsyncIterator[None]:
    """With and without a subscription to `mesh.>`, which keeps NATS from answering 503."""
    if request.param:
        sid = await node_of(mesh).connection.subscribe("mesh.>", lambda _: None)
        await flush(mesh)
        yield
        await node_of(mesh).connection.unsubscribe(sid)
    else:
        yield


@pytest.mark.usefixtures("wildcard_subscriber")
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_an_unknown_agent_is_reported_immediately(mesh: AgentMesh, name: str, verb: str) -> None:
    """A request to an unregistered name raises NotFound long before its timeout."""
    began = time.perf_counter()
    with pytest.raises(NotFound) as caught:
        await request(mesh, verb, name)
    assert time.perf_counter() - began < 5
    assert (name, 32) == (caught.value.agent, len(caught.value.request_id))


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_registered_agent_without_an_instance_is_not_available(
    mesh: AgentMesh, name: str, verb: str
) -> None:
    """A request to an agent that is in the catalog, but that no instance serves, raises NotAvailable."""
    serve(mesh, name)
    await mesh.catalog()
    contract = (await mesh.contract(name)).model_copy(update={"name": f"{name}.ghost"})
    if verb == "stream":
        contract.capabilities["streaming"] = True
    await node_of(mesh).registry.publish([AgentContract.from_document(contract.to_registry_json().encode())])
    with pytest.raises(NotAvailable):
        await request(mesh, verb, f"{name}.ghost")


@pytest.mark.parametrize("bad", ["", "a b", "a..b", ".a", "a.", "*", "a.>", "a\r\nPUB x", "ä", "x" * 300])
async def test_an_invalid_name_is_rejected_by_the_caller(mesh: AgentMesh, bad: str) -> None:
    """A name that cannot be part of a subject is not sent, and the connection stays open."""
    for verb in ("call", "stream"):
        with pytest.raises(InvalidInput, match="is not an agent's name"):
            await request(mesh, verb, bad)
    assert reconnects(mesh) == 0


async def test_a_wrong_verb_for_an_agent_of_this_node_is_rejected(mesh: AgentMesh, name: str) -> None:
    """The error names the verb to use instead, in the text that tools match on."""
    serve(mesh, name)

    @mesh.agent(AgentSpec(name=f"{name}.s"))
    async def stream(req: Text) -> AsyncIterator[Text]:
        yield req

    with pytest.raises(InvocationMismatch, match=r"does not support streaming\. Use call\(\) instead"):
        await request(mesh, "stream", name, {})
    with pytest.raises(InvocationMismatch, match=r"is streaming-only\. Use stream\(\) instead"):
        await request(mesh, "call", f"{name}.s", {})


@pytest.mark.parametrize(
    ("streaming", "what"),
    [(True, "is a publisher and cannot be"), (False, "is a background task and cannot be")],
)
@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_a_request_to_a_publisher_or_watcher_of_a_peer_is_rejected(
    mesh: AgentMesh, name: str, verb: str, streaming: bool, what: str
) -> None:
    """It has no subscription; the error follows from its contract."""
    serve(mesh, name)
    contract = await mesh.contract(name)
    contract.name, contract.capabilities = f"{name}.p", {"invocable": False, "streaming": streaming}
    await node_of(mesh).registry.publish([AgentContract.from_document(contract.to_registry_json().encode())])
    with pytest.raises(InvocationMismatch, match=what):
        await request(mesh, verb, f"{name}.p")


async def test_json_values_bytes_and_no_payload_are_sent(mesh: AgentMesh, name: str) -> None:
    """JSON values are encoded, bytes are sent unchanged; a payload without a JSON form is InvalidInput."""

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


async def test_a_header_with_a_line_break_is_rejected(mesh: AgentMesh, name: str) -> None:
    """It raises InvalidInput and does not become a second header."""
    with pytest.raises(InvalidInput, match="line break"):
        await mesh.call(name, {}, headers={"X-Mine": "a\r\nX-Mesh-Stream: true"})


async def test_a_request_above_the_size_limit_is_rejected(mesh: AgentMesh, name: str) -> None:
    """The error has the size and the limit, nothing is sent, and the connection stays open."""
    serve(mesh, name)
    for verb in ("call", "stream"):
        with pytest.raises(PayloadTooLarge) as caught:
            await request(mesh, verb, f"{name}.x", {"text": "x" * 2_000_000})
        assert caught.value.details["size"] > caught.value.details["limit"] == 1_048_576
    assert {"text": "ok"} == await mesh.call(name, {})
    assert reconnects(mesh) == 0


@pytest.mark.parametrize("verb", ["call", "stream"])
async def test_an_expired_timeout_raises_mesh_timeout(mesh: AgentMesh, name: str, verb: str) -> None:
    """The error is MeshTimeout with the agent, not the built-in TimeoutError."""

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
async def test_a_death_notice_fails_pending_requests(mesh: AgentMesh, name: str, verb: str) -> None:
    """When the last instance of an agent dies, requests to it raise AgentDied with the notice."""
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

    waiting = asyncio.create_task(request(mesh, verb, f"{name}.{verb}", {}))
    await started.wait()
    notice = DeathNotice(agent=f"{name}.{verb}", reason="disconnect", detected_at="now", instance_id="i")
    await node_of(mesh).connection.publish(subjects.death("x"), b"not a notice")
    await node_of(mesh).connection.publish(subjects.death(notice.agent), notice.model_dump_json().encode())
    with pytest.raises(AgentDied) as caught:
        await waiting
    assert notice.model_dump() == caught.value.details


async def test_a_death_notice_does_not_fail_requests_of_other_instances(mesh: AgentMesh, name: str) -> None:
    """A request that an instance has acknowledged is not failed by the death notice of another instance."""
    finish = asyncio.Event()

    @mesh.agent(AgentSpec(name=name))
    async def wait(req: Text) -> Text:
        await finish.wait()
        return req

    waiting = asyncio.create_task(mesh.call(name, {"text": "held"}))
    assert mesh.instance_id == await pending_instance(mesh)
    notice = DeathNotice(agent=name, reason="disconnect", detected_at="now", instance_id="other")
    await node_of(mesh).connection.publish(subjects.death(name), notice.model_dump_json().encode())
    await flush(mesh)
    finish.set()
    assert {"text": "held"} == await waiting


async def test_a_reply_that_is_not_json_raises_a_mesh_error(mesh: AgentMesh, name: str) -> None:
    """A malformed reply of a peer is reported as such."""

    async def answer(reply: str) -> None:
        await node_of(mesh).connection.publish(reply, b"{malformed")

    answers: list[asyncio.Task[None]] = []
    await node_of(mesh).connection.subscribe(
        subjects.agent(name), lambda message: answers.append(asyncio.create_task(answer(message.reply)))
    )
    serve(mesh, f"{name}.x")
    contract = (await mesh.contract(f"{name}.x")).model_copy(update={"name": name})
    await node_of(mesh).registry.publish([contract])
    with pytest.raises(MeshError, match="not JSON"):
        await mesh.call(name)


async def test_a_cancelled_call_is_not_pending_any_more(mesh: AgentMesh, name: str) -> None:
    """A cancelled call is removed from the pending requests."""
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
    assert not node_of(mesh).pending._pending


async def test_a_stream_of_a_stopping_host_ends_with_cancelled(
    mesh: AgentMesh, new_mesh: Callable[[], AgentMesh], name: str
) -> None:
    """The reader gets the chunks that were sent, then the error Cancelled."""
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


async def test_a_repeated_call_sends_one_message_and_subscribes_to_nothing(
    mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first call of an agent, each further one writes a single HPUB."""
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


async def test_closing_a_mesh_fails_its_pending_calls(
    new_mesh: Callable[[], AgentMesh], mesh: AgentMesh, name: str
) -> None:
    """A call that waits for its answer when the connection is closed raises ConnectionFailed."""
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


async def test_the_request_id_of_a_stream_must_be_valid_in_a_subject(mesh: AgentMesh, name: str) -> None:
    """An invalid id of the caller's own is rejected, and the connection stays open."""
    for bad in ("a b", ">", "a.*"):
        with pytest.raises(InvalidInput, match="request id"):
            await anext(mesh.stream(name, {}, headers={"X-Mesh-Request-Id": bad}))
    assert reconnects(mesh) == 0
