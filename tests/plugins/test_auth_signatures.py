"""Signed requests: each counts once, for what was signed, for a while."""

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


def believe(signatures: Signatures, call: Call) -> Identity:
    proof = signatures.verify(call)
    signatures.use(call)
    return proof


def refusal(signatures: Signatures, call: Call) -> str:
    with pytest.raises(Unauthenticated) as caught:
        believe(signatures, call)
    return str(caught.value.details["rule"])


def test_a_signed_request_proves_its_user() -> None:
    """Whatever its verb; also a message that drives an agent."""
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
    """A request that says it was signed some seconds from now."""

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
    """Another subject, body, verb, id, time, nonce, key; and headers that are missing or nonsense."""
    call = signed()
    change(call)
    assert rule == refusal(verifier(), call)


@given(
    st.dictionaries(
        st.sampled_from([KEY, VERB, TIME, NONCE, SIGNATURE]), st.text(max_size=80) | st.just(PUBLIC)
    )
)
def test_any_headers_are_refused(headers: dict[str, str]) -> None:
    """Whatever a stranger puts into the headers of a signature."""
    call = signed()
    headers_of(call).clear()
    headers_of(call).update(headers)
    assert refusal(verifier(), call).startswith("signature.")


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let so much time pass, by all clocks."""
    wall, steady = time.time() + seconds, time.monotonic() + seconds
    monkeypatch.setattr("oam_auth.signatures.time.time", lambda: wall)
    monkeypatch.setattr("oam_auth.signatures.time.monotonic", lambda: steady)


def test_a_signature_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request again is refused for as long as its signature would count, and forgotten then."""
    signatures, call = verifier(), signed()
    believe(signatures, call)
    for pause in (0, 29):
        later(monkeypatch, pause)
        assert "signature.replayed" == refusal(signatures, call)
    later(monkeypatch, 32)
    assert "signature.time" == refusal(signatures, call)
    believe(signatures, signed())
    [used] = signatures._nonces._used.values()
    assert 1 == len(used.nonces)


def test_what_was_forgotten_counts_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wider window, as a reload may bring, or a clock that is set back, revives no signature."""
    nonces, call = Nonces(), signed()
    narrow, wide = (Signatures(users(window=window), nonces) for window in (1, 300))
    believe(narrow, call)
    later(monkeypatch, 3)
    believe(narrow, signed())  # the first one is forgotten now
    assert "signature.replayed" == refusal(wide, call)
    believe(wide, signed())


def test_what_cannot_be_remembered_does_not_count() -> None:
    """A signer that has used up its room is told to wait; none is forgotten, and others have theirs."""
    signatures = verifier(remembered=2)
    first = signed()
    believe(signatures, first)
    believe(signatures, signed())
    with pytest.raises(Overloaded) as caught:
        believe(signatures, signed())
    assert 59_000 < caught.value.details["retry_after_ms"] <= 60_001
    assert "signature.replayed" == refusal(signatures, first)
    assert "eve" == believe(signatures, signed(by=EVE)).subject


def test_what_is_refused_takes_no_room() -> None:
    """Strangers cannot fill what remembers signatures."""
    signatures = verifier(remembered=1)
    for _ in range(10):
        call = signed()
        other_body(call)
        assert "signature.wrong" == refusal(signatures, call)
    assert "bob" == signatures.verify(signed()).subject


@pytest.mark.parametrize(
    "key",
    ["", "U", PUBLIC[:-1], PUBLIC[:-1] + "!", SEED.decode(), "A" + PUBLIC[1:]],
    ids=["empty", "a letter", "cut", "misspelt", "the secret", "another kind"],
)
def test_keys_that_are_none_are_named(key: str) -> None:
    """Cut, misspelt, a secret instead of the public part, another kind of key."""
    with pytest.raises(ValueError, match="is not a public NKey") as caught:
        Signatures(SignatureSettings.model_validate({"users": {key: {"subject": "bob"}}}), Nonces())
    assert SEED.decode() not in str(caught.value)


@asynccontextmanager
async def caller(url: str, folder: Path, *more: object) -> AsyncIterator[AgentMesh]:
    """A mesh that signs what leaves."""
    (folder / "bob.nk").write_bytes(SEED + b"\n")
    carrying = Auth(Settings(caller=CallerSettings(nkey_file=folder / "bob.nk")))
    async with AgentMesh(url, plugins=[carrying, *more]) as mesh:
        yield mesh


class Recorder:
    """Keeps the headers of what leaves, as a plugin within the one that signs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        @asynccontextmanager
        async def record(outgoing: ClientOperation) -> AsyncIterator[None]:
            self.seen.append(outgoing.headers)
            yield

        return record


