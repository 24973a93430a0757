"""The policy: what rules allow, and nothing else; whom it names when it refuses."""

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


def who(subject: str, *scopes: str) -> Identity:
    return Identity(subject, frozenset(scopes))


@pytest.mark.parametrize(
    ("rule", "proof", "agent", "verb"),
    [
        ("readers", who("alice", "nlp.read", "more"), "nlp.summarizer", "call"),
        ("readers", who("team-7", "nlp.read"), "nlp.summarizer", "send"),
        ("streamers", who("alice"), "nlp.deep.down", "stream"),
        ("streamers", who("alice"), "one", "stream"),
        ("exactly", who("svc[prod]?"), "only.svc", "call"),
        ("open", None, "public.news", "call"),
        ("open", None, "public.news", "source"),
        ("open", who("anybody"), "public.news", "call"),
    ],
)
def test_what_a_rule_allows(rule: str, proof: Identity | None, agent: str, verb: str) -> None:
    """By subject, scopes, agent and verb; who is proven may what anonymous callers may."""
    assert rule == POLICY.permit(proof, agent, verb)


@pytest.mark.parametrize(
    ("near", "proof", "agent", "verb"),
    [
        ("readers", who("alice"), "nlp.summarizer", "call"),
        ("readers", who("alice", "nlp.rea", "nlp", "NLP.READ"), "nlp.summarizer", "call"),
        ("", who("mallory", "nlp.read"), "nlp.summarizer", "call"),
        ("", who("Alice", "nlp.read"), "nlp.summarizer", "call"),
        ("", who("xteam-7", "nlp.read"), "nlp.summarizer", "call"),
        ("", who("svcp"), "only.svc", "call"),
        ("", who("svc1"), "only.svc", "call"),
        ("", who("alice", "nlp.read"), "nlp", "call"),
        ("", who("alice", "nlp.read"), "nlp.deep.down", "call"),
        ("", who("alice", "nlp.read"), "xnlp.summarizer", "call"),
        ("", who("alice", "nlp.read"), "nlp.summarizer", "source"),
        ("", who("alice", "nlp.read"), "nlpx", "stream"),
        ("", who("alice", "nlp.read"), "public.news", "stream"),
    ],
)
def test_what_no_rule_allows(near: str, proof: Identity, agent: str, verb: str) -> None:
    """Refused, with the rule that wants one more scope, where there is one."""
    with pytest.raises(PermissionDenied) as caught:
        POLICY.permit(proof, agent, verb)
    assert (near, proof.subject) == (caught.value.details["rule"], caught.value.details["subject"])
    assert near in caught.value.message
    if near:
        assert ["nlp.read"] == caught.value.details["missing_scopes"]


def test_who_proves_nothing_is_unauthenticated() -> None:
    """Where no rule is for anonymous callers; also when there are no rules."""
    for policy in (POLICY, Policy([])):
        with pytest.raises(Unauthenticated) as caught:
            policy.permit(None, "nlp.summarizer", "call")
        assert {"rule": "credentials.missing"} == caught.value.details


NAMES = st.lists(st.sampled_from(["a", "b", "nlp", "x-1"]), min_size=1, max_size=4)


@given(NAMES, st.lists(st.sampled_from(["a", "b", "nlp", "x-1", "*"]), min_size=1, max_size=4), st.booleans())
def test_patterns_match_as_those_of_nats(name: list[str], pattern: list[str], open_: bool) -> None:
    """`*` is one part, `>` at the end one or more; the others are themselves."""
    parts = [*pattern, ">"] if open_ else pattern
    rule = Rule(name="r", anonymous=True, agents=(".".join(parts),))
    long_enough = len(name) > len(pattern) if open_ else len(name) == len(pattern)
    same = all(theirs in {"*", ours} for ours, theirs in zip(name, pattern, strict=False))
    assert (long_enough and same) == rule.applies_to(".".join(name), "call")


