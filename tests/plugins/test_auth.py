"""The auth plugin on every way to a handler: nobody reaches one around it."""

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

STRANGER = {"Authorization": "Bearer " + "x" * 40}


@pytest.fixture
async def guarded(url: str, name: str, tmp_path: Path) -> AsyncIterator[ProtectedAgents]:
    made = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with made.mesh:
        yield made


async def stream(mesh: AgentMesh, name: str, what: str, headers: dict[str, str]) -> list[Any]:
    return [chunk async for chunk in mesh.stream(name, what, headers=headers)]


async def test_a_proven_caller_reaches_handlers_and_is_known_there(
    guarded: ProtectedAgents, mesh: AgentMesh
) -> None:
    """By call, stream, send, in a thread and through a source; the handler sees subject and scopes."""
    name = guarded.name
    assert "alice alice ['a', 'b']" == await mesh.call(f"{name}.asked", "1", headers=bearer())
    assert ["2"] == await stream(mesh, f"{name}.counts", "2", bearer())
    assert "alice" == await mesh.call(f"{name}.plain", "3", headers=bearer())
    await mesh.send(f"{name}.asked", "4", headers=bearer())
    await mesh.publish(f"{name}.news", "5", headers=bearer())
    await until_reached(guarded, 5)
    assert {"1", "2", "3", "4", ("5", "alice")} == set(guarded.handled)


async def until_reached(guarded: ProtectedAgents, number: int) -> None:
    async def enough() -> bool:
        return len(guarded.handled) >= number

    await until(enough)


