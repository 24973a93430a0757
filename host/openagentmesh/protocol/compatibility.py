"""Two contracts of one agent name: what a caller of the one cannot count on at the other.

Somebody writes values and somebody reads them: callers write an input that the new agent reads, and the new
agent writes an output that callers read. A change is breaking when the writer may give what the reader does not
take. Schemas are read as pydantic means them: whoever says nothing of further keys neither gives nor minds any.
A missing schema is the empty object, which is what `None` replies as and what asks for nothing as an input;
an old peer that did not say what it takes looks the same. A reader without a schema takes anything.

Anybody may publish a schema, so nothing here raises, and work and result are bounded. What is no schema takes
anything. Not looked at, and never written by pydantic: `not`, `if`, `contains`, `dependent…`, `unevaluated…`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final, Literal
from urllib.parse import unquote

from openagentmesh.protocol.contract import AgentContract

# One alternative of a schema: no references, no unions, one type, and only keywords of the right type. Its
# `enum` holds the values' texts, each with its type: texts tell True from 1, and can be looked up.
Plain = dict[str, Any]
Part = Literal["input", "output", "chunk", "kind"]

_MOST_CHANGES: Final = 20
_MOST_WORK: Final = 50_000  # keywords, fields, and alternatives looked at: some tenths of a second
_DEEPEST: Final = 40
_LONGEST: Final = 60  # characters of a name that a stranger chose
_NOTHING: Final = {"type": "object", "title": "nothing", "properties": {}}
_KINDS: Final = {
    (True, False): "responder",
    (True, True): "streamer",
    (False, True): "publisher",
    (False, False): "background task",
}
_TYPES: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
_SHOWN: Final = {"string": "str", "boolean": "bool", "integer": "int", "number": "float", "null": "None"} | {
    "array": "list"
}
# Bounds as their keyword, the keyword that excludes the bound itself, and what holds without either. Upper ones
# are compared with their sign turned, so that the greater is always the tighter.
_BOUNDS: Final = (
    ("minLength", "", 1, 0),
    ("minItems", "", 1, 0),
    ("minProperties", "", 1, 0),
    ("minimum", "exclusiveMinimum", 1, -math.inf),
    ("maxLength", "", -1, -math.inf),
    ("maxItems", "", -1, -math.inf),
    ("maxProperties", "", -1, -math.inf),
    ("maximum", "exclusiveMaximum", -1, -math.inf),
)
_SIGNS: Final = {key: sign for at, beyond, sign, _ in _BOUNDS for key in (at, beyond) if key}
# What can only be the same or not.
_OPAQUE: Final = ("pattern", "format", "multipleOf", "uniqueItems")
# Formats of which every string is one.
_LOOSE: Final = {"binary", "password", "path"}
_NUMBER: Final = (int, float)
_KEYWORDS: Final[dict[str, type | tuple[type, ...]]] = {
    **dict.fromkeys(("$ref", "title", "pattern", "format"), str),
    **dict.fromkeys(("properties", "patternProperties"), dict),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "required", "enum", "prefixItems"), list),
    **dict.fromkeys(("const", "items", "additionalProperties", "propertyNames"), object),
    **dict.fromkeys((*_SIGNS, "multipleOf"), _NUMBER),
    "type": (str, list),
    "uniqueItems": bool,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that breaks callers.

    Attributes:
        what: the part of the contract.
        path: where in its schema, such as `text`, `items[].price`, or `prices.*` for any key; empty for all of it.
        old: what was there; empty when there was nothing.
        new: what is there now; empty when nothing is. Both are empty when the two cannot be compared.

    """

    what: Part
    path: str
    old: str
    new: str

    def __str__(self) -> str:
        """The change in one line."""
        where = f"{self.what} '{self.path}'" if self.path else self.what
        match self.old, self.new:
            case "", "":
                return f"{where}: cannot be compared"
            case old, "":
                return f"{where}: {old} was removed"
            case "", new:
                return f"{where}: {new} was added"
        return f"{where}: {self.old} became {self.new}"


def breaking_changes(old: AgentContract, new: AgentContract) -> list[Change]:
    """What a caller written for `old` can notice of `new`: empty when it notices nothing.

    An agent of another kind is that one change, for then no call is the same.
    """
    was, now = _KINDS[old.invocable, old.streaming], _KINDS[new.invocable, new.streaming]
    if was != now:
        return [Change("kind", "", was, now)]
    found = chain(
        _Reading("input", old.input_schema, new.input_schema).refusals(),
        _Reading("output", new.output_schema, old.output_schema).refusals(),
        _Reading("chunk", new.chunk_schema, old.chunk_schema).refusals(),
    )
    return list(islice(found, _MOST_CHANGES))


class _TooMuch(ValueError):
    """A schema is larger or deeper than anybody's who means well."""


class _Reading:
    """Whether everything that is given is taken, and what is not."""

    def __init__(self, what: Part, given: object, taken: object) -> None:
        self._what: Part = what
        self._given = _NOTHING if given is None else given
        self._taken = taken
        self._left = _MOST_WORK

    def refusals(self) -> Iterator[Change]:
        """What is given and not taken."""
        try:
            if self._taken is not None and self._given != self._taken:
                yield from self._schemas(self._given, self._taken, "", frozenset())
        except (ValueError, RecursionError):  # ValueError also of numbers that are too long to show
            yield Change(self._what, "", "", "")

    def _schemas(
        self, given: object, taken: object, path: str, within: frozenset[tuple[int, int]]
    ) -> Iterator[Change]:
        """The changes between two schemas; `within` are the pairs around them, which a recursive one meets again."""
        pair = (id(given), id(taken))
        if pair in within:
            return
        if len(within) == _DEEPEST:
            raise _TooMuch
        within |= {pair}
        gives = _join(self._alternatives(given, self._given, frozenset()))
        takes = _join(self._alternatives(taken, self._taken, frozenset()))
        for one in gives:
            nearest = _nearest(one, takes)
            # With a single candidate the changes to it say at once whether it fits.
            if (len(takes) > 1 or nearest is None) and any(
                next(self._plain(one, other, path, within), None) is None for other in takes
            ):
                continue
            if nearest is None:
                yield self._change(path, _shown(gives), _shown(takes))
                return
            yield from self._plain(one, nearest, path, within)

    def _plain(
        self, given: Plain, taken: Plain, path: str, within: frozenset[tuple[int, int]]
    ) -> Iterator[Change]:
        self._work_on(given)
        self._work_on(taken)
        if not _may_take(taken, given) or given.get("enum", taken.get("enum", {})).keys() - taken.get(
            "enum", given.get("enum", {})
        ):
            pass
        yield from ()

    def _change(self, path: str, given: str, taken: str) -> Change:
        old, new = (given, taken) if self._what == "input" else (taken, given)
        return Change(self._what, path, old, new)
