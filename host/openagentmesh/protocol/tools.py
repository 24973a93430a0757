"""An agent as a tool that language models call, and as an A2A agent card. What goes in never changes."""

import re
from typing import Any, Final
from urllib.parse import unquote

from pydantic_core import from_json, to_json

Schema = dict[str, Any]

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VALUE: Final = "value"
_DEFINITIONS: Final = ("$defs", "definitions")
# What names the whole document or is found from its root, so it stays there when the rest is wrapped.
_OF_THE_ROOT: Final = ("$schema", "$id", *_DEFINITIONS)
_COMBINING: Final = {"$ref", "allOf", "anyOf", "oneOf"}
# What model APIs refuse in the root of a tool's input.
_NOT_AT_THE_ROOT: Final = _COMBINING | {"not", "enum", "const"}
_STRICT_REF: Final = re.compile(r"#|#/(\$defs|definitions)/[^/]+")
_TYPES: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def tool(agent: str, description: str, takes: Schema | None, returns: Schema | None) -> Schema:
    """An agent as `{name, description, input_schema}`: the neutral form, which is Anthropic's too.

    Raises:
        ValueError: the agent's name cannot name a tool.

    """
    name = agent.replace(".", "_")
    if not _TOOL_NAME.fullmatch(name):
        raise ValueError(
            f"Agent '{agent}' is no tool: a tool's name is 1 to 64 letters, digits, '_' and '-', and "
            f"'{name}' has {len(name)} characters. Register the agent under another name"
        )
    match _plain_object(returns or {}):
        case {"properties": dict(fields)} if fields:
            description = f"{description}\nReturns: {', '.join(fields)}.".lstrip()
    return {"name": name, "description": description, "input_schema": _tool_input_schema(takes)}


def openai_tool(made: Schema, *, api: str, strict: bool) -> Schema:
    """A tool in the form of OpenAI's chat or responses API.

    Raises:
        ValueError: the API is neither, or strict mode cannot express the tool's input.

    """
    if api not in ("chat", "responses"):
        raise ValueError(f"api is 'chat' or 'responses', not {api!r}")
    name, parameters = made["name"], made["input_schema"]
    parameters = _strict_root(parameters, name) if strict else parameters
    function = {"name": name, "description": made["description"], "parameters": parameters}
    if api == "responses":  # which takes a tool that does not say for strict
        return {"type": "function", **function, "strict": strict}
    return {"type": "function", "function": function | ({"strict": True} if strict else {})}


def agent_card(document: Schema, url: str | None) -> Schema:
    """The A2A card of a published contract (protocol §4)."""
    card = {key: value for key, value in document.items() if key != "x-agentmesh"}
    return _copy(card if url is None else card | {"url": url})


def tool_input(takes: Schema | None, arguments: Schema) -> Any:  # noqa: ANN401 - any JSON value
    """The payload for an agent that takes `takes`, from the arguments that a model gave for its tool.

    What was wrapped is unwrapped. A null is left out where the agent takes none: strict mode makes models
    give one for a field that they leave to its default. Arguments that do not fit go on as they are, for
    the agent's own validation to say what is wrong.
    """
    if takes is None:
        return None
    given = arguments if _plain_object(takes) else arguments.get(_VALUE, arguments)
    return _without_nulls(given, [takes], takes)


def _copy(document: Schema) -> Schema:
    """A copy by way of JSON, so that what is none, such as a default of NaN, does not reach an API."""
    copied: Schema = from_json(to_json(document, inf_nan_mode="null"))
    return copied


def _tool_input_schema(takes: Schema | None) -> Schema:
    if takes is None:
        return {"type": "object", "properties": {}}
    takes = _copy(takes)
    if found := _plain_object(takes):
        return {"type": "object", "properties": {}} | found
    root = {key: takes.pop(key) for key in _OF_THE_ROOT if key in takes}
    return {"type": "object", "properties": {_VALUE: takes}, "required": [_VALUE]} | root


def _plain_object(schema: Schema) -> Schema | None:
    """The schema as model APIs want a tool's input: one object, with no reference or union in its root."""
    match _alternatives(schema, schema):
        case [{"type": "object"} as found] if not _NOT_AT_THE_ROOT & found.keys():
            return found
    return None


def _alternatives(schema: object, root: Schema) -> list[Schema]:
    """A schema's alternatives: references followed, unions taken apart. One that comes back adds none."""
    waiting, plain = [schema], list[Schema]()
    followed = set[str]()
    for one in waiting:  # which grows meanwhile
        match one:
            case dict() if "properties" in one:  # which hold, whatever else does
                plain.append(one)
            case {"$ref": str(ref), **rest}:
                if ref not in followed:
                    followed.add(ref)
                    waiting.append(_target(ref, root) | rest)
            case {"anyOf": list(of), **rest} | {"oneOf": list(of), **rest} | {"allOf": [_] as of, **rest}:
                waiting += [branch | rest if isinstance(branch, dict) else branch for branch in of]
            case _:
                plain.append(one if isinstance(one, dict) else {})
    return plain


def _target(ref: str, root: Schema) -> Schema:
    """What a reference means; nothing is known, `{}`, of what is not in the document."""
    found: Any = root
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _values(plain: Schema) -> list[Any] | None:
    """All the values that a schema takes when it lists them."""
    return [plain["const"]] if "const" in plain else plain.get("enum")


