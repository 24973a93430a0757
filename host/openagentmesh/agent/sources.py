"""What triggers an agent besides requests, and what turns it on and off: sources and conditions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import InvalidAgent


@dataclass(slots=True, frozen=True)
class SubjectSource:
    """Every message on a subject, which may have wildcards.

    With a `queue_group` each message goes to one of the instances in the group, otherwise to each
    instance.
    """

    subject: str
    queue_group: str | None = None

    def __post_init__(self) -> None:
        _check(f"source subject {self.subject!r}", subjects.invalid_pattern(self.subject))
        _check_group(self.queue_group)


@dataclass(slots=True, frozen=True)
class KVSource:
    """Changes of the keys of the shared state that match a pattern, in order.

    Of several quick changes of one key, the last is certain to be delivered. `on_init` decides whether
    existing keys count as changes. With a `queue_group` each change goes to one of the instances in the
    group, also while some are not connected, otherwise to each instance.
    """

    pattern: str
    queue_group: str | None = None
    on_init: Literal["replay", "skip"] = "replay"

    def __post_init__(self) -> None:
        _check(f"source pattern {self.pattern!r}", subjects.invalid_key(self.pattern, pattern=True))
        _check_group(self.queue_group)
        if self.on_init not in {"replay", "skip"}:
            raise InvalidAgent(f"on_init must be 'replay' or 'skip', not {self.on_init!r}.")


Source = SubjectSource | KVSource


@dataclass(slots=True, frozen=True)
class KVCondition:
    """True while `predicate` of a key's text is; `initial` while the key does not exist."""

    key: str
    predicate: Callable[[str], bool]
    initial: bool = False
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        _check(f"condition key {self.key!r}", subjects.invalid_key(self.key))
        _check_condition(self.predicate, self.drain_timeout)


@dataclass(slots=True, frozen=True)
class SubjectCondition:
    """The `predicate` of the last message on a subject; `initial` before the first message.

    The predicate gets what `subscribe(subject=...)` yields.
    """

    subject: str
    predicate: Callable[[Any], bool]
    initial: bool = False
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        _check(f"condition subject {self.subject!r}", subjects.invalid_pattern(self.subject))
        _check_condition(self.predicate, self.drain_timeout)


Condition = KVCondition | SubjectCondition
"""When an agent is active: `active_when=` of `@mesh.agent`. `drain_timeout` is in seconds."""


def _check_condition(predicate: object, drain_timeout: object) -> None:
    if not callable(predicate):
        raise InvalidAgent(f"A condition's predicate must be a function, not {predicate!r}.")
    if not isinstance(drain_timeout, int | float) or not drain_timeout >= 0:
        raise InvalidAgent(f"drain_timeout must be a number of seconds, 0 or more, not {drain_timeout!r}.")


def _check_group(group: str | None) -> None:
    if group is not None and not subjects.is_token(group):
        raise InvalidAgent(f"The queue group {group!r} is invalid: only letters, digits, '_' and '-'.")


def _check(value: str, problem: str | None) -> None:
    if problem:
        raise InvalidAgent(f"The {value} is invalid: {problem}.")
