"""What an agent listens to besides its requests, and when it is on: sources and conditions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import InvalidAgent


@dataclass(slots=True, frozen=True)
class SubjectSource:
    """Every message on a subject, which may have wildcards.

    With a `queue_group` each message goes to one of all the instances in the group, else to
    each instance.
    """

    subject: str
    queue_group: str | None = None

    def __post_init__(self) -> None:
        _check(subjects.invalid_pattern(self.subject), f"source subject {self.subject!r}")
        _check_group(self.queue_group)


@dataclass(slots=True, frozen=True)
class KVSource:
    """Changes of the keys of the shared state that match a pattern, in order.

    Of changes of one key that come faster than they are handled, only the last is sure to be told.
    `on_init` says whether the keys that are there already count as changes. With a
    `queue_group` each change goes to one of all the instances in the group, also while some
    are away, else to each instance.
    """

    pattern: str
    queue_group: str | None = None
    on_init: Literal["replay", "skip"] = "replay"

    def __post_init__(self) -> None:
        _check(subjects.invalid_key(self.pattern, pattern=True), f"source pattern {self.pattern!r}")
        _check_group(self.queue_group)
        if self.on_init not in {"replay", "skip"}:
            raise InvalidAgent(f"on_init is 'replay' or 'skip'; this is {self.on_init!r}.")


Source = SubjectSource | KVSource


@dataclass(slots=True, frozen=True)
class KVCondition:
    """Holds while `predicate` of a key's text does; `initial` while there is no such key."""

    key: str
    predicate: Callable[[str], bool]
    initial: bool = False
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        _check(subjects.invalid_key(self.key), f"condition key {self.key!r}")
        _check_condition(self.predicate, self.drain_timeout)


@dataclass(slots=True, frozen=True)
class SubjectCondition:
    """Holds as `predicate` of the last message on a subject said; `initial` before the first.

    The predicate is given what `subscribe(subject=...)` would yield.
    """

    subject: str
    predicate: Callable[[Any], bool]
    initial: bool = False
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        _check(subjects.invalid_pattern(self.subject), f"condition subject {self.subject!r}")
        _check_condition(self.predicate, self.drain_timeout)


Condition = KVCondition | SubjectCondition
"""When an agent is on: `active_when=` of `@mesh.agent`. `drain_timeout` is in seconds."""


def _check_condition(predicate: object, drain_timeout: object) -> None:
    if not callable(predicate):
        raise InvalidAgent(f"A condition's predicate is a function; this is {predicate!r}.")
    if not isinstance(drain_timeout, int | float) or not drain_timeout >= 0:
        raise InvalidAgent(f"drain_timeout is a number of seconds, 0 or more; this is {drain_timeout!r}.")


def _check_group(group: str | None) -> None:
    if group is not None and not subjects.is_token(group):
        raise InvalidAgent(f"The queue group {group!r} cannot be used: letters, digits, '_' and '-' only.")


def _check(why: str | None, what: str) -> None:
    if why:
        raise InvalidAgent(f"The {what} cannot be used: {why}.")
