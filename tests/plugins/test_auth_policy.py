"""The policy: rules permit requests, all others are refused with the reason."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oam_auth import Auth, Rule, Settings
from oam_auth.authenticator import Authenticator
from oam_auth.policy import Identity, Policy
from oam_auth.signatures import Nonces
from openagentmesh import AgentMesh, AgentSpec, PermissionDenied, Unauthenticated
from pydantic import ValidationError

from tests.support.credentials import settings, signers, token_settings

READ = Rule(name="readers", subjects=("team-*", "alice"), scopes=("nlp.read",), agents=("nlp.*",))
STREAM = Rule(name="streamers", subjects=("alice",), agents=("nlp.>", "one"), verbs=("stream",))
OPEN = Rule(name="open", anonymous=True, agents=("public.*",), verbs=("call", "source"))
EXACT = Rule(name="exactly", subjects=("svc[prod]?",), agents=("only.svc",))
POLICY = Policy([READ, STREAM, OPEN, EXACT])


def identity(subject: str, *scopes: str) -> Identity:
    return Identity(subject, frozenset(scopes))


@pytest.mark.parametrize(
    ("rule", "caller", "agent", "verb"),
    [
        ("readers", identity("alice", "nlp.read", "more"), "nlp.summarizer", "call"),
        ("readers", identity("team-7", "nlp.read"), "nlp.summarizer", "send"),
        ("streamers", identity("alice"), "nlp.deep.down", "stream"),
        ("streamers", identity("alice"), "one", "stream"),
        ("exactly", identity("svc[prod]?"), "only.svc", "call"),
        ("open", None, "public.news", "call"),
        ("open", None, "public.news", "source"),
        ("open", identity("anybody"), "public.news", "call"),
    ],
)
def test_a_rule_permits_matching_requests(rule: str, caller: Identity | None, agent: str, verb: str) -> None:
    """A rule matches subject, scopes, agent and verb; rules for anonymous callers permit all callers."""
    assert rule == POLICY.permit(caller, agent, verb)


@pytest.mark.parametrize(
    ("near", "caller", "agent", "verb"),
    [
        ("readers", identity("alice"), "nlp.summarizer", "call"),
        ("readers", identity("alice", "nlp.rea", "nlp", "NLP.READ"), "nlp.summarizer", "call"),
        ("", identity("mallory", "nlp.read"), "nlp.summarizer", "call"),
        ("", identity("Alice", "nlp.read"), "nlp.summarizer", "call"),
        ("", identity("xteam-7", "nlp.read"), "nlp.summarizer", "call"),
        ("", identity("svcp"), "only.svc", "call"),
        ("", identity("svc1"), "only.svc", "call"),
        ("", identity("alice", "nlp.read"), "nlp", "call"),
        ("", identity("alice", "nlp.read"), "nlp.deep.down", "call"),
        ("", identity("alice", "nlp.read"), "xnlp.summarizer", "call"),
        ("", identity("alice", "nlp.read"), "nlp.summarizer", "source"),
        ("", identity("alice", "nlp.read"), "nlpx", "stream"),
        ("", identity("alice", "nlp.read"), "public.news", "stream"),
    ],
)
def test_other_requests_are_refused(near: str, caller: Identity, agent: str, verb: str) -> None:
    """A refusal names the rule that lacks only a scope, if there is one."""
    with pytest.raises(PermissionDenied) as caught:
        POLICY.permit(caller, agent, verb)
    assert (near, caller.subject) == (caught.value.details["rule"], caught.value.details["subject"])
    assert near in caught.value.message
    if near:
        assert ["nlp.read"] == caught.value.details["missing_scopes"]


def test_a_caller_without_credentials_is_unauthenticated() -> None:
    """Without a rule for anonymous callers, or without any rules, the error is `unauthenticated`."""
    for policy in (POLICY, Policy([])):
        with pytest.raises(Unauthenticated) as caught:
            policy.permit(None, "nlp.summarizer", "call")
        assert {"rule": "credentials.missing"} == caught.value.details


NAMES = st.lists(st.sampled_from(["a", "b", "nlp", "x-1"]), min_size=1, max_size=4)


@given(NAMES, st.lists(st.sampled_from(["a", "b", "nlp", "x-1", "*"]), min_size=1, max_size=4), st.booleans())
def test_patterns_match_like_nats_subjects(name: list[str], pattern: list[str], has_tail: bool) -> None:
    """`*` matches one part, `>` at the end one or more; other parts match themselves."""
    parts = [*pattern, ">"] if has_tail else pattern
    rule = Rule(name="r", anonymous=True, agents=(".".join(parts),))
    has_length = len(name) > len(pattern) if has_tail else len(name) == len(pattern)
    has_parts = all(of_pattern in {"*", part} for part, of_pattern in zip(name, pattern, strict=False))
    assert (has_length and has_parts) == rule.applies_to(".".join(name), "call")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"subjects": ()}, "give subjects"),
        ({"anonymous": True}, "neither subjects nor scopes"),
        ({"agents": ()}, "agents"),
        ({"agents": ("nlp.",)}, "is not a pattern"),
        ({"agents": ("nl*",)}, "is not a pattern"),
        ({"agents": ("a.>.b",)}, "is not a pattern"),
        ({"agents": ("",)}, "is not a pattern"),
        ({"verbs": ()}, "verbs"),
        ({"verbs": ("cal",)}, "verbs"),
        ({"scopes": ("two words",)}, "scopes"),
        ({"name": ""}, "name"),
        ({"subject": ("typo",)}, "subject"),
    ],
)
def test_invalid_rules_are_refused(changed: dict[str, Any], message: str) -> None:
    """A mistake in a rule is an error, and not a rule that permits more, or nothing."""
    with pytest.raises(ValidationError, match=message):
        Rule(**({"name": "r", "subjects": ("*",), "agents": (">",)} | changed))


@pytest.mark.parametrize(
    ("make_settings", "message"),
    [
        (lambda _: Settings(rules=(READ,)), "for verified subjects, but no credentials are accepted"),
        (lambda folder: settings(folder, rules=(READ, READ)), "two rules have the name 'readers'"),
        (lambda folder: settings(folder, policy=Path("missing.toml")), "missing.toml cannot be read"),
        (lambda folder: Settings(tokens=token_settings(folder, keys=(Path("no.pem"),))), "no.pem cannot be"),
        (lambda _: Settings(signatures=signers(bob="UABC")), "the key of 'bob' is not a public NKey"),
        (lambda _: Settings.model_validate({"caller": {"token_file": "no"}}), "no cannot be read"),
        (lambda _: Settings.model_validate({"caller": {"nkey_file": "keys.json"}}), "not an NKey seed"),
    ],
)
def test_settings_that_cannot_be_applied_are_refused(
    tmp_path: Path, make_settings: Callable[[Path], Settings], message: str
) -> None:
    """Missing files, invalid keys, and rules that no caller can match, are errors."""
    (tmp_path / "keys.json").write_text("SUNOSEED")
    with pytest.raises(ValueError, match=message):
        Authenticator.load(make_settings(tmp_path), tmp_path, Nonces())


POLICY_FILE = """
[[rules]]
name = "in the file"
subjects = ["bob"]
agents = [">"]
"""


def test_a_policy_file_adds_rules(tmp_path: Path) -> None:
    """Its rules follow those of mesh.toml; an error in it names the file and the key."""
    (tmp_path / "policy.toml").write_text(POLICY_FILE)
    loaded = Authenticator.load(
        settings(tmp_path, rules=(READ,), policy=Path("policy.toml")), tmp_path, Nonces()
    )
    assert ["readers", "in the file"] == [rule.name for rule in loaded.policy.rules]
    for text, message in (
        ("[[rules]]\nname = 1", r"policy\.toml: rules\.0\.name"),
        ("[[rules]", r"policy\.toml is not TOML"),
        ("rule = []", r"policy\.toml: rules: Field required; rule: Extra"),
        ("\xff", r"policy\.toml is not TOML"),
    ):
        (tmp_path / "policy.toml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            Authenticator.load(settings(tmp_path, policy=Path("policy.toml")), tmp_path, Nonces())


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_arbitrary_policy_files_are_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Any content that is not a policy is a ValueError that names the file."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.toml").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(ValueError, match=r"any\.toml"):
        Authenticator.load(settings(folder, rules=(), policy=Path("any.toml")), folder, Nonces())


def test_without_settings_all_requests_are_refused() -> None:
    """The plugin without settings permits nothing."""
    with pytest.raises(Unauthenticated):
        Auth().state.authenticator.policy.permit(None, "any", "call")


async def test_agents_without_a_rule_are_logged_at_the_start(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names each agent that takes requests and that no rule covers; a publisher takes none."""
    rule = Rule(name="open", anonymous=True, agents=(f"{name}.covered", f"{name}.misspelled"))
    mesh = AgentMesh(url, plugins=[Auth(Settings(rules=(rule,)))])

    @mesh.agent(AgentSpec(name=f"{name}.covered"))
    async def covered(text: str) -> str:
        return text

    @mesh.agent(AgentSpec(name=f"{name}.mispelled"))
    async def mispelled(text: str) -> str:
        return text

    @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.news")])
    async def messages(text: str) -> None: ...

    @mesh.agent(AgentSpec(name=f"{name}.publisher"))
    async def publisher() -> AsyncIterator[str]:
        yield "news"

    async with mesh:
        pass
    warnings = [record.message for record in caplog.records if record.name.startswith("oam_auth")]
    assert sorted(warnings) == [
        f"auth: no rule covers '{name}.{agent}', so all requests to it are refused"
        for agent in ("messages", "mispelled")
    ]
