"""Auth during reloads: refused reloads, candidates and invalid files permit nothing more."""

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
from tests.support.waiting import until

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
    """A host whose policy permits anonymous calls of `health`, and no calls of `secret`."""

    def __init__(self, folder: Path, url: str, name: str) -> None:
        self.folder, self.names = folder, {"secret": f"{name}.secret", "health": f"{name}.health"}
        self._head = f"[mesh]\nurl = {url!r}\n[plugins.replay]\nstrict = true\n[host]\nentry_points = false\n"
        self._head += 'plugins = ["auth", "limits", "replay"]\nagents = ["agents"]\n'
        self.save("return 1", "policy")
        self.write_policy()

    def save(self, body: str, rules: str, more: str = "") -> None:
        tables = {
            "policy": "[plugins.auth]\npolicy = 'policy.toml'\n",
            "open": "[[plugins.auth.rules]]\nname = 'all'\nanonymous = true\nagents = ['>']\n",
        }
        write(self.folder, {"agents/a.py": AGENT.format(**self.names, body=body)})
        write(self.folder, {"mesh.toml": self._head + tables[rules] + more})

    def write_policy(self, text: str = "") -> None:
        permitted = f"[[rules]]\nname = 'h'\nanonymous = true\nagents = [{self.names['health']!r}]\n"
        write(self.folder, {"policy.toml": text or permitted})

    def host(self) -> Host:
        file = self.folder / "mesh.toml"
        read = partial(load_config, file)
        return Host(read(), config_file=file, read_config=read)

    async def permits_secret(self, mesh: AgentMesh) -> bool:
        try:
            await mesh.call(self.names["secret"], {})
        except Unauthenticated:
            return False
        return True


@pytest.fixture
def protected(tmp_path: Path, url: str, name: str) -> ProtectedHost:
    return ProtectedHost(tmp_path, url, name)


async def test_a_refused_reload_permits_nothing_more(
    protected: ProtectedHost, mesh: AgentMesh, tmp_path: Path
) -> None:
    """The previous policy stays in force, also if its file is invalid at that moment."""
    limits = f"[agents.'{protected.names['secret']}'.plugins.limits]\nrate = -1\n"
    async with protected.host() as host:
        protected.write_policy("rules = [[[")
        protected.save("return 1", "open", limits)
        outcome = await host.reload()
        assert outcome is not None
        assert "limits" in outcome.error
        assert not await protected.permits_secret(mesh)
        protected.write_policy()
        protected.save("return 1", "policy")
        await host.reload()
        assert not await protected.permits_secret(mesh)
        protected.save("return 1", "open")
        outcome = await host.reload()
        assert outcome is not None
        assert "" == outcome.error
        assert await protected.permits_secret(mesh)


async def test_new_rules_do_not_apply_while_requests_are_replayed(
    protected: ProtectedHost, mesh: AgentMesh, tmp_path: Path
) -> None:
    """While a candidate handles replayed requests, its new rules are not in force yet."""
    async with protected.host() as host:
        assert 1 == await mesh.call(protected.names["health"], {})
        started, release = tmp_path / "started", tmp_path / "release"
        body = f"import pathlib; pathlib.Path({str(started)!r}).touch()\n"
        body += f"    while not pathlib.Path({str(release)!r}).exists(): await asyncio.sleep(0.01)\n"
        protected.save(body + "    raise ValueError('worse')", "open")
        reloading = asyncio.create_task(host.reload())
        await until(started.exists)
        assert not await protected.permits_secret(mesh)
        release.touch()
        outcome = await reloading
        assert outcome is not None
        assert "worse" in outcome.error
        assert not await protected.permits_secret(mesh)


async def test_each_file_keeps_its_own_last_valid_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A withdrawn key is refused, although the token file and the policy file are invalid meanwhile."""
    (tmp_path / "token").write_text(token())
    policy = tmp_path / "policy.toml"
    policy.write_text("[[rules]]\nname = 'in the file'\nsubjects = ['*']\nagents = ['>']\n")
    caller = CallerSettings(token_file=tmp_path / "token")
    state = Auth(settings(tmp_path, rules=(), policy=policy, caller=caller)).state
    assert state.authenticator.tokens is not None
    assert "alice" == state.authenticator.tokens.verify(token()).subject
    (tmp_path / "token").write_text("")
    policy.write_text("rules = [[[")
    write_keys(tmp_path / "keys.json", KEY.generate_key("Ed25519", parameters={"kid": "next"}))
    state.reload()
    with pytest.raises(Unauthenticated):
        state.authenticator.tokens.verify(token())
    assert ["in the file"] == [rule.name for rule in state.authenticator.policy.rules]
    assert state.authenticator.credentials.token
    assert 2 == caplog.text.count("the previous state stays in force")


async def test_signatures_of_refused_requests_are_not_remembered(url: str) -> None:
    """Signed requests that no rule permits do not use up the limit of remembered signatures."""
    known = signers(bob=PUBLIC, eve=EVE.key).model_copy(update={"remembered": 1})
    rule = Rule(name="bob", subjects=("bob",), agents=("nlp.*",))
    state = Auth(Settings(signatures=known, rules=(rule,))).state

    async def outcome(call: Call) -> type[MeshError] | None:
        try:
            await state.admit(call)
        except MeshError as exc:
            return type(exc)
        return None

    assert [PermissionDenied] * 3 == [await outcome(signed(signer=EVE)) for _ in range(3)]
    assert [None, Overloaded] == [await outcome(signed()) for _ in range(2)]
