"""The auth plugin protects handlers against every kind of request, also during reloads and replays."""

import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import Key, OKPKey
from oam_auth import Auth, CallerSettings, Rule, Settings
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    Host,
    MeshError,
    PermissionDenied,
    PluginFailed,
    Unauthenticated,
    current_call,
)
from openagentmesh.protocol import subjects
from openagentmesh.runtime.config import Config, HostSection, MeshSection, load_config

from tests.support.credentials import KEY, bearer, settings, token, write_keys
from tests.support.meshes import node_of
from tests.support.modules import MESH, write
from tests.support.protection import ProtectedAgents
from tests.support.waiting import until

MALFORMED = {"Authorization": "Bearer " + "x" * 40}


@pytest.fixture
async def protected(url: str, name: str, tmp_path: Path) -> AsyncIterator[ProtectedAgents]:
    agents = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with agents.mesh:
        yield agents


async def stream(mesh: AgentMesh, name: str, text: str, headers: dict[str, str]) -> list[Any]:
    return [chunk async for chunk in mesh.stream(name, text, headers=headers)]


async def test_a_verified_caller_reaches_handlers_with_its_identity(
    protected: ProtectedAgents, mesh: AgentMesh
) -> None:
    """By call, stream, send, in a thread and through a source, the handler gets subject and scopes."""
    name = protected.name
    assert "alice alice ['a', 'b']" == await mesh.call(f"{name}.responder", "1", headers=bearer())
    assert ["2"] == await stream(mesh, f"{name}.streamer", "2", bearer())
    assert "alice" == await mesh.call(f"{name}.threaded", "3", headers=bearer())
    await mesh.send(f"{name}.responder", "4", headers=bearer())
    await mesh.publish(f"{name}.news", "5", headers=bearer())
    await until_handled(protected, 5)
    assert {"1", "2", "3", "4", ("5", "alice")} == set(protected.handled)


async def until_handled(protected: ProtectedAgents, count: int) -> None:
    await until(lambda: len(protected.handled) >= count)


