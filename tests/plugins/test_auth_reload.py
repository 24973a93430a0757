"""What protects while mesh.toml and files change: what is refused, tried or broken opens nothing."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
from oam_auth import Auth, CallerSettings, Rule, Settings
from openagentmesh import AgentMesh, Call, Host, MeshError, Overloaded, PermissionDenied, Unauthenticated
from openagentmesh.runtime.config import load_config

from tests.support.credentials import KEY, settings, signers, token, write_keys
from tests.support.modules import write
from tests.support.protection import EVE, PUBLIC, signed

AGENT = """
import asyncio
from openagentmesh import AgentMesh, AgentSpec
mesh = AgentMesh()
@mesh.agent(AgentSpec(name={secret!r}))
async def secret(req: dict) -> str:
    return "reached"
@mesh.agent(AgentSpec(name={health!r}, replayable=True))
async def health(req: dict) -> int:
    {body}
"""


class ProtectedHost:
    """A host whose policy lets everybody ask `health`, and nobody `secret`."""

    def __init__(self, folder: Path, url: str, name: str) -> None:
        self.folder, self.names = folder, {"secret": f"{name}.secret", "health": f"{name}.health"}
        self._head = f"[mesh]\nurl = {url!r}\n[plugins.replay]\nstrict = true\n[host]\nentry_points = false\n"
        self._head += 'plugins = ["auth", "limits", "replay"]\nagents = ["agents"]\n'
        self.save("return 1", "policy")
        self.policy(f"[[rules]]\nname = 'h'\nanonymous = true\nagents = [{self.names['health']!r}]\n")

    def save(self, body: str, rules: str, more: str = "") -> None:
        tables = {
            "policy": "[plugins.auth]\npolicy = 'policy.toml'\n",
            "open": "[[plugins.auth.rules]]\nname = 'all'\nanonymous = true\nagents = ['>']\n",
        }
        write(self.folder, {"agents/a.py": AGENT.format(**self.names, body=body)})
        write(self.folder, {"mesh.toml": self._head + tables[rules] + more})

    def policy(self, text: str) -> None:
        write(self.folder, {"policy.toml": text})

    def host(self) -> Host:
        file = self.folder / "mesh.toml"
        read = partial(load_config, file)
        return Host(read(), config_file=file, read_config=read)

    async def is_reached(self, mesh: AgentMesh) -> bool:
        try:
            await mesh.call(self.names["secret"], {})
        except Unauthenticated:
            return False
        return True


@pytest.fixture
def guarded(tmp_path: Path, url: str, name: str) -> ProtectedHost:
    return ProtectedHost(tmp_path, url, name)


async def test_a_refused_change_opens_nothing(
    guarded: ProtectedHost, mesh: AgentMesh, tmp_path: Path
) -> None:
    """Though the files of what was in force cannot be read again at that moment."""
    limits = f"[agents.'{guarded.names['secret']}'.plugins.limits]\nrate = -1\n"
    async with guarded.host() as host:
        guarded.policy("rules = [[[")
        guarded.save("return 1", "open", limits)
        outcome = await host.reload()
        assert outcome is not None
        assert "limits" in outcome.error
        assert not await guarded.is_reached(mesh)
        guarded.policy(f"[[rules]]\nname = 'h'\nanonymous = true\nagents = [{guarded.names['health']!r}]\n")
        guarded.save("return 1", "policy")
        await host.reload()
        assert not await guarded.is_reached(mesh)
        guarded.save("return 1", "open")
        outcome = await host.reload()
        assert outcome is not None
        assert "" == outcome.error
        assert await guarded.is_reached(mesh)


async def test_what_is_only_tried_opens_nothing(
    guarded: ProtectedHost, mesh: AgentMesh, tmp_path: Path
) -> None:
    """While requests are replayed to a new version, the rules that come with it hold for nobody yet."""
    async with guarded.host() as host:
        assert 1 == await mesh.call(guarded.names["health"], {})
        ran, go = tmp_path / "ran", tmp_path / "go"
        body = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
        body += f"    while not pathlib.Path({str(go)!r}).exists(): await asyncio.sleep(0.01)\n"
        guarded.save(body + "    raise ValueError('worse')", "open")
        reloading = asyncio.create_task(host.reload())
        async with asyncio.timeout(10):
            while not ran.exists():
                await asyncio.sleep(0.005)
        assert not await guarded.is_reached(mesh)
        go.touch()
        outcome = await reloading
        assert outcome is not None
        assert "worse" in outcome.error
        assert not await guarded.is_reached(mesh)


async def test_each_file_has_its_own_last_good_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that is withdrawn counts no more, though the own token and the policy are broken meanwhile."""
    (tmp_path / "token").write_text(token())
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rules]]\nname = 'in the file'\nsubjects = ['*']\nagents = ['>']\n")
    caller = CallerSettings(token_file=tmp_path / "token")
    protection = Auth(settings(tmp_path, rules=(), policy=policy, caller=caller)).state
    assert protection.authenticator.tokens is not None
    assert "alice" == protection.authenticator.tokens.verify(token()).subject
    (tmp_path / "token").write_text("")
    policy.write_text("rules = [[[")
    write_keys(tmp_path / "keys.json", KEY.generate_key("Ed25519", parameters={"kid": "next"}))
    protection.reload()
    with pytest.raises(Unauthenticated):
        protection.authenticator.tokens.verify(token())
    assert ["in the file"] == [rule.name for rule in protection.authenticator.policy.rules]
    assert protection.authenticator.credentials.token
    assert 2 == caplog.text.count("the previous state stays in force")


async def test_who_may_nothing_takes_no_room(url: str) -> None:
    """A signer whom no rule lets in fills no memory, however often it asks."""
    known = signers(bob=PUBLIC, eve=EVE.key).model_copy(update={"remembered": 1})
    rule = Rule(name="bob", subjects=("bob",), agents=("nlp.*",))
    protection = Auth(Settings(signatures=known, rules=(rule,))).state

    async def outcome(call: Call) -> type[MeshError] | None:
        try:
            await protection.admit(call)
        except MeshError as exc:
            return type(exc)
        return None

    told = [await outcome(signed(by=EVE)) for _ in range(3)]
    assert [PermissionDenied] * 3 == told
    assert [None, Overloaded] == [await outcome(signed()) for _ in range(2)]