@pytest.mark.parametrize(
    ("changed", "why"),
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
def test_a_rule_that_says_too_little_or_too_much_is_refused(changed: dict[str, Any], why: str) -> None:
    """A slip of the pen in a rule is an error, and never a rule that allows more, or nothing."""
    with pytest.raises(ValidationError, match=why):
        Rule(**({"name": "r", "subjects": ("*",), "agents": (">",)} | changed))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda _: Settings(rules=(READ,)), "for verified subjects, but no credentials are accepted"),
        (lambda folder: settings(folder, rules=(READ, READ)), "two rules have the name 'readers'"),
        (lambda folder: settings(folder, policy=Path("gone.toml")), "gone.toml cannot be read"),
        (lambda folder: Settings(tokens=token_settings(folder, keys=(Path("no.pem"),))), "no.pem cannot be"),
        (lambda _: Settings(signatures=signers(bob="UABC")), "the key of 'bob' is not a public NKey"),
        (lambda _: Settings.model_validate({"caller": {"token_file": "no"}}), "no cannot be read"),
        (lambda _: Settings.model_validate({"caller": {"nkey_file": "keys.json"}}), "not an NKey seed"),
    ],
)
def test_what_cannot_protect_does_not_start(
    tmp_path: Path, made: Callable[[Path], Settings], why: str
) -> None:
    """Missing files, keys that are none, and rules that nobody could ever meet."""
    (tmp_path / "keys.json").write_text("SUNOSEED")
    with pytest.raises(ValueError, match=why):
        Authenticator.load(made(tmp_path), tmp_path, Nonces())


POLICY_FILE = """
[[rules]]
name = "in the file"
subjects = ["bob"]
agents = [">"]
"""


def test_a_policy_file_adds_rules(tmp_path: Path) -> None:
    """Besides those in mesh.toml; what is wrong with it is told with its name and the key."""
    (tmp_path / "policy.toml").write_text(POLICY_FILE)
    guard = Authenticator.load(
        settings(tmp_path, rules=(READ,), policy=Path("policy.toml")), tmp_path, Nonces()
    )
    assert ["readers", "in the file"] == [rule.name for rule in guard.policy.rules]
    for text, why in (
        ("[[rules]]\nname = 1", r"policy\.toml: rules\.0\.name"),
        ("[[rules]", r"policy\.toml is not TOML"),
        ("rule = []", r"policy\.toml: rules: Field required; rule: Extra"),
        ("\xff", r"policy\.toml is not TOML"),
    ):
        (tmp_path / "policy.toml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=why):
            Authenticator.load(settings(tmp_path, policy=Path("policy.toml")), tmp_path, Nonces())


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_any_policy_file_has_rules_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Whatever is in the file: rules that are all understood, or an error in words."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.toml").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(ValueError, match=r"any\.toml"):
        Authenticator.load(settings(folder, rules=(), policy=Path("any.toml")), folder, Nonces())


def test_enabled_and_not_set_up_it_refuses_everything() -> None:
    """Without any settings, nobody may do anything."""
    with pytest.raises(Unauthenticated):
        Auth().state.authenticator.policy.permit(None, "any", "call")


async def test_who_nobody_may_ask_is_told_at_the_start(
    url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent that no rule names, for it was forgotten or misspelt; a publisher is never asked."""
    rule = Rule(name="open", anonymous=True, agents=(f"{name}.asked", f"{name}.misspelled"))
    mesh = AgentMesh(url, plugins=[Auth(Settings(rules=(rule,)))])

    @mesh.agent(AgentSpec(name=f"{name}.asked"))
    async def asked(what: str) -> str:
        return what

    @mesh.agent(AgentSpec(name=f"{name}.mispelled"))
    async def mispelled(what: str) -> str:
        return what

    @mesh.agent(AgentSpec(name=f"{name}.driven"), sources=[mesh.subject_source(f"{name}.news")])
    async def driven(what: str) -> None: ...

    @mesh.agent(AgentSpec(name=f"{name}.tells"))
    async def tells() -> AsyncIterator[str]:
        yield "news"

    async with mesh:
        pass
    told = [record.message for record in caplog.records if record.name.startswith("oam_auth")]
    assert sorted(told) == [
        f"auth: no rule covers '{name}.{agent}', so all requests to it are refused"
        for agent in ("driven", "mispelled")
    ]
