"""Two contracts of one agent name: what callers of the one cannot count on at the other.

Somebody gives values and somebody takes them: callers give the input that the new agent takes, and the new
agent gives the output that callers take. What may be given and is not taken breaks callers.

Objects are read as pydantic means them: who says nothing of further keys neither gives any nor minds any. A
missing schema gives `{}`, which None becomes as a reply, and which asks for nothing as an input; an old peer
that did not say what it takes looks like one that takes nothing. Who takes without a schema takes anything.

Anybody may publish a schema: nothing here raises, work and result are bounded, and what is no schema is any
value. `not`, `if`, `contains`, `dependent…`, `unevaluated…`, which pydantic never writes, are not looked at.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final, Literal
from urllib.parse import unquote

from openagentmesh.protocol.contract import AgentContract

Part = Literal["input", "output", "chunk", "kind"]
# A schema without references and unions, of one type or of any, with the keywords that are looked at. In it
# `required` and `enum` are dicts to look up in: values by their text, which tells True from 1.
_Plain = dict[str, Any]
_Pairs = frozenset[tuple[int, int]]

_MOST_CHANGES: Final = 20
_MOST_WORK: Final = 20_000  # fields and alternatives, many times a large contract's: tenths of a second
_DEEPEST: Final = 100
_CHARACTERS: Final = 20  # of text that is looked at are as much work as a field
_NOTHING: Final = {"type": "object", "title": "nothing", "properties": {}}
_KINDS: Final = ("background task", "publisher", "responder", "streamer")
_NULL: Final = type(None)
_TYPES: Final = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    _NULL: "null",
}
_SHOWN: Final = {name: of.__name__ for of, name in _TYPES.items()} | {"null": "None"}
# A bound: its sign, which makes the tighter the greater; its keyword, and the one that leaves out the bound
# itself; what holds without either.
_BOUNDS: Final = (
    *((1, f"min{what}", "", 0) for what in ("Length", "Items", "Properties")),
    *((-1, f"max{what}", "", -math.inf) for what in ("Length", "Items", "Properties")),
    (1, "minimum", "exclusiveMinimum", -math.inf),
    (-1, "maximum", "exclusiveMaximum", -math.inf),
)
_OPAQUE: Final = ("pattern", "format", "multipleOf", "uniqueItems")  # that two differ is all that can be said
_LOOSE_FORMATS: Final = ("binary", "password", "path")  # any string is one
_OF_OBJECTS: Final = {"properties", "patternProperties", "additionalProperties", "propertyNames", "required"}
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
    """One thing that breaks callers.

    Attributes:
        what: the part of the contract.
        path: where in its schema: `text`, `items[].price`, `prices.*` for any key; empty for all of it.
        old: what was there; empty when there was nothing.
        new: what is there now; empty when nothing is. With both empty, the two cannot be compared.

    """

    what: Part
    path: str
    old: str
    new: str

    def __str__(self) -> str:
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
    """What a caller written for `old` can notice of `new`: up to 20 changes, none when all goes as it went.

    An agent of another kind is one change, for then nothing does.
    """
    was, now = (_KINDS[2 * of.invocable + of.streaming] for of in (old, new))
    if was != now:
        return [Change("kind", "", was, now)]
    found = chain(
        _Comparison("input", given=old.input_schema, taken=new.input_schema).changes(),
        _Comparison("output", given=new.output_schema, taken=old.output_schema).changes(),
        _Comparison("chunk", given=new.chunk_schema, taken=old.chunk_schema).changes(),
    )
    return list(islice(found, _MOST_CHANGES))


class _TooMuch(ValueError):
    """A schema is larger or deeper than any that means well."""


class _Comparison:
    """What may be given and is not taken, found one by one."""

    def __init__(self, what: Part, *, given: object, taken: object) -> None:
        self._what: Part = what
        self._given = _NOTHING if given is None else given
        self._taken = {} if taken is None else taken
        self._left = _MOST_WORK

    def changes(self) -> Iterator[Change]:
        try:
            if self._given != self._taken:
                yield from self._schemas(self._given, self._taken, "", frozenset())
        except (ValueError, RecursionError):  # a ValueError, too, of a number that is too long to be shown
            yield Change(self._what, "", "", "")

    def _schemas(self, given: object, taken: object, path: str, around: _Pairs) -> Iterator[Change]:
        """The changes from schema to schema; `around` are the pairs that these lie in, and may refer to."""
        if (id(given), id(taken)) in around:
            return
        if len(around) == _DEEPEST:
            raise _TooMuch
        around |= {(id(given), id(taken))}
        gives, takes = self._alternatives(given, self._given), self._alternatives(taken, self._taken)
        for one in gives:
            self._work(len(gives) + len(takes))
            became = _counterpart(one, gives, takes)
            if became is None or len(takes) > 1:  # what differs from an only candidate says as much
                tried = (self._plain(one, other, path, around) for other in takes)
                if any(next(differences, None) is None for differences in tried):
                    continue
            if became is None:
                yield self._change(path, _shown(gives), _shown(takes))
                return
            yield from self._plain(one, became, path, around)

    def _plain(self, given: _Plain, taken: _Plain, path: str, around: _Pairs) -> Iterator[Change]:
        self._work(_size(given) + _size(taken))
        is_listed = "enum" not in taken or ("enum" in given and given["enum"].keys() <= taken["enum"].keys())
        if not is_listed or not _is_of_type(given, taken):
            yield self._change(path, _shown([given]), _shown([taken]))
            return
        for sign, *keys, without in _BOUNDS:
            (gives, given_as), (takes, taken_as) = (_bound(of, sign, keys, without) for of in (given, taken))
            if gives < takes:
                yield self._change(path, given_as, taken_as)
        for key in _OPAQUE:
            if taken.get(key) and given.get(key) != taken[key]:
                said = [f"{key} {_text(of[key])}" if of.get(key) else "" for of in (given, taken)]
                yield self._change(path, *said)
        if taken.keys() & _OF_OBJECTS:
            yield from self._fields(given, taken, path, around)
        if "items" in taken or "prefixItems" in taken:
            yield from self._items(given, taken, path, around)

    def _fields(self, given: _Plain, taken: _Plain, path: str, around: _Pairs) -> Iterator[Change]:
        gives, takes = _properties(given), _properties(taken)
        more_given, more_taken = _further(given), _further(taken)
        for name in gives | takes:
            at = _inside(path, name)
            one, other = gives.get(name, more_given), takes.get(name, more_taken)
            always, must = name in given.get("required", ()), name in taken.get("required", ())
            # Callers read what comes, promised or not.
            is_missed = must or (self._what != "input" and more_given in (None, False))
            if name not in gives and is_missed:
                yield self._change(at, "", self._field(other, self._taken, required=must))
                continue
            if name not in takes and more_taken is False:
                yield self._change(at, self._field(one, self._given, required=always), "")
                continue
            if must and not always:
                optional = self._field(one, self._given, required=False)
                yield self._change(at, optional, self._field(other, self._taken, required=True))
            if one is not None and other is not None:
                yield from self._schemas(one, other, at, around)
        if more_given is not None and more_taken is not None:
            yield from self._schemas(more_given, more_taken, _inside(path, "*"), around)
        if "propertyNames" in taken:
            names = given.get("propertyNames", {"type": "string"})
            yield from self._schemas(names, taken["propertyNames"], _inside(path, "*"), around)

    def _items(self, given: _Plain, taken: _Plain, path: str, around: _Pairs) -> Iterator[Change]:
        gives, takes = given.get("prefixItems", []), taken.get("prefixItems", [])
        more_given, more_taken = given.get("items", True), taken.get("items", True)
        places, most = max(len(gives), len(takes)), given.get("maxItems", math.inf)
        for at in range(int(min(places, most))):
            one = gives[at] if at < len(gives) else more_given
            other = takes[at] if at < len(takes) else more_taken
            yield from self._schemas(one, other, f"{path}[{at}]", around)
        if most > places:
            yield from self._schemas(more_given, more_taken, f"{path}[]", around)

    def _alternatives(self, schema: object, root: object) -> list[_Plain]:
        """What a schema may be; those that only list values of one type are one, as an enumeration is."""
        found = dict[object, _Plain]()
        for one in self._apart(schema, root, frozenset()):
            if "enum" in one:
                listed = found.setdefault(one["type"], {"type": one["type"], "enum": {}})
                listed["enum"] |= one["enum"]
            else:
                found[len(found)] = one
        return list(found.values())

    def _apart(self, schema: object, root: object, followed: frozenset[str]) -> list[_Plain]:
        """References followed, unions and types taken apart, what holds together put together."""
        if schema is False:
            return []
        plain = _known(schema)
        parts = [plain.pop(key) for key in ("anyOf", "oneOf") if plain.get(key)]
        parts += [[one] for one in plain.pop("allOf", ())]
        if ref := plain.pop("$ref", ""):
            if ref in followed:  # what refers to itself at once says nothing more
                return []
            followed |= {ref}
            self._work(len(ref) // _CHARACTERS)
            parts.append([_target(ref, root)])
        found = _of_one_type(plain)
        self._work(sum(map(_size, found)))
        for part in parts:
            branches = [one for branch in part for one in self._apart(branch, root, followed)]
            self._work(sum(map(_size, branches)) * len(found) + sum(map(_size, found)) * len(branches))
            found = [both for one in branches for other in found if (both := _both(one, other)) is not None]
        return found

    def _work(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _TooMuch

    def _field(self, schema: object, root: object, *, required: bool) -> str:
        return f"{'required' if required else 'optional'} {_shown(self._alternatives(schema, root))}"

    def _change(self, path: str, given: str, taken: str) -> Change:
        old, new = (given, taken) if self._what == "input" else (taken, given)
        return Change(self._what, path, old, new)


def _known(schema: object) -> _Plain:
    """The keywords of a schema that are looked at and are what they should be."""
    if not isinstance(schema, dict):
        return {}
    found = ((key, schema[key], of) for key, of in _KEYWORDS.items() if key in schema)
    known = {key: value for key, value, of in found if isinstance(value, of)}
    if known.get("format") in _LOOSE_FORMATS:
        del known["format"]
    if "required" in known:
        known["required"] = {name: True for name in known["required"] if isinstance(name, str)}
    return known


def _of_one_type(plain: _Plain) -> list[_Plain]:
    """A schema once for each of its types, with the values of that type when it lists values."""
    named = plain.pop("type", [])
    types = [named] if isinstance(named, str) else [name for name in named if isinstance(name, str)]
    if "const" not in plain and "enum" not in plain:
        return [plain | {"type": name} for name in types] or [plain]
    listed = dict[str, dict[str, bool]]()
    for value in [plain.pop("const")] if "const" in plain else plain["enum"]:
        listed.setdefault(_TYPES.get(type(value), "object"), {})[repr(value)] = True
    found = [plain | {"type": name, "enum": texts} for name, texts in listed.items()]
    return [one for one in found if not types or any(_is_of_type(one, {"type": name}) for name in types)]


def _both(one: _Plain, other: _Plain) -> _Plain | None:
    """What holds of both, nearly: of two patterns, say, only the second is kept. None when nothing can."""
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


def _target(ref: str, root: object) -> object:
    """What a reference means: nothing is known, and so anything taken, of what is not in the document."""
    found = root if ref.startswith("#") else None
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _is_of_type(given: _Plain, taken: _Plain) -> bool:
    of, needed = given.get("type"), taken.get("type")
    return needed in (None, of) or (of, needed) == ("integer", "number")


def _counterpart(one: _Plain, gives: list[_Plain], takes: list[_Plain]) -> _Plain | None:
    """What an alternative became: the one of its name, or of its type when there is and was no other."""
    typed = [other for other in takes if _is_of_type(one, other)]
    named = [other for other in typed if other.get("title") == one.get("title")]
    if len(named) != 1 and len([other for other in gives if _is_of_type(other, one)]) == 1:
        named = typed
    return named[0] if len(named) == 1 else None


def _bound(plain: _Plain, sign: int, keys: list[str], without: float) -> tuple[tuple[float, int], str]:
    """How tight a bound is, and its text."""
    said = [(key, beyond) for beyond, key in enumerate(keys) if key in plain]
    bounds = [((sign * plain[key], beyond), f"{key} {_text(plain[key])}") for key, beyond in said]
    return max(bounds, default=((without, 0), ""))


def _properties(plain: _Plain) -> _Plain:
    patterns = {f"{{{pattern}}}": of for pattern, of in plain.get("patternProperties", {}).items()}
    return {**plain.get("required", {}), **plain.get("properties", {}), **patterns}


def _further(plain: _Plain) -> object:
    """What an object's other keys may hold: None when it says nothing of them."""
    is_open = not plain.keys() & {"properties", "patternProperties"}
    return plain.get("additionalProperties", is_open or None)


def _size(plain: _Plain) -> int:
    characters = sum(map(len, plain.get("enum", ())))
    fields = sum(len(value) for value in plain.values() if isinstance(value, (dict, list)))
    return 1 + fields + characters // _CHARACTERS


def _shown(alternatives: list[_Plain]) -> str:
    """A schema in a few words; none when it takes nothing."""
    names = [name for one in islice(alternatives, 6) for name in islice(_names(one), 6)]
    return _text(" | ".join(dict.fromkeys(names)), 100)


def _names(plain: _Plain) -> list[str]:
    if "enum" in plain:
        return list(islice(plain["enum"], 6))
    kind: str = plain.get("type", "any")
    is_named = kind == "object" and "properties" in plain and "title" in plain
    return [plain["title"] if is_named else _SHOWN.get(kind, kind)]


def _inside(path: str, name: str) -> str:
    return f"{path}.{_text(name)}".removeprefix(".")


def _text(value: object, most: int = 60) -> str:
    """What a stranger wrote, as a few characters that can be printed."""
    text = repr(f"{value}"[: most + 1])[1:-1]
    return text if len(text) <= most else f"{text[: most - 1]}…"
