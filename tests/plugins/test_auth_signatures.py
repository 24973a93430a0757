"""Signed requests: each signature is accepted once, for the signed request, within a window of time."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oam_auth import Auth, CallerSettings, Settings, SignatureSettings
from oam_auth.policy import Identity
from oam_auth.signatures import KEY, NONCE, SIGNATURE, TIME, VERB, Nonces, Signatures, Signer
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Call,
    ClientMiddleware,
    ClientOperation,
    Overloaded,
    Unauthenticated,
    current_call,
    hookimpl,
)
from openagentmesh.protocol import subjects

from tests.support.credentials import ALL, bearer, seed, settings, signers
from tests.support.protection import EVE, PUBLIC, SEED, ProtectedAgents, signed
from tests.support.waiting import until


def headers_of(call: Call) -> dict[str, str]:
    headers = call.headers
    assert isinstance(headers, dict)
    return headers


def users(**changed: Any) -> SignatureSettings:
    return signers(bob=PUBLIC, eve=EVE.key).model_copy(update=changed)


def verifier(**changed: Any) -> Signatures:
    return Signatures(users(**changed), Nonces())


def accept(signatures: Signatures, call: Call) -> Identity:
    identity = signatures.verify(call)
    signatures.use(call)
    return identity


def refusal(signatures: Signatures, call: Call) -> str:
    with pytest.raises(Unauthenticated) as caught:
        accept(signatures, call)
    return str(caught.value.details["rule"])


def test_a_signed_request_has_the_identity_of_its_user() -> None:
    """The signature of each verb is verified, also that of a message of a source."""
    signatures = verifier()
    for verb in ("call", "stream", "send", "publish"):
        assert "bob" == signatures.verify(signed(verb)).subject


def header(name: str, value: str) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        headers_of(call)[name] = value

    return change


def without(name: str) -> Callable[[Call], None]:
    return lambda call: headers_of(call).__delitem__(name)


def other_subject(call: Call) -> None:
    call.subject = subjects.agent("nlp.b")


def other_body(call: Call) -> None:
    call.body = b'{"a":2}'


def other_verb(call: Call) -> None:
    call.verb = "send"


def at(ahead: float) -> Callable[[Call], None]:
    """A request whose time header is some seconds ahead."""

    def change(call: Call) -> None:
        headers_of(call)[TIME] = str(int((time.time() + ahead) * 1000))

    return change


OTHER = Signer(seed()[0])


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("signature.wrong", other_subject),
        ("signature.wrong", other_body),
        ("signature.verb", other_verb),
        ("signature.wrong", header("X-Mesh-Request-Id", "r2")),
        ("signature.wrong", header(NONCE, "another")),
        ("signature.wrong", at(1)),
        ("signature.time", at(-40)),
        ("signature.time", at(40)),
        ("signature.time", header(TIME, "now")),
        ("signature.time", header(TIME, "-1")),
        ("signature.time", header(TIME, "9" * 400)),
        ("signature.time", header(TIME, "١٢٣")),
        ("signature.time", without(TIME)),
        ("signature.nonce", header(NONCE, "")),
        ("signature.nonce", header(NONCE, "x" * 65)),
        ("signature.nonce", without(NONCE)),
        ("signature.verb", header(VERB, "send")),
        ("signature.verb", without(VERB)),
        ("signature.key", header(KEY, OTHER.key)),
        ("signature.key", without(KEY)),
        ("signature.wrong", header(SIGNATURE, "")),
        ("signature.wrong", header(SIGNATURE, "AAAA")),
        ("signature.wrong", header(SIGNATURE, "A" * 86 + "==")),
        ("signature.wrong", header(SIGNATURE, "é")),
        ("signature.wrong", without(SIGNATURE)),
    ],
)
def test_a_changed_request_is_refused(rule: str, change: Callable[[Call], None]) -> None:
    """Another subject, body, verb, id, time, nonce or key is refused, and missing or malformed headers."""
    call = signed()
    change(call)
    assert rule == refusal(verifier(), call)


@given(
    st.dictionaries(
        st.sampled_from([KEY, VERB, TIME, NONCE, SIGNATURE]), st.text(max_size=80) | st.just(PUBLIC)
    )
)
def test_arbitrary_signature_headers_are_refused(headers: dict[str, str]) -> None:
    """Any values of the headers of a signature are refused with a rule."""
    call = signed()
    headers_of(call).clear()
    headers_of(call).update(headers)
    assert refusal(verifier(), call).startswith("signature.")


def advance_clocks(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    wall, monotonic = time.time() + seconds, time.monotonic() + seconds
    monkeypatch.setattr("oam_auth.signatures.time.time", lambda: wall)
    monkeypatch.setattr("oam_auth.signatures.time.monotonic", lambda: monotonic)


def test_a_signature_is_accepted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated request is refused while its signature is within the window, and then dropped."""
    signatures, call = verifier(), signed()
    accept(signatures, call)
    for seconds in (0, 29):
        advance_clocks(monkeypatch, seconds)
        assert "signature.replayed" == refusal(signatures, call)
    advance_clocks(monkeypatch, 32)
    assert "signature.time" == refusal(signatures, call)
    accept(signatures, signed())
    [used] = signatures._nonces._used.values()
    assert 1 == len(used.nonces)