@pytest.mark.parametrize(
    "headers",
    [{}, MALFORMED, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer"}, {"Authorization": ""}],
    ids=["no header", "malformed token", "basic", "no token", "empty header"],
)
async def test_an_unverified_caller_reaches_no_handler(
    protected: ProtectedAgents, mesh: AgentMesh, headers: dict[str, str]
) -> None:
    """Not by call, stream, send, a source or a change of a key, nor in a thread or through an open gate."""
    name, errors, replies = protected.name, set[str](), list[MeshError]()

    await node_of(mesh).connection.subscribe(
        subjects.errors(f"{name}.>"), lambda message: errors.add(message.subject)
    )
    for agent in ("responder", "threaded"):
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{name}.{agent}", "no", headers=headers)
    with pytest.raises(Unauthenticated):
        await stream(mesh, f"{name}.streamer", "no", headers)
    await mesh.send(f"{name}.responder", "no", headers=headers, on_reply=print, on_error=replies.append)
    await mesh.send(f"{name}.responder", "no", headers=headers)
    await mesh.publish(f"{name}.news", "no", headers=headers)
    await mesh.kv.put(f"{name}.key", "no")
    await protected.mesh.publish(f"{name}.gate", "open")

    async def is_open_and_refuses() -> bool:
        try:
            await mesh.call(f"{name}.gated", "no", headers=headers)
        except MeshError as exc:
            return exc.code == "unauthenticated"
        return True

    await until(is_open_and_refuses)
    of_sources = {subjects.errors(f"{name}.{agent}") for agent in ("messages", "keys")}
    await until(lambda: replies and of_sources <= errors)
    assert ["unauthenticated"] == [error.code for error in replies]
    assert [] == protected.handled


async def test_input_is_not_validated_for_an_unverified_caller(
    protected: ProtectedAgents, mesh: AgentMesh
) -> None:
    """A caller is refused before its input is validated, so errors do not reveal the agent's input type."""
    for payload in (7, {"a": "b"}, None):
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{protected.name}.responder", payload)


async def test_refusals_name_the_rule_and_no_secret(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """An error names the failed check or rule, and does not contain the token."""
    rule = Rule(name="readers", subjects=("alice",), scopes=("nlp.read",), agents=(f"{name}.*",))
    async with ProtectedAgents(url, name, Auth(settings(tmp_path, rules=(rule,)))).mesh:
        expired, valid, other = token(exp=1), token(), token(sub="bob")
        for value, error, expected in (
            (expired, Unauthenticated, "token.expired"),
            (valid, PermissionDenied, "readers"),
            (other, PermissionDenied, ""),
        ):
            with pytest.raises(error) as caught:
                await mesh.call(f"{name}.responder", "no", headers=bearer(value))
            assert expected == caught.value.details["rule"]
            assert value.rpartition(".")[2] not in f"{caught.value} {caught.value.details}"


async def test_requests_of_a_mesh_carry_its_token(
    url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests carry it, except those with a token; events carry it only with `token_on_events`."""
    (tmp_path / "token").write_text(token(sub="bob") + "\n")
    received: list[str] = []
    with_token = Settings(caller=CallerSettings(token_file=tmp_path / "token"))
    protected = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with protected.mesh, AgentMesh(url, plugins=[Auth(with_token)]) as mesh, AgentMesh(url) as open_:

        @open_.agent(AgentSpec(name=f"{name}.open"), sources=[open_.subject_source(f"{name}.events")])
        async def on_event(text: str) -> None:
            received.append(current_call().headers.get("Authorization", "no token"))

        await open_.catalog()  # from here on it is subscribed
        assert str(await mesh.call(f"{name}.responder", "1")).startswith("bob")
        assert ["2"] == [chunk async for chunk in mesh.stream(f"{name}.streamer", "2")]
        assert str(await mesh.call(f"{name}.responder", "3", headers=bearer())).startswith("alice")
        await mesh.publish(f"{name}.events", "4")
        await until(lambda: received)
    assert ["no token"] == received
    monkeypatch.setenv("OAM_TOKEN", token(sub="carol"))
    on_events = Auth(Settings(caller=CallerSettings(token_on_events=True)))
    protected = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with protected.mesh, AgentMesh(url, plugins=[on_events]) as mesh:
        await mesh.publish(f"{name}.news", "5")
        await until_handled(protected, 1)
    assert [("5", "carol")] == protected.handled


async def test_nested_calls_carry_the_token_of_the_host(url: str, name: str, tmp_path: Path) -> None:
    """A nested call carries the host's token, unless the handler passes its caller's token on."""
    (tmp_path / "token").write_text(token(sub="host"))
    auth = Auth(settings(tmp_path, caller=CallerSettings(token_file=tmp_path / "token")))
    protected = ProtectedAgents(url, name, auth)
    mesh = protected.mesh

    @mesh.agent(AgentSpec(name=f"{name}.nested"))
    async def nested(pass_on: bool) -> str:
        headers = {"Authorization": current_call().headers["Authorization"]} if pass_on else None
        return str(await mesh.call(f"{name}.threaded", "x", headers=headers))

    async with mesh, AgentMesh(url) as caller:
        assert "host" == await caller.call(f"{name}.nested", payload=False, headers=bearer())
        assert "alice" == await caller.call(f"{name}.nested", payload=True, headers=bearer())


AGENT = (
    MESH
    + """
@mesh.agent(AgentSpec(name="{name}", replayable=True))
async def responder(req: dict) -> str:
    {body}
"""
)


def write_project(folder: Path, name: str, body: str = "return 'one'") -> None:
    write(folder, {"agents/a.py": AGENT.format(name=name, body=body)})


def config(folder: Path, url: str, auth: Settings) -> Config:
    section = HostSection(agents=["agents"], entry_points=False, plugins=["auth", "replay"])
    table = auth.model_dump(mode="json", exclude_defaults=True)
    return Config(folder=folder, mesh=MeshSection(url=url), host=section, plugins={"auth": table})


async def test_reloads_and_replays_are_protected(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A new version is protected from its first request on, and refused requests are not replayed."""
    write_project(tmp_path, name)
    async with Host(config(tmp_path, url, settings(tmp_path))) as host:
        with pytest.raises(Unauthenticated):
            await mesh.call(name, {"from": "anonymous"})
        assert "one" == await mesh.call(name, {"from": "alice"}, headers=bearer())
        replayed = tmp_path / "replayed"
        body = f"__import__('pathlib').Path({str(replayed)!r}).write_text(str(req)); return 'two'"
        write_project(tmp_path, name, body)
        outcome = await host.reload()
        assert outcome is not None
        assert "{'from': 'alice'}" == replayed.read_text()
        with pytest.raises(Unauthenticated):
            await mesh.call(name, {})
        assert "two" == await mesh.call(name, {}, headers=bearer())


async def test_a_valid_policy_file_takes_effect_and_an_invalid_one_does_not(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Changes of a policy file are followed; an invalid file is logged, and the last valid one stays."""
    policy = tmp_path / "policy.toml"
    rule = '[[rules]]\nname = "r"\nsubjects = ["alice"]\nagents = [">"]\nverbs = ["{verb}"]\n'
    policy.write_text(rule.format(verb="call"))
    write_project(tmp_path, name)
    auth = settings(tmp_path, rules=(), policy=Path("policy.toml"))

    async def is_permitted() -> bool:
        try:
            await mesh.call(name, {}, headers=bearer())
        except PermissionDenied:
            return False
        return True

    async def is_refused() -> bool:
        return not await is_permitted()

    async with Host(config(tmp_path, url, auth)):
        assert await is_permitted()
        policy.write_text("[[rules")
        await until(lambda: "the previous state stays in force" in caplog.text)
        assert "policy.toml is not TOML" in caplog.text
        assert await is_permitted()
        policy.write_text(rule.format(verb="stream"))
        await until(is_refused)
        (tmp_path / "new.toml").write_text(rule.format(verb="call"))
        (tmp_path / "new.toml").replace(policy)
        await until(is_permitted)


async def test_a_host_without_usable_keys_does_not_start(url: str, name: str, tmp_path: Path) -> None:
    """The start fails with the names of the plugin and of the file, so that no agent runs unprotected."""
    write_project(tmp_path, name)
    without_keys = config(tmp_path, url, settings(tmp_path))
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(PluginFailed, match=r"'auth' failed in mesh_configure: .*keys\.json"):
        async with Host(without_keys):
            pass


async def test_a_reload_with_invalid_rules_is_refused(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A mesh.toml with an invalid rule is refused and the previous rules stay; a valid one takes effect."""
    write_project(tmp_path, name)
    toml = (
        f'[mesh]\nurl = "{url}"\n[host]\nplugins = ["auth"]\nentry_points = false\n'
        '[plugins.auth.tokens]\nissuer = "https://id.example"\naudience = "mesh"\nkeys = ["keys.json"]\n'
        '[[plugins.auth.rules]]\nname = "r"\nsubjects = ["*"]\nagents = [">"]\n'
    )
    settings(tmp_path)
    (tmp_path / "mesh.toml").write_text(toml)
    read = partial(load_config, tmp_path / "mesh.toml")
    async with Host(read(), config_file=tmp_path / "mesh.toml", read_config=read) as host:
        (tmp_path / "mesh.toml").write_text(toml + '[[plugins.auth.rules]]\nname = "r"\nagents = [">"]\n')
        outcome = await host.reload()
        assert outcome is not None
        assert "give subjects" in outcome.error
        assert "one" == await mesh.call(name, {}, headers=bearer())
        with pytest.raises(Unauthenticated):
            await mesh.call(name, {})
        (tmp_path / "mesh.toml").write_text(toml.replace('["*"]', '["bob"]'))
        await host.reload()
        with pytest.raises(PermissionDenied):
            await mesh.call(name, {}, headers=bearer())


async def test_a_replay_has_the_verified_caller(url: str, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """A replayed request has its verified subject, not the instance id that it states, and no token."""
    write_project(tmp_path, name)
    replayed = tmp_path / "replayed"
    body = "from openagentmesh import current_call; c = current_call(); "
    body += "from pathlib import Path; text = f'{c.caller} {sorted(c.headers)}'; "
    body += f"Path({str(replayed)!r}).write_text(text); return 'one'"
    async with Host(config(tmp_path, url, settings(tmp_path))) as host:
        await mesh.call(name, {}, headers=bearer(token(sub="mallory")) | {"X-Mesh-Instance-Id": "admin"})
        write_project(tmp_path, name, body)
        assert await host.reload() is not None
    assert replayed.read_text().startswith("mallory [")
    assert "Authorization" not in replayed.read_text()


async def test_an_anonymous_caller_has_no_subject(url: str, mesh: AgentMesh, name: str) -> None:
    """If anonymous callers are permitted, the instance id that a request states is not its subject."""
    rule = Rule(name="open", anonymous=True, agents=(f"{name}.*",))
    async with ProtectedAgents(url, name, Auth(Settings(rules=(rule,)))).mesh:
        answer = await mesh.call(f"{name}.responder", "1", headers={"X-Mesh-Instance-Id": "alice"})
    assert "  []" == answer


async def test_another_spelling_of_the_header_is_refused(protected: ProtectedAgents, mesh: AgentMesh) -> None:
    """`authorization` in any other spelling is refused: two spellings could carry two tokens."""
    for headers in ({"authorization": f"Bearer {token()}"}, bearer() | {"AUTHORIZATION": "Bearer x"}):
        with pytest.raises(Unauthenticated) as caught:
            await mesh.call(f"{protected.name}.threaded", "1", headers=headers)
        assert "credentials.header" == caught.value.details["rule"]


async def test_files_are_followed_since_they_were_read(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A key that is replaced before the start, or while its folder is recreated, is no longer accepted."""
    folder = tmp_path / "keys"
    folder.mkdir()
    protected = ProtectedAgents(url, name, Auth(settings(folder)))
    other = OKPKey.generate_key("Ed25519", parameters={"kid": "other"})
    write_keys(folder / "keys.json", other)

    async def accepts(key: Key) -> bool:
        try:
            await mesh.call(f"{name}.threaded", "1", headers=bearer(token(key)))
        except Unauthenticated:
            return False
        return True

    async with protected.mesh:
        await until(partial(accepts, other))
        assert not await accepts(KEY)
        shutil.rmtree(folder)
        assert await accepts(other)
        folder.mkdir()
        write_keys(folder / "keys.json", KEY)
        await until(partial(accepts, KEY))
        assert not await accepts(other)