def _takes(value: object, schema: object, root: Schema) -> bool:
    """Whether a schema may take a value, as far as constants and null tell."""
    return any(
        value in (_values(plain) or [value]) and (value is not None or "null" in plain.get("type", "null"))
        for plain in _alternatives(schema, root)
    )


def _without_nulls(value: object, schemas: list[Any], root: Schema) -> object:
    """The value, of one of these schemas, without the nulls that none of them takes."""
    plain = _unique([one for schema in schemas for one in _alternatives(schema, root)])
    if isinstance(value, list):
        places = [place for one in plain for place in (*one.get("prefixItems", ()), one.get("items"))]
        return [_without_nulls(item, places, root) for item in value]
    if not isinstance(value, dict):
        return value
    objects = [one.get("properties", {}) for one in plain]
    objects = [properties for properties in objects if _fits(value, properties, root)]
    kept = {}
    for key, item in value.items():
        fields = [properties[key] for properties in objects]
        if item is not None or not fields or any(_takes(None, field, root) for field in fields):
            kept[key] = _without_nulls(item, fields, root)
    return kept


def _fits(value: Schema, properties: Schema, root: Schema) -> bool:
    """Whether these are the properties of a value: strict mode gives every key, and constants tell too."""
    return value.keys() == properties.keys() and all(
        item is None or _takes(item, properties[key], root) for key, item in value.items()
    )


def _strict_root(parameters: Schema, name: str) -> Schema:
    """The schema within what OpenAI's structured outputs can enforce; the rest is the agent's to validate."""
    try:
        strict = _strict(parameters, f"{name}#", parameters)
        for key in parameters.keys() & _DEFINITIONS:
            found = parameters[key].items()
            strict[key] = {of: _strict(one, f"{name}#/{key}/{of}", parameters) for of, one in found}
    except (AttributeError, TypeError) as exc:
        raise ValueError(f"The input schema of tool '{name}' is no JSON Schema ({exc})") from exc
    return strict


def _strict(schema: Any, path: str, root: Schema) -> Schema:  # noqa: ANN401 - what a peer published
    match schema:
        case {"properties": _} if _COMBINING & schema.keys():
            raise _inexpressible(path, "combines its properties with another schema's")
        case {"allOf": [dict(only)], **rest}:
            return _strict(only | rest, path, root)
        case {"allOf": _}:
            raise _inexpressible(path, "combines several schemas")
        case {"$ref": ref}:
            if not _STRICT_REF.fullmatch(ref) or not _target(ref, root):
                raise _inexpressible(path, f"refers to {ref}, and that defines nothing")
            return {"$ref": ref}
        case {"anyOf": union} | {"oneOf": union}:
            branches = [_strict(branch, f"{path}/anyOf/{at}", root) for at, branch in enumerate(union)]
            described = {"description": schema["description"]} if "description" in schema else {}
            return described | {"anyOf": branches}
        case dict() if types := _types(schema):
            strict = {key: schema[key] for key in ("description", "enum", "const") if key in schema}
            strict["type"] = types[0] if len(types) == 1 else types
            if "object" in types:
                strict |= _strict_object(schema, path, root)
            if "array" in types:
                strict["items"] = _strict_items(schema, path, root)
            return strict
    raise _inexpressible(path, "takes any value")


def _strict_object(schema: Schema, path: str, root: Schema) -> Schema:
    # An object that names no properties is there to take any.
    is_open = schema.get("additionalProperties", "properties" not in schema)
    if is_open is not False or schema.get("patternProperties"):
        raise _inexpressible(path, "takes any keys")
    fields = {}
    for key, field in schema.get("properties", {}).items():
        strict = _strict(field, f"{path}/properties/{key}", root)
        # A constant that is its own default, such as the tag of a union, is always given: null would hide it.
        given = key in schema.get("required", ()) or field.get("const", field) == field.get("default", ...)
        fields[key] = strict if given or _takes(None, field, root) else _nullable(strict)
    return {"properties": fields, "required": list(fields), "additionalProperties": False}


def _strict_items(schema: Schema, path: str, root: Schema) -> Schema:
    """The schema of an array's items. Strict mode has no tuples: each item of one may be any of its items."""
    places = [*schema.get("prefixItems", ()), schema.get("items", False)]
    found = _unique([_strict(place, f"{path}/items", root) for place in places if place is not False])
    if not found:
        raise _inexpressible(path, "takes any items")
    return found[0] if len(found) == 1 else {"anyOf": found}


def _nullable(strict: Schema) -> Schema:
    if "type" in strict and not {"enum", "const"} & strict.keys():
        return strict | {"type": [*_types(strict), "null"]}
    union = strict if "anyOf" in strict else {"anyOf": [strict]}
    return union | {"anyOf": [*union["anyOf"], {"type": "null"}]}


def _types(schema: Schema) -> list[str]:
    """The types that a schema names, or those of the values that it lists; none when they may be any."""
    named = schema.get("type", [_TYPES.get(type(value), "object") for value in _values(schema) or ()])
    return [named] if isinstance(named, str) else list(dict.fromkeys(named))


def _unique(schemas: list[Schema]) -> list[Schema]:
    return [one for at, one in enumerate(schemas) if one not in schemas[:at]]


def _inexpressible(path: str, why: str) -> ValueError:
    return ValueError(f"OpenAI's strict mode cannot express {path}, which {why}. Use strict=False")