def test_a_dropped_signature_is_never_accepted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reload with a wider window, a signature that is no longer remembered is still refused."""
    nonces, call = Nonces(), signed()
    narrow, wide = (Signatures(users(window=window), nonces) for window in (1, 300))
    accept(narrow, call)
    advance_clocks(monkeypatch, 3)
    accept(narrow, signed())  # the first one is dropped now
    assert "signature.replayed" == refusal(wide, call)
    accept(wide, signed())


def test_a_signer_is_overloaded_at_the_limit_of_remembered_signatures() -> None:
    """A signer at its limit gets `overloaded`; its signatures stay remembered, and others are accepted."""
    signatures = verifier(remembered=2)
    first = signed()
    accept(signatures, first)
    accept(signatures, signed())
    with pytest.raises(Overloaded) as caught:
        accept(signatures, signed())
    assert 59_000 < caught.value.details["retry_after_ms"] <= 60_001
    assert "signature.replayed" == refusal(signatures, first)
    assert "eve" == accept(signatures, signed(signer=EVE)).subject


def test_invalid_signatures_are_not_remembered() -> None:
    """Invalid signatures do not use up the limit of remembered ones."""
    signatures = verifier(remembered=1)
    for _ in range(10):
        call = signed()
        other_body(call)
        assert "signature.wrong" == refusal(signatures, call)
    assert "bob" == accept(signatures, signed()).subject


@pytest.mark.parametrize(
    "key",
    ["", "U", PUBLIC[:-1], PUBLIC[:-1] + "!", SEED.decode(), "A" + PUBLIC[1:]],
    ids=["empty", "one letter", "truncated", "misspelt", "seed", "another type"],
)
def test_invalid_public_keys_are_refused(key: str) -> None:
    """A key that is not a public NKey of a user is refused, and a seed is not in the message."""
    with pytest.raises(ValueError, match="is not a public NKey") as caught:
        Signatures(SignatureSettings.model_validate({"users": {key: {"subject": "bob"}}}), Nonces())
    assert SEED.decode() not in str(caught.value)


@asynccontextmanager
async def caller(url: str, folder: Path, *more: object) -> AsyncIterator[AgentMesh]:
    """A mesh that signs its requests."""
    (folder / "bob.nk").write_bytes(SEED + b"\n")
    signing = Auth(Settings(caller=CallerSettings(nkey_file=folder / "bob.nk")))
    async with AgentMesh(url, plugins=[signing, *more]) as mesh:
        yield mesh


class Recorder:
    """Records the headers of requests, as an inner plugin of the one that signs."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        @asynccontextmanager
        async def record(operation: ClientOperation) -> AsyncIterator[None]:
            self.headers.append(operation.headers)
            yield

        return record