@pytest.mark.parametrize(
    "headers",
    [{}, STRANGER, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer"}, {"Authorization": ""}],
    ids=["none", "garbage", "basic", "empty", "nothing"],
)
async def test_nobody_else_reaches_a_handler(
    guarded: ProtectedAgents, mesh: AgentMesh, headers: dict[str, str]
) -> None:
    """Not by call, stream, send, a source or a change of a key; not in a thread, nor through an open gate."""
    name, errors, replies = guarded.name, set[str](), list[MeshError]()

    await node_of(mesh).connection.subscribe(
        subjects.errors(f"{name}.>"), lambda message: errors.add(message.subject)
    )
    for agent in ("asked", "plain"):
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{name}.{agent}", "no", headers=headers)
    with pytest.raises(Unauthenticated):
        await stream(mesh, f"{name}.counts", "no", headers)
    await mesh.send(f"{name}.asked", "no", headers=headers, on_reply=print, on_error=replies.append)
    await mesh.send(f"{name}.asked", "no", headers=headers)
    await mesh.publish(f"{name}.news", "no", headers=headers)
    await mesh.kv.put(f"{name}.key", "no")
    await guarded.mesh.publish(f"{name}.gate", "open")

    async def open_and_refused() -> bool:
        try:
            await mesh.call(f"{name}.gated", "no", headers=headers)
        except MeshError as exc:
            return exc.code == "unauthenticated"
        return True

    await until(open_and_refused)

    async def answered() -> bool:
        return bool(replies) and {subjects.errors(f"{name}.{agent}") for agent in ("reads", "keys")} <= errors

    await until(answered)
    assert ["unauthenticated"] == [error.code for error in replies]
    assert [] == guarded.handled


async def test_nothing_is_read_before_a_caller_is_let_in(guarded: ProtectedAgents, mesh: AgentMesh) -> None:
    """A stranger does not learn what an agent takes: it is refused before its input is looked at."""
    for payload in (7, {"a": "b"}, None):
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{guarded.name}.asked", payload)


async def test_refusals_name_the_rule_and_no_secret(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """What failed is told by its name, to programs and people; the token is nowhere."""
    rule = Rule(name="readers", subjects=("alice",), scopes=("nlp.read",), agents=(f"{name}.*",))
    async with ProtectedAgents(url, name, Auth(settings(tmp_path, rules=(rule,)))).mesh:
        expired, good, other = token(exp=1), token(), token(sub="bob")
        for value, kind, told in (
            (expired, Unauthenticated, "token.expired"),
            (good, PermissionDenied, "readers"),
            (other, PermissionDenied, ""),
        ):
            with pytest.raises(kind) as caught:
                await mesh.call(f"{name}.asked", "no", headers=bearer(value))
            assert told == caught.value.details["rule"]
            assert value.rpartition(".")[2] not in f"{caught.value} {caught.value.details}"


async def test_a_mesh_carries_its_own_token(
    url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all requests; not on events, which anybody may hear, unless told so. A caller's own word stays."""
    (tmp_path / "token").write_text(token(sub="bob") + "\n")
    seen: list[str] = []
    carrying = Settings(caller=CallerSettings(token_file=tmp_path / "token"))
    guarded = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with guarded.mesh, AgentMesh(url, plugins=[Auth(carrying)]) as mesh, AgentMesh(url) as open_:

        @open_.agent(AgentSpec(name=f"{name}.open"), sources=[open_.subject_source(f"{name}.events")])
        async def hears(what: str) -> None:
            seen.append(current_call().headers.get("Authorization", "nothing"))

        await open_.catalog()  # from here on it hears
        assert str(await mesh.call(f"{name}.asked", "1")).startswith("bob")
        assert ["2"] == [chunk async for chunk in mesh.stream(f"{name}.counts", "2")]
        assert str(await mesh.call(f"{name}.asked", "3", headers=bearer())).startswith("alice")
        await mesh.publish(f"{name}.events", "4")

        async def heard() -> bool:
            return bool(seen)

        await until(heard)
    assert ["nothing"] == seen
    monkeypatch.setenv("OAM_TOKEN", token(sub="carol"))
    loud = Auth(Settings(caller=CallerSettings(token_on_events=True)))
    guarded = ProtectedAgents(url, name, Auth(settings(tmp_path)))
    async with guarded.mesh, AgentMesh(url, plugins=[loud]) as mesh:
        await mesh.publish(f"{name}.news", "5")
        await until_reached(guarded, 1)
    assert [("5", "carol")] == guarded.handled


async def test_an_agent_asks_in_its_own_name(url: str, name: str, tmp_path: Path) -> None:
    """A nested call carries the host's token, not its caller's; a handler may hand that one on."""
    (tmp_path / "token").write_text(token(sub="host"))
    auth = Auth(settings(tmp_path, caller=CallerSettings(token_file=tmp_path / "token")))
    guarded = ProtectedAgents(url, name, auth)
    mesh = guarded.mesh

    @mesh.agent(AgentSpec(name=f"{name}.asks"))
    async def asks(hand_on: bool) -> str:
        headers = {"Authorization": current_call().headers["Authorization"]} if hand_on else None
        return str(await mesh.call(f"{name}.plain", "x", headers=headers))

    async with mesh, AgentMesh(url) as caller:
        assert "host" == await caller.call(f"{name}.asks", payload=False, headers=bearer())
        assert "alice" == await caller.call(f"{name}.asks", payload=True, headers=bearer())


AGENT = (
    MESH
    + """
@mesh.agent(AgentSpec(name="{name}", replayable=True))
async def asked(req: dict) -> str:
    {body}
"""
)


def write_project(folder: Path, name: str, body: str = "return 'one'") -> None:
    write(folder, {"agents/a.py": AGENT.format(name=name, body=body)})


def config(folder: Path, url: str, auth: Settings) -> Config:
    section = HostSection(agents=["agents"], entry_points=False, plugins=["auth", "replay"])
    table = auth.model_dump(mode="json", exclude_defaults=True)
    return Config(folder=folder, mesh=MeshSection(url=url), host=section, plugins={"auth": table})


async def test_reloads_and_replays_are_no_way_around(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The new version is guarded from its first request on; what was refused is never run again."""
    write_project(tmp_path, name)
    async with Host(config(tmp_path, url, settings(tmp_path))) as host:
        with pytest.raises(Unauthenticated):
            await mesh.call(name, {"who": "stranger"})
        assert "one" == await mesh.call(name, {"who": "alice"}, headers=bearer())
        ran = tmp_path / "ran"
        write_project(
            tmp_path, name, f"__import__('pathlib').Path({str(ran)!r}).write_text(str(req)); return 'two'"
        )
        outcome = await host.reload()
        assert outcome is not None
        assert "{'who': 'alice'}" == ran.read_text()
        with pytest.raises(Unauthenticated):
            await mesh.call(name, {})
        assert "two" == await mesh.call(name, {}, headers=bearer())


async def test_what_changes_on_disk_counts_and_what_breaks_does_not(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy file is followed; a broken one is told, and the last good one stays in force."""
    policy = tmp_path / "policy.toml"
    rule = '[[rules]]\nname = "r"\nsubjects = ["alice"]\nagents = [">"]\nverbs = ["{verb}"]\n'
    policy.write_text(rule.format(verb="call"))
    write_project(tmp_path, name)
    auth = settings(tmp_path, rules=(), policy=Path("policy.toml"))

    async def allowed() -> bool:
        try:
            await mesh.call(name, {}, headers=bearer())
        except PermissionDenied:
            return False
        return True

    async def refused() -> bool:
        return not await allowed()

    async def told() -> bool:
        return "the previous state stays in force" in caplog.text

    async with Host(config(tmp_path, url, auth)):
        assert await allowed()
        policy.write_text("[[rules")
        await until(told)
        assert "policy.toml is not TOML" in caplog.text
        assert await allowed()
        policy.write_text(rule.format(verb="stream"))
        await until(refused)
        (tmp_path / "new.toml").write_text(rule.format(verb="call"))
        (tmp_path / "new.toml").replace(policy)
        await until(allowed)


async def test_a_host_without_its_keys_does_not_start(url: str, name: str, tmp_path: Path) -> None:
    """Never one that runs and does not protect; the plugin is named, and the file."""
    write_project(tmp_path, name)
    broken = config(tmp_path, url, settings(tmp_path))
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(PluginFailed, match=r"'auth' failed in mesh_configure: .*keys\.json"):
        async with Host(broken):
            pass


async def test_settings_that_cannot_protect_change_nothing(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A mesh.toml that is saved with a rule too many is refused; the rules from before hold."""
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


async def test_a_replay_is_of_who_was_proven(url: str, mesh: AgentMesh, name: str, tmp_path: Path) -> None:
    """The new version sees the same subject again, never what the request says of itself, nor its token."""
    write_project(tmp_path, name)
    ran = tmp_path / "ran"
    tell = "from openagentmesh import current_call; c = current_call(); caller = c.caller; "
    tell += "from pathlib import Path; told = f'{caller} {sorted(c.headers)}'; "
    tell += f"Path({str(ran)!r}).write_text(told); return 'one'"
    async with Host(config(tmp_path, url, settings(tmp_path))) as host:
        await mesh.call(name, {}, headers=bearer(token(sub="mallory")) | {"X-Mesh-Instance-Id": "admin"})
        write_project(tmp_path, name, tell)
        assert await host.reload() is not None
    assert ran.read_text().startswith("mallory [")
    assert "Authorization" not in ran.read_text()


async def test_who_proves_nothing_is_nobody(url: str, mesh: AgentMesh, name: str) -> None:
    """Where anonymous callers may ask, the name that a request gives itself is no subject."""
    rule = Rule(name="open", anonymous=True, agents=(f"{name}.*",))
    async with ProtectedAgents(url, name, Auth(Settings(rules=(rule,)))).mesh:
        told = await mesh.call(f"{name}.asked", "1", headers={"X-Mesh-Instance-Id": "alice"})
    assert "  []" == told


async def test_the_token_has_one_place(guarded: ProtectedAgents, mesh: AgentMesh) -> None:
    """Written otherwise it is refused by name: two spellings could be two tokens."""
    for headers in ({"authorization": f"Bearer {token()}"}, bearer() | {"AUTHORIZATION": "Bearer x"}):
        with pytest.raises(Unauthenticated) as caught:
            await mesh.call(f"{guarded.name}.plain", "1", headers=headers)
        assert "credentials.header" == caught.value.details["rule"]


async def test_files_are_followed_from_when_they_were_read(
    url: str, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A key that is withdrawn before the start, or with its folder while the mesh is up, counts no more."""
    folder = tmp_path / "keys"
    folder.mkdir()
    guarded = ProtectedAgents(url, name, Auth(settings(folder)))
    other = OKPKey.generate_key("Ed25519", parameters={"kid": "other"})
    write_keys(folder / "keys.json", other)

    async def lets(key: Key) -> bool:
        try:
            await mesh.call(f"{name}.plain", "1", headers=bearer(token(key)))
        except Unauthenticated:
            return False
        return True

    async with guarded.mesh:
        await until(partial(lets, other))
        assert not await lets(KEY)
        shutil.rmtree(folder)
        assert await lets(other)
        folder.mkdir()
        write_keys(folder / "keys.json", KEY)
        await until(partial(lets, KEY))
        assert not await lets(other)
