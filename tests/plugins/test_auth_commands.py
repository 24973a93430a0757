"""Auth on the command line: permitted and refused requests, and `oam auth check`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from oam_auth import Auth, Settings
from oam_auth.authenticator import Authenticator
from oam_auth.policy import Identity
from oam_auth.signatures import Nonces
from openagentmesh.runtime.config import load_config
from typer.testing import CliRunner

from tests.support.commands import Up, oam
from tests.support.credentials import AUDIENCE, ISSUER, seed, token, write_keys
from tests.support.documents import blocks
from tests.support.modules import MESH, agent, write

SEED, PUBLIC = seed()
HOST = f"""
[server]
port = 0
store = ""
[host]
plugins = ["auth"]
entry_points = false
[plugins.auth.tokens]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
keys = ["keys.json"]
[plugins.auth.signatures.users.{PUBLIC}]
subject = "bob"
[[plugins.auth.rules]]
name = "readers"
subjects = ["alice", "bob"]
agents = ["nlp.*"]
[[plugins.auth.rules]]
name = "admins"
subjects = ["*"]
scopes = ["admin"]
agents = ["ops.>"]
[[plugins.auth.rules]]
name = "open"
anonymous = true
agents = ["public"]
"""
CALLER = 'host.plugins = ["auth"]\n'


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("host")
    names = ("nlp.a", "ops.b.c", "public")
    write(folder, {"mesh.toml": HOST, "agents/a.py": MESH + "".join(map(agent, names))})
    write_keys(folder / "keys.json")
    with Up(folder) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "credential", "refusal"),
    [
        ("nlp.a", token(), ""),
        ("nlp.a", token(sub="carol"), "No rule permits 'carol' to call 'nlp.a'"),
        ("nlp.a", token(exp=1), "The token has expired"),
        ("nlp.a", "", "Anonymous callers may not call 'nlp.a'"),
        ("nlp.a", "signed", ""),
        ("ops.b.c", "signed", "The rule 'admins' permits 'bob' to call 'ops.b.c' only with the scope admin"),
        ("ops.b.c", token(scope="x admin"), ""),
        ("public", "", ""),
    ],
    ids=[
        "token", "other subject", "expired", "no credentials", "signed", "signed without scope", "scope",
        "anonymous",
    ],
)  # fmt: skip
def test_commands_carry_credentials(up: Up, tmp_path: Path, name: str, credential: str, refusal: str) -> None:
    """Requests of `oam` carry the token of the environment or the signature of a seed in mesh.toml.

    A refused request exits with 1, and prints the reason.
    """
    table = '[plugins.auth.caller]\nnkey_file = "bob.nk"\n' if credential == "signed" else ""
    write(tmp_path, {"mesh.toml": CALLER + table, "bob.nk": SEED.decode()})
    env = {"OAM_TOKEN": credential} if credential != "signed" else {}
    result = oam("agent", "call", name, "{}", "--url", up.url, cwd=tmp_path, env=env)
    assert refusal in result.err
    assert ((1, "") if refusal else (0, '"ok"')) == (result.code, result.out.strip())


def test_check_shows_the_configuration(up: Up) -> None:
    """Without arguments `oam auth check` shows the names of rules, keys and signers, and no secret."""
    shown = oam("auth", "check", "--json", cwd=up.folder).json
    assert ["readers", "admins", "open"] == shown["rules"]
    assert (["first"], ["bob"], "nothing") == (
        shown["keys in files"], shown["signers"], shown["requests carry"],
    )  # fmt: skip
    assert "rules: readers, admins, open" in oam("auth", "check", cwd=up.folder).out


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "line"),
    [
        (("nlp.a", "--token", "-"), token(), 0, "rule: readers"),
        (("nlp.a", "--token", "-", "--verb", "source"), token(), 1, "'alice' to source 'nlp.a'"),
        (("--token", "-"), token(), 0, "subject: alice"),
        (("--token", "-"), token(exp=1), 1, "refused: The token has expired."),
        (("nlp.a",), "", 1, "refused: Anonymous callers may not call 'nlp.a'"),
        (("public",), "", 0, "rule: open"),
        (("ops.x", "--subject", "dora", "--scopes", "admin more"), "", 0, "rule: admins"),
        (("ops.x", "--subject", "dora"), "", 1, "only with the scope admin"),
        (("--token", "missing"), "", 1, "missing cannot be read"),
    ],
    ids=[
        "token", "token and verb", "token alone", "expired", "anonymous refused", "anonymous permitted",
        "subject with scope", "subject without scope", "missing file",
    ],
)  # fmt: skip
def test_check_decides_as_a_host(
    up: Up, arguments: tuple[str, ...], stdin: str, code: int, line: str
) -> None:
    """It shows the subject of a token and the rule that permits a request, or the reason of the refusal."""
    app, settings = typer.Typer(), load_config(up.folder / "mesh.toml", {}).plugins["auth"]
    auth = Auth()
    auth.mesh_configure(Settings.model_validate(settings), up.folder)
    auth.mesh_cli(app)
    runner = CliRunner()
    result = runner.invoke(app, ["auth", "check", *arguments], input=stdin)
    assert (code, True) == (result.exit_code, line in result.output)
    found = json.loads(runner.invoke(app, ["auth", "check", *arguments, "--json"], input=stdin).stdout)
    assert ("why" in found) == bool(code)


def test_an_invalid_policy_file_fails_all_commands(tmp_path: Path) -> None:
    """`up`, `check` and `auth check` name the file and the missing key, without a traceback."""
    write(
        tmp_path,
        {"mesh.toml": HOST + '[plugins.auth]\npolicy = "p.toml"\n', "p.toml": "[[rules]]\nname = 'x'\n"},
    )
    write_keys(tmp_path / "keys.json")
    for command in (("up",), ("check",), ("auth", "check")):
        result = oam(*command, cwd=tmp_path)
        assert 0 != result.code
        assert "p.toml: rules.0.agents: Field required" in result.out + result.err
        assert "Traceback" not in result.err


def test_the_programs_of_the_documentation_create_valid_credentials(tmp_path: Path) -> None:
    """The programs in docs/plugins/auth.md create a key, a token and a signer that are accepted."""
    for code in blocks("docs/plugins/auth.md"):
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    secret, public = (line.rpartition(" ")[2] for line in ran.stdout.splitlines())
    (tmp_path / "billing.nk").write_text(secret)
    settings = Settings.model_validate(
        {
            "tokens": {"issuer": "dev", "audience": "mesh", "keys": ["issuer.jwk"]},
            "signatures": {"users": {public: {"subject": "billing"}}},
            "caller": {"nkey_file": "billing.nk"},
        }
    )
    loaded = Authenticator.load(settings, tmp_path, Nonces())
    assert loaded.tokens is not None
    identity = loaded.tokens.verify((tmp_path / "token").read_text())
    assert Identity("alice", frozenset({"nlp.read"})) == identity
    assert loaded.credentials.signer is not None
    assert public == loaded.credentials.signer.key
