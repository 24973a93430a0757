"""The policy: rules that allow; what none of them allows is refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal, Self

from openagentmesh import PermissionDenied, Unauthenticated
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Verb = Literal["call", "stream", "send", "source"]

# Decisions that are remembered; strangers' subjects push out the least recently used.
_MOST_DECISIONS: Final = 10_000
_PATTERN: Final = re.compile(r"(?:[\w-]+|\*)(?:\.(?:[\w-]+|\*))*(?:\.>)?|>")


@dataclass(slots=True, frozen=True)
class Proof:
    """Who was proven to ask, and with which scopes."""

    subject: str
    scopes: frozenset[str] = frozenset()


def _agent_pattern(text: str) -> str:
    if not _PATTERN.fullmatch(text):
        raise ValueError(
            f"{text!r} is no pattern of agents' names: 'nlp.summarizer', 'nlp.*' (one more part), "
            "'nlp.>' (one or more), '>' (every agent)"
        )
    return text


class Rule(BaseModel):
    """`[[plugins.auth.rules]]`: who may do what.

    Attributes:
        name: what refusals call it.
        subjects: patterns of proven subjects, `*` for any characters.
        scopes: all of them are needed.
        anonymous: who proves nothing may, too; then there are neither subjects nor scopes.
        agents: patterns of agents' names, as NATS has them: `*` for one part, `>` for the rest.
        verbs: what may be done; `source` is what a message or a change brings.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    subjects: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    scopes: tuple[Annotated[str, Field(pattern=r"^\S+$")], ...] = ()
    anonymous: bool = False
    agents: Annotated[tuple[Annotated[str, AfterValidator(_agent_pattern)], ...], Field(min_length=1)]
    verbs: Annotated[tuple[Verb, ...], Field(min_length=1)] = ("call", "stream", "send")

    @model_validator(mode="after")
    def _says_who(self) -> Self:
        if self.anonymous and (self.subjects or self.scopes):
            raise ValueError("a rule for anonymous callers has neither subjects nor scopes")
        if not self.anonymous and not self.subjects:
            raise ValueError('who may? give subjects, ["*"] for all that are proven, or anonymous = true')
        return self

    def names(self, agent: str) -> bool:
        """Whether it says something of this agent."""
        return any(_regex(pattern).fullmatch(agent) for pattern in self.agents)

    def is_about(self, agent: str, verb: str) -> bool:
        """Whether it says something of this verb of this agent."""
        return verb in self.verbs and self.names(agent)

    def is_for(self, who: Proof | None) -> bool:
        """Whether it is for this caller, its scopes aside."""
        if self.anonymous:
            return True
        return who is not None and any(_glob(pattern).fullmatch(who.subject) for pattern in self.subjects)


@lru_cache(maxsize=1000)
def _glob(pattern: str) -> re.Pattern[str]:
    first, *others = map(re.escape, pattern.split("*"))
    # Atomic: where a part was found first is as good as any later place, and trying these takes for ever.
    parts = [f"(?>.*?{part})" for part in others[:-1]] + [f".*{part}" for part in others[-1:]]
    return re.compile(first + "".join(parts), re.DOTALL)


@lru_cache(maxsize=1000)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = [{"*": r"[^.]+", ">": r".+"}.get(part) or re.escape(part) for part in pattern.split(".")]
    return re.compile(r"\.".join(parts))


class Policy:
    """Rules, and what they decide."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._allowing = lru_cache(maxsize=_MOST_DECISIONS)(self._find)

    def allow(self, who: Proof | None, agent: str, verb: str) -> str:
        """Let a request pass; gives the name of the rule that does.

        Raises:
            Unauthenticated: nobody was proven, and no rule is for anonymous callers.
            PermissionDenied: no rule lets this subject do this; `details` name the one that comes closest.

        """
        return self._allowing(who, agent, verb) or self._refuse(who, agent, verb)

    def _find(self, who: Proof | None, agent: str, verb: str) -> str:
        for rule in self.rules:
            if rule.is_about(agent, verb) and rule.is_for(who) and not _missing(rule, who):
                return rule.name
        return ""

    def _refuse(self, who: Proof | None, agent: str, verb: str) -> str:
        what = f"{verb} '{agent}'"
        if who is None:
            raise Unauthenticated(
                f"Nobody may {what} without saying who asks: send a bearer token, or sign the request.",
                details={"rule": "credentials.missing"},
            )
        near = next((r for r in self.rules if r.is_about(agent, verb) and r.is_for(who)), None)
        if near is None:
            raise PermissionDenied(
                f"No rule lets '{who.subject}' {what}.", details={"rule": "", "subject": who.subject}
            )
        missing = _missing(near, who)
        raise PermissionDenied(
            f"The rule '{near.name}' lets '{who.subject}' {what} only with the scope {' '.join(missing)}.",
            details={"rule": near.name, "subject": who.subject, "missing_scopes": missing},
        )


def _missing(rule: Rule, who: Proof | None) -> list[str]:
    """The scopes that a rule wants and a caller has not."""
    return [scope for scope in rule.scopes if who is None or scope not in who.scopes]
