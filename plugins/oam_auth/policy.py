"""The policy: rules that permit requests; all others are refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal, Self

from openagentmesh import PermissionDenied, Unauthenticated
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Verb = Literal["call", "stream", "send", "source"]

# Decisions that are cached; the least recently used are dropped.
_MAX_DECISIONS: Final = 10_000
_PATTERN: Final = re.compile(r"(?:[\w-]+|\*)(?:\.(?:[\w-]+|\*))*(?:\.>)?|>")


@dataclass(slots=True, frozen=True)
class Identity:
    """A verified subject with its scopes."""

    subject: str
    scopes: frozenset[str] = frozenset()


def _agent_pattern(text: str) -> str:
    if not _PATTERN.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a pattern of agents' names: 'nlp.summarizer', 'nlp.*' (one more part), "
            "'nlp.>' (one or more), '>' (every agent)"
        )
    return text


class Rule(BaseModel):
    """`[[plugins.auth.rules]]`: permits requests.

    Attributes:
        name: its name in refusals.
        subjects: patterns of verified subjects, `*` for any characters.
        scopes: required, all of them.
        anonymous: permits callers without credentials; then without subjects and scopes.
        agents: patterns of agents' names as in NATS: `*` for one part, `>` for the rest.
        verbs: the permitted verbs; `source` is a message or change of a source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    subjects: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    scopes: tuple[Annotated[str, Field(pattern=r"^\S+$")], ...] = ()
    anonymous: bool = False
    agents: Annotated[tuple[Annotated[str, AfterValidator(_agent_pattern)], ...], Field(min_length=1)]
    verbs: Annotated[tuple[Verb, ...], Field(min_length=1)] = ("call", "stream", "send")

    @model_validator(mode="after")
    def _has_subjects(self) -> Self:
        if self.anonymous and (self.subjects or self.scopes):
            raise ValueError("a rule for anonymous callers has neither subjects nor scopes")
        if not self.anonymous and not self.subjects:
            raise ValueError('give subjects, ["*"] for all verified ones, or anonymous = true')
        return self

    def covers(self, agent: str) -> bool:
        """Whether one of its patterns matches an agent."""
        return any(_regex(pattern).fullmatch(agent) for pattern in self.agents)

    def applies_to(self, agent: str, verb: str) -> bool:
        """Whether it covers this verb of this agent."""
        return verb in self.verbs and self.covers(agent)

    def matches(self, identity: Identity | None) -> bool:
        """Whether it matches a caller, regardless of scopes."""
        if self.anonymous:
            return True
        return identity is not None and any(_glob(p).fullmatch(identity.subject) for p in self.subjects)


@lru_cache(maxsize=1000)
def _glob(pattern: str) -> re.Pattern[str]:
    first, *others = map(re.escape, pattern.split("*"))
    # Atomic groups: the first match of a part is as good as a later one; backtracking would be exponential.
    parts = [f"(?>.*?{part})" for part in others[:-1]] + [f".*{part}" for part in others[-1:]]
    return re.compile(first + "".join(parts), re.DOTALL)


@lru_cache(maxsize=1000)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = [{"*": r"[^.]+", ">": r".+"}.get(part) or re.escape(part) for part in pattern.split(".")]
    return re.compile(r"\.".join(parts))


class Policy:
    """Rules, and their decisions."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._permitting = lru_cache(maxsize=_MAX_DECISIONS)(self._find)

    def permit(self, identity: Identity | None, agent: str, verb: str) -> str:
        """The name of the rule that permits a request.

        Raises:
            Unauthenticated: the caller has no credentials, and no rule permits anonymous callers.
            PermissionDenied: no rule permits it; `details` name the rule that lacks a scope only.
        """
        return self._permitting(identity, agent, verb) or self._refuse(identity, agent, verb)

    def _find(self, identity: Identity | None, agent: str, verb: str) -> str:
        for rule in self.rules:
            if rule.applies_to(agent, verb) and rule.matches(identity) and not _missing(rule, identity):
                return rule.name
        return ""

    def _refuse(self, identity: Identity | None, agent: str, verb: str) -> str:
        what = f"{verb} '{agent}'"
        if identity is None:
            raise Unauthenticated(
                f"Anonymous callers may not {what}: send a bearer token, or sign the request.",
                details={"rule": "credentials.missing"},
            )
        near = next((r for r in self.rules if r.applies_to(agent, verb) and r.matches(identity)), None)
        if near is None:
            raise PermissionDenied(
                f"No rule permits '{identity.subject}' to {what}.",
                details={"rule": "", "subject": identity.subject},
            )
        missing = _missing(near, identity)
        raise PermissionDenied(
            f"The rule '{near.name}' permits '{identity.subject}' to {what} only with the scope "
            f"{' '.join(missing)}.",
            details={"rule": near.name, "subject": identity.subject, "missing_scopes": missing},
        )


def _missing(rule: Rule, identity: Identity | None) -> list[str]:
    """The scopes that a rule requires and a caller does not have."""
    return [scope for scope in rule.scopes if identity is None or scope not in identity.scopes]
