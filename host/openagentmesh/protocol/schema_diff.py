"""Breaking changes between two contracts of one agent.

One side produces values and the other accepts them: callers produce the input, which the new version
accepts; the new version produces the output, which callers accept. A value that may be produced and is
not accepted breaks callers.

Objects are read as pydantic means them: without `additionalProperties`, extra keys are neither produced
nor rejected. A missing schema produces `{}`, the reply for None, and requires nothing as an input; old
peers publish no input schema at all. A missing schema on the accepting side accepts anything.

Schemas come from other peers: nothing here raises, work and result are bounded, and anything that is not a
schema accepts any value. `not`, `if`, `contains`, `dependent…` and `unevaluated…`, which pydantic never
writes, are ignored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, product, starmap
from typing import Any, Final, Literal

from openagentmesh.protocol.contract import AgentContract
from openagentmesh.protocol.json_schema import TYPES, constants, resolve_ref

Part = Literal["input", "output", "chunk", "kind"]
# A schema without references and unions, of one type or of any, reduced to the keywords compared here.
# `required` and `enum` are dicts, for look-ups; enum values are keyed by `repr`, so that True and 1 differ.
_Plain = dict[str, Any]
_Pairs = frozenset[tuple[int, int]]

_MAX_CHANGES: Final = 20
_MAX_WORK: Final = 20_000  # fields and alternatives, many times a large contract's: tenths of a second
_MAX_DEPTH: Final = 100
_CHARACTERS_PER_UNIT: Final = 20  # of text, which count as one unit of work
_NO_VALUE: Final = {"type": "object", "title": "nothing", "properties": {}}
_KINDS: Final = ("background task", "publisher", "responder", "streamer")
_TYPE_NAMES: Final = {name: of.__name__ for of, name in TYPES.items()} | {"null": "None"}
# Bounds: the sign that makes a tighter bound the greater number; the inclusive and the exclusive keyword;
# the bound without either.
_BOUNDS: Final = (
    *((1, f"min{what}", "", 0) for what in ("Length", "Items", "Properties")),
    *((-1, f"max{what}", "", -math.inf) for what in ("Length", "Items", "Properties")),
    (1, "minimum", "exclusiveMinimum", -math.inf),
    (-1, "maximum", "exclusiveMaximum", -math.inf),
)
_OPAQUE: Final = ("pattern", "format", "multipleOf", "uniqueItems")  # compared for equality alone
_LOOSE_FORMATS: Final = ("binary", "password", "path")  # any string matches
_OBJECT_KEYS: Final = {"properties", "patternProperties", "additionalProperties", "propertyNames", "required"}
_KEYWORDS: Final[dict[str, Any]] = {
    **dict.fromkeys(("$ref", "title", "pattern", "format"), str),
    **dict.fromkeys(("properties", "patternProperties"), dict),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "enum", "prefixItems", "required"), list),
    **dict.fromkeys(("additionalProperties", "items", "propertyNames"), (dict, bool)),
    **dict.fromkeys([key for _, *keys, _ in _BOUNDS for key in keys] + ["multipleOf"], (int, float)),
    "const": object,
    "type": (str, list),
    "uniqueItems": bool,
}


@dataclass(frozen=True, slots=True)
class Change:
    """One breaking change.

    `path` is a place in the schema: `text`, `items[].price`, `prices.*` for any key; empty for the root.
    `old` is empty when the place is new, `new` when it was removed, both when the schemas cannot be compared.
    """

    what: Part
    path: str
    old: str
    new: str

    def __str__(self) -> str:
        where = f"{self.what} '{self.path}'" if self.path else self.what
        if self.old and self.new:
            return f"{where}: {self.old} became {self.new}"
        if self.old or self.new:
            return f"{where}: {self.old or self.new} was {'removed' if self.old else 'added'}"
        return f"{where}: cannot be compared"


def breaking_changes(old: AgentContract, new: AgentContract) -> list[Change]:
    """The changes from `old` to `new` that break callers of `old`, at most 20; empty when compatible.

    A change of the agent's kind is reported alone.
    """
    was, now = (_KINDS[2 * of.invocable + of.streaming] for of in (old, new))
    if was != now:
        return [Change("kind", "", was, now)]
    found = chain(
        _Comparison("input", produced=old.input_schema, accepted=new.input_schema).changes(),
        _Comparison("output", produced=new.output_schema, accepted=old.output_schema).changes(),
        _Comparison("chunk", produced=new.chunk_schema, accepted=old.chunk_schema).changes(),
    )
    return list(islice(found, _MAX_CHANGES))


class _Comparison:
    """Finds the values that may be produced and are not accepted."""

    def __init__(self, what: Part, *, produced: object, accepted: object) -> None:
        self._what: Part = what
        self._produced = _NO_VALUE if produced is None else produced
        self._accepted = {} if accepted is None else accepted
        self._work_left = _MAX_WORK

    def changes(self) -> Iterator[Change]:
        try:
            if self._produced != self._accepted:
                yield from self._schemas(self._produced, self._accepted, "", frozenset())
        except (ValueError, RecursionError):  # str() of a huge integer is a ValueError, too
            yield Change(self._what, "", "", "")

    def _schemas(self, produced: object, accepted: object, path: str, parents: _Pairs) -> Iterator[Change]:
        """The changes between two schemas; `parents` are the pairs of schemas around them."""
        if (id(produced), id(accepted)) in parents:
            return
        if len(parents) == _MAX_DEPTH:
            raise RecursionError
        parents |= {(id(produced), id(accepted))}
        outgoing = self._alternatives(produced, self._produced)
        incoming = self._alternatives(accepted, self._accepted)
        for one in outgoing:
            self._work(len(outgoing) + len(incoming))
            counterpart = _counterpart(one, outgoing, incoming)
            # With a single candidate, the differences from it are the best report.
            if counterpart is None or len(incoming) > 1:
                differences = (self._plain(one, other, path, parents) for other in incoming)
                if any(next(each, None) is None for each in differences):
                    continue
            if counterpart is None:
                yield self._change(path, _shown(outgoing), _shown(incoming))
                return
            yield from self._plain(one, counterpart, path, parents)

    def _plain(self, produced: _Plain, accepted: _Plain, path: str, parents: _Pairs) -> Iterator[Change]:
        self._work(_size(produced) + _size(accepted))
        if not _is_value_accepted(produced, accepted):
            yield self._change(path, _shown([produced]), _shown([accepted]))
            return
        for old, new in _keyword_differences(produced, accepted):
            yield self._change(path, old, new)
        if accepted.keys() & _OBJECT_KEYS:
            yield from self._fields(produced, accepted, path, parents)
        if "items" in accepted or "prefixItems" in accepted:
            yield from self._items(produced, accepted, path, parents)

    def _fields(self, produced: _Plain, accepted: _Plain, path: str, parents: _Pairs) -> Iterator[Change]:
        outgoing, incoming = _properties(produced), _properties(accepted)
        extra_out, extra_in = _extra_properties(produced), _extra_properties(accepted)
        given, needed = produced.get("required", {}), accepted.get("required", {})
        # Callers read any declared output field, required or not.
        read = needed if self._what == "input" or extra_out not in (None, False) else incoming
        missing = read.keys() - outgoing.keys()
        rejected = outgoing.keys() - incoming.keys() if extra_in is False else set()
        broken = missing | rejected
        changed = broken | (needed.keys() - given.keys())
        for name in outgoing | incoming:
            at = _join(path, name)
            one, other = outgoing.get(name, extra_out), incoming.get(name, extra_in)
            if name in changed:
                old = "" if name in missing else self._field(one, self._produced, required=name in given)
                new = "" if name in rejected else self._field(other, self._accepted, required=name in needed)
                yield self._change(at, old, new)
            if name not in broken and None not in (one, other):
                yield from self._schemas(one, other, at, parents)
        if None not in (extra_out, extra_in):
            yield from self._schemas(extra_out, extra_in, _join(path, "*"), parents)
        if "propertyNames" in accepted:
            names = produced.get("propertyNames", {"type": "string"})
            yield from self._schemas(names, accepted["propertyNames"], _join(path, "*"), parents)

    def _items(self, produced: _Plain, accepted: _Plain, path: str, parents: _Pairs) -> Iterator[Change]:
        outgoing, incoming = produced.get("prefixItems", []), accepted.get("prefixItems", [])
        extra_out, extra_in = produced.get("items", True), accepted.get("items", True)
        prefix, max_items = max(len(outgoing), len(incoming)), produced.get("maxItems", math.inf)
        for at in range(int(min(prefix, max_items))):
            one = outgoing[at] if at < len(outgoing) else extra_out
            other = incoming[at] if at < len(incoming) else extra_in
            yield from self._schemas(one, other, f"{path}[{at}]", parents)
        if max_items > prefix:
            yield from self._schemas(extra_out, extra_in, f"{path}[]", parents)

    def _alternatives(self, schema: object, root: object) -> list[_Plain]:
        """The plain alternatives of a schema; constants of one type are merged into one enumeration."""
        found = dict[object, _Plain]()
        for one in self._split(schema, root, frozenset()):
            if "enum" in one:
                merged = found.setdefault(one["type"], {"type": one["type"], "enum": {}})
                merged["enum"] |= one["enum"]
            else:
                found[len(found)] = one
        return list(found.values())

    def _split(self, schema: object, root: object, followed: frozenset[str]) -> list[_Plain]:
        """Follow references, split unions and types, and intersect `allOf`."""
        if schema is False:
            return []
        plain = _known(schema)
        parts = [plain.pop(key) for key in ("anyOf", "oneOf") if plain.get(key)]
        parts += [[one] for one in plain.pop("allOf", ())]
        if ref := plain.pop("$ref", ""):
            if ref in followed:  # a schema that is only a reference to itself accepts nothing
                return []
            followed |= {ref}
            self._work(len(ref) // _CHARACTERS_PER_UNIT)
            parts.append([resolve_ref(ref, root)])
        found = _split_types(plain)
        self._work(sum(map(_size, found)))
        for part in parts:
            branches = [one for branch in part for one in self._split(branch, root, followed)]
            self._work(sum(map(_size, branches)) * len(found) + sum(map(_size, found)) * len(branches))
            found = [both for both in starmap(_intersection, product(branches, found)) if both is not None]
        return found

    def _work(self, size: int) -> None:
        self._work_left -= size
        if self._work_left < 0:
            raise ValueError("The schema is larger than any real contract's.")

    def _field(self, schema: object, root: object, *, required: bool) -> str:
        return f"{'required' if required else 'optional'} {_shown(self._alternatives(schema, root))}"

    def _change(self, path: str, produced: str, accepted: str) -> Change:
        old, new = (produced, accepted) if self._what == "input" else (accepted, produced)
        return Change(self._what, path, old, new)


def _known(schema: object) -> _Plain:
    """The keywords of a schema that are compared and have values of the right type."""
    if not isinstance(schema, dict):
        return {}
    known = {key: value for key, value in schema.items() if isinstance(value, _KEYWORDS.get(key, ()))}
    if known.get("format") in _LOOSE_FORMATS:
        del known["format"]
    if "required" in known:
        known["required"] = {name: True for name in known["required"] if isinstance(name, str)}
    return known


def _split_types(plain: _Plain) -> list[_Plain]:
    """A schema once for each of its types, or for each type of its constants."""
    named = plain.pop("type", [])
    types = [named] if isinstance(named, str) else [name for name in named if isinstance(name, str)]
    values = constants(plain)
    if values is None:
        return [plain | {"type": name} for name in types] or [plain]
    texts = dict[str, dict[str, bool]]()
    for value in values:
        texts.setdefault(TYPES.get(type(value), "object"), {})[repr(value)] = True
    if "number" in types:
        types.append("integer")
    return [plain | {"type": name, "enum": of} for name, of in texts.items() if not types or name in types]


def _intersection(one: _Plain, other: _Plain) -> _Plain | None:
    """The values that match both, nearly: of two patterns the second is kept; None when there are none."""
    both = one | other
    for key in one.keys() & other.keys():
        first, second = one[key], other[key]
        match key:
            case "type" if first != second:
                if {first, second} != {"integer", "number"}:
                    return None
                both[key] = "integer"
            case "title":
                both[key] = first
            case "required":
                both[key] = first | second
            case "enum":
                both[key] = {text: True for text in first if text in second}
            case "properties" | "patternProperties":
                twice = first.keys() & second.keys()
                both[key] = first | second | {name: {"allOf": [first[name], second[name]]} for name in twice}
            case "items" | "additionalProperties" | "propertyNames":
                both[key] = {"allOf": [first, second]}
    return both


def _is_value_accepted(produced: _Plain, accepted: _Plain) -> bool:
    """Whether type and constants fit."""
    one, other = produced.get("enum"), accepted.get("enum")
    is_listed = other is None or (one is not None and one.keys() <= other.keys())
    return is_listed and _is_subtype(produced, accepted)


def _is_subtype(produced: _Plain, accepted: _Plain) -> bool:
    of, wanted = produced.get("type"), accepted.get("type")
    return wanted in (None, of) or (of, wanted) == ("integer", "number")


def _counterpart(one: _Plain, outgoing: list[_Plain], incoming: list[_Plain]) -> _Plain | None:
    """What an alternative became: the one with its title, or the only one of its type."""
    same_type = [other for other in incoming if _is_subtype(one, other)]
    candidates = [other for other in same_type if other.get("title") == one.get("title")]
    if len(candidates) != 1 and len([other for other in outgoing if _is_subtype(other, one)]) == 1:
        candidates = same_type
    return candidates[0] if len(candidates) == 1 else None


def _keyword_differences(produced: _Plain, accepted: _Plain) -> Iterator[tuple[str, str]]:
    """The keywords of the accepting side that are tighter, as text of both sides."""
    for sign, *keys, default in _BOUNDS:
        (one, old), (other, new) = (_bound(of, sign, keys, default) for of in (produced, accepted))
        if one < other:
            yield old, new
    for key in _OPAQUE:
        if accepted.get(key) and produced.get(key) != accepted[key]:
            old, new = (f"{key} {_text(of[key])}" if of.get(key) else "" for of in (produced, accepted))
            yield old, new


def _bound(plain: _Plain, sign: int, keys: list[str], default: float) -> tuple[tuple[float, int], str]:
    """How tight a bound is, and its text."""
    declared = [(key, exclusive) for exclusive, key in enumerate(keys) if key in plain]
    bounds = [((sign * plain[key], exclusive), f"{key} {_text(plain[key])}") for key, exclusive in declared]
    return max(bounds, default=((default, 0), ""))


def _properties(plain: _Plain) -> _Plain:
    patterns = {f"{{{pattern}}}": of for pattern, of in plain.get("patternProperties", {}).items()}
    return {**plain.get("required", {}), **plain.get("properties", {}), **patterns}


def _extra_properties(plain: _Plain) -> object:
    """The schema of an object's other keys; None when it does not declare one."""
    is_open = not plain.keys() & {"properties", "patternProperties"}
    return plain.get("additionalProperties", is_open or None)


def _size(plain: _Plain) -> int:
    characters = sum(map(len, plain.get("enum", ())))
    fields = sum(len(value) for value in plain.values() if isinstance(value, (dict, list)))
    return 1 + fields + characters // _CHARACTERS_PER_UNIT


def _shown(alternatives: list[_Plain]) -> str:
    """A schema in a few words; empty when it accepts nothing."""
    names = [name for one in islice(alternatives, 6) for name in islice(_names(one), 6)]
    return _text(" | ".join(dict.fromkeys(names)), 100)


def _names(plain: _Plain) -> list[str]:
    if "enum" in plain:
        return list(islice(plain["enum"], 6))
    kind: str = plain.get("type", "any")
    has_name = kind == "object" and "properties" in plain and "title" in plain
    return [plain["title"] if has_name else _TYPE_NAMES.get(kind, kind)]


def _join(path: str, name: str) -> str:
    return f"{path}.{_text(name)}".removeprefix(".")


def _text(value: object, max_length: int = 60) -> str:
    """Text from a peer, shortened and safe to print."""
    text = repr(f"{value}"[: max_length + 1])[1:-1]
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"