async def test_signed_requests_reach_handlers_every_way(url: str, name: str, tmp_path: Path) -> None:
    """Call, stream, send, send for replies, and a message that drives an agent, over the wire."""
    guarded = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    replies: list[Any] = []
    async with guarded.mesh, caller(url, tmp_path) as mesh:
        assert "bob bob []" == await mesh.call(f"{name}.asked", "1")
        assert ["2"] == [chunk async for chunk in mesh.stream(f"{name}.counts", "2")]
        await mesh.send(f"{name}.asked", "3")
        await mesh.send(f"{name}.asked", "4", on_reply=replies.append)
        await mesh.publish(f"{name}.news", "5")

        async def all_came() -> bool:
            return len(guarded.handled) == 5 and len(replies) == 1

        await until(all_came)
    assert {"1", "2", "3", "4", ("5", "bob")} == set(guarded.handled)


async def test_a_request_that_was_overheard_is_no_use(url: str, name: str, tmp_path: Path) -> None:
    """The headers of another's request, sent again with any body, or to another agent."""
    guarded = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    recorder = Recorder()
    async with guarded.mesh, caller(url, tmp_path, recorder) as mesh, AgentMesh(url) as thief:
        await mesh.call(f"{name}.asked", "1")
        [stolen] = recorder.seen
        for agent, what in (("asked", "1"), ("asked", "2"), ("plain", "1")):
            with pytest.raises(Unauthenticated):
                await thief.call(f"{name}.{agent}", what, headers=stolen)
    assert ["1"] == guarded.handled


async def test_one_proof_is_enough_and_two_are_too_many(url: str, name: str, tmp_path: Path) -> None:
    """Tokens count only where they are set up, so do signatures; a request with both is refused."""
    only_tokens = ProtectedAgents(url, f"{name}.t", Auth(settings(tmp_path)))
    only_signed = ProtectedAgents(
        url, f"{name}.s", Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,)))
    )
    both = ProtectedAgents(url, f"{name}.b", Auth(settings(tmp_path, signatures=signers(bob=PUBLIC))))
    stamped = {NONCE: "n", SIGNATURE: "s", KEY: PUBLIC} | bearer()
    async with (
        only_tokens.mesh,
        only_signed.mesh,
        both.mesh,
        caller(url, tmp_path) as bob,
        AgentMesh(url) as mesh,
    ):
        for rule, asking, agent, headers in (
            ("credentials.signatures", bob, f"{name}.t.asked", None),
            ("credentials.tokens", mesh, f"{name}.s.asked", bearer()),
            ("credentials.two", mesh, f"{name}.b.asked", stamped),
        ):
            with pytest.raises(Unauthenticated) as caught:
                await asking.call(agent, "1", headers=headers)
            assert rule == caught.value.details["rule"]
        assert "bob bob []" == await bob.call(f"{name}.b.asked", "1")
        assert str(await mesh.call(f"{name}.b.asked", "1", headers=bearer())).startswith("alice")


async def test_who_overhears_a_request_takes_it_from_nobody(url: str, name: str, tmp_path: Path) -> None:
    """An agent that is driven by what another one is asked, on the same host, hears it; both count it."""
    guarded = ProtectedAgents(url, name, Auth(Settings(signatures=signers(bob=PUBLIC), rules=(ALL,))))
    heard: list[str] = []
    everything = guarded.mesh.subject_source(subjects.agent(f"{name}.asked"))

    @guarded.mesh.agent(AgentSpec(name=f"{name}.overhears"), sources=[everything])
    async def overhears(what: str) -> None:
        heard.append(current_call().caller.subject)

    @guarded.mesh.agent(AgentSpec(name=f"{name}.too"), sources=[everything])
    async def too(what: str) -> None:
        heard.append(current_call().caller.subject)

    async with guarded.mesh, caller(url, tmp_path) as mesh:
        for number in range(5):
            await mesh.call(f"{name}.asked", str(number))

        async def all_heard() -> bool:
            return len(heard) == 10

        await until(all_heard)
    assert {"bob"} == set(heard)