async def test_signed_requests_of_all_verbs_reach_handlers(url: str, name: str, tmp_path: Path) -> None:
    """Signed calls, streams, sends with and without a callback, and messages of a source are handled."""
    protected = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    replies: list[Any] = []
    async with protected.mesh, caller(url, tmp_path) as mesh:
        assert "bob bob []" == await mesh.call(f"{name}.responder", "1")
        assert ["2"] == [chunk async for chunk in mesh.stream(f"{name}.streamer", "2")]
        await mesh.send(f"{name}.responder", "3")
        await mesh.send(f"{name}.responder", "4", on_reply=replies.append)
        await mesh.publish(f"{name}.news", "5")
        await until(lambda: len(protected.handled) == 5 and len(replies) == 1)
    assert {"1", "2", "3", "4", ("5", "bob")} == set(protected.handled)


async def test_headers_of_an_intercepted_request_are_refused(url: str, name: str, tmp_path: Path) -> None:
    """The headers of another caller's request are refused with any body, and at any other agent."""
    protected = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    recorder = Recorder()
    async with protected.mesh, caller(url, tmp_path, recorder) as mesh, AgentMesh(url) as attacker:
        await mesh.call(f"{name}.responder", "1")
        [intercepted] = recorder.headers
        for agent, text in (("responder", "1"), ("responder", "2"), ("threaded", "1")):
            with pytest.raises(Unauthenticated):
                await attacker.call(f"{name}.{agent}", text, headers=intercepted)
    assert ["1"] == protected.handled


async def test_only_configured_credentials_are_accepted(url: str, name: str, tmp_path: Path) -> None:
    """Tokens and signatures are accepted only if they are configured; a request with both is refused."""
    only_tokens = ProtectedAgents(url, f"{name}.t", Auth(settings(tmp_path)))
    only_signed = ProtectedAgents(
        url, f"{name}.s", Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,)))
    )
    both = ProtectedAgents(url, f"{name}.b", Auth(settings(tmp_path, signatures=signers(bob=PUBLIC))))
    with_both = {NONCE: "n", SIGNATURE: "s", KEY: PUBLIC} | bearer()
    async with (
        only_tokens.mesh,
        only_signed.mesh,
        both.mesh,
        caller(url, tmp_path) as bob,
        AgentMesh(url) as mesh,
    ):
        for rule, client, agent, headers in (
            ("credentials.signatures", bob, f"{name}.t.responder", None),
            ("credentials.tokens", mesh, f"{name}.s.responder", bearer()),
            ("credentials.two", mesh, f"{name}.b.responder", with_both),
        ):
            with pytest.raises(Unauthenticated) as caught:
                await client.call(agent, "1", headers=headers)
            assert rule == caught.value.details["rule"]
        assert "bob bob []" == await bob.call(f"{name}.b.responder", "1")
        assert str(await mesh.call(f"{name}.b.responder", "1", headers=bearer())).startswith("alice")


async def test_several_agents_of_a_host_accept_one_signed_message(
    url: str, name: str, tmp_path: Path
) -> None:
    """Agents with a source on the subject of another agent accept its signed requests, as that agent does."""
    protected = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    callers: list[str] = []
    requests = protected.mesh.subject_source(subjects.agent(f"{name}.responder"))

    @protected.mesh.agent(AgentSpec(name=f"{name}.first"), sources=[requests])
    async def first(text: str) -> None:
        callers.append(current_call().caller.subject)

    @protected.mesh.agent(AgentSpec(name=f"{name}.second"), sources=[requests])
    async def second(text: str) -> None:
        callers.append(current_call().caller.subject)

    async with protected.mesh, caller(url, tmp_path) as mesh:
        for number in range(5):
            await mesh.call(f"{name}.responder", str(number))
        await until(lambda: len(callers) == 10)
    assert {"bob"} == set(callers)
