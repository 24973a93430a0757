"""An agent as a tool for language models, and as an A2A agent card. Arguments are never modified."""

import re
from typing import Any, Final

from pydantic_core import from_json, to_json

from openagentmesh.protocol.json_schema import TYPES, Schema, constants, resolved

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VALUE: Final = "value"
_DEFINITIONS: Final = ("$defs", "definitions")
# Keywords that are valid in the root alone, so they stay there when the rest is wrapped.
_ROOT_KEYWORDS: Final = ("$schema", "$id", *_DEFINITIONS)
_COMBINING: Final = {"$ref", "allOf", "anyOf", "oneOf"}
# Keywords that model APIs reject in the root of a tool's input.
_NOT_IN_ROOT: Final = _COMBINING | {"not", "enum", "const"}
_STRICT_REF: Final = re.compile(r"#|#/(\$defs|definitions)/[^/]+")


def tool(agent: str, description: str, input_schema: Schema | None, output_schema: Schema | None) -> Schema:
    """An agent as `{name, description, input_schema}`: the neutral form, and Anthropic's."""
    name = agent.replace(".", "_")
    if not _TOOL_NAME.fullmatch(name):
        raise ValueError(
            f"Agent '{agent}' cannot be a tool: a tool's name is 1 to 64 letters, digits, '_' and '-', and "
            f"'{name}' has {len(name)} characters. Register the agent under another name"
        )
    match _plain_object(output_schema or {}):
        case {"properties": dict(fields)} if fields:
            description = f"{description}\nReturns: {', '.join(fields)}.".lstrip()
    return {"name": name, "description": description, "input_schema": _tool_input_schema(input_schema)}


def openai_tool(neutral: Schema, *, api: str, strict: bool) -> Schema:
    """A tool in the form of OpenAI's chat or responses API."""
    if api not in ("chat", "responses"):
        raise ValueError(f"api must be 'chat' or 'responses', not {api!r}")
    name, parameters = neutral["name"], neutral["input_schema"]
    parameters = _strict_root(parameters, name) if strict else parameters
    function = {"name": name, "description": neutral["description"], "parameters": parameters}
    if api == "responses":  # which treats a tool without `strict` as strict
        return {"type": "function", **function, "strict": strict}
    return {"type": "function", "function": function | ({"strict": True} if strict else {})}


def agent_card(document: Schema, url: str | None) -> Schema:
    """The A2A card of a published contract (protocol §4)."""
    card = {key: value for key, value in document.items() if key != "x-agentmesh"}
    return _copy(card if url is None else card | {"url": url})


def tool_input(input_schema: Schema | None, arguments: Schema) -> Any:  # noqa: ANN401 - any JSON value
    """The payload for an agent with this input schema, from the arguments of a model's tool call.

    A wrapped value is unwrapped. A null is removed where the schema does not accept null: strict mode makes
    models send one for an optional field. Arguments that do not match are passed on, so that the agent's
    own validation reports the problem.
    """
    if input_schema is None:
        return None
    value = arguments if _plain_object(input_schema) else arguments.get(_VALUE, arguments)
    return _without_nulls(value, [input_schema], input_schema)


def _copy(document: Schema) -> Schema:
    """A copy by way of JSON, which removes values that JSON lacks, such as a default of NaN."""
    copied: Schema = from_json(to_json(document, inf_nan_mode="null"))
    return copied


def _tool_input_schema(input_schema: Schema | None) -> Schema:
    if input_schema is None:
        return {"type": "object", "properties": {}}
    schema = _copy(input_schema)
    if found := _plain_object(schema):
        return {"type": "object", "properties": {}} | found
    root = {key: schema.pop(key) for key in _ROOT_KEYWORDS if key in schema}
    return {"type": "object", "properties": {_VALUE: schema}, "required": [_VALUE]} | root


def _plain_object(schema: Schema) -> Schema | None:
    """The schema as one object without a reference or union in its root, as model APIs require; else None."""
    match _alternatives([schema], schema):
        case [{"type": "object"} as found] if not _NOT_IN_ROOT & found.keys():
            return found
    return None


def _alternatives(schemas: list[Any], root: Schema) -> list[Schema]:
    """The alternatives of these schemas: references are followed and unions split; cycles add nothing."""
    pending, plain, followed = list(schemas), list[Schema](), set[str]()
    for one in pending:  # which grows during the loop
        match one:
            case dict() if "properties" in one:  # they apply beside any other keyword
                plain.append(one)
            case {"$ref": str(ref), **rest}:
                if ref not in followed:
                    followed.add(ref)
                    pending.append(resolved(one, root) | rest)
            case {"anyOf": list(of), **rest} | {"oneOf": list(of), **rest} | {"allOf": [_] as of, **rest}:
                pending += [branch | rest if isinstance(branch, dict) else branch for branch in of]
            case _:
                plain.append(one if isinstance(one, dict) else {})
    return plain


def _accept(schemas: list[Any], value: object, root: Schema) -> bool:
    """Whether one of the schemas, if there are any, may accept a value: by its constants and by null."""
    return any(
        value in (constants(plain) or [value]) and (value is not None or "null" in plain.get("type", "null"))
        for plain in _alternatives(schemas or [{}], root)
    )


def _without_nulls(value: object, schemas: list[Any], root: Schema) -> object:
    """The value, which has one of these schemas, without the nulls that none of them accepts."""
    plain = _unique(_alternatives(schemas, root))
    if isinstance(value, list):
        items = [item for one in plain for item in (*one.get("prefixItems", ()), one.get("items"))]
        return [_without_nulls(item, items, root) for item in value]
    if not isinstance(value, dict):
        return value
    objects = [one.get("properties", {}) for one in plain if _matches(value, one, root)]
    kept = {}
    for key, item in value.items():
        fields = [properties[key] for properties in objects]
        if item is not None or _accept(fields, None, root):
            kept[key] = _without_nulls(item, fields, root)
    return kept


def _matches(value: Schema, plain: Schema, root: Schema) -> bool:
    """Whether a value has exactly a schema's properties, as strict mode sends them, and their constants."""
    properties = plain.get("properties", {})
    return value.keys() == properties.keys() and all(
        item is None or _accept([properties[key]], item, root) for key, item in value.items()
    )


def _strict_root(parameters: Schema, name: str) -> Schema:
    """The part of a schema that OpenAI's structured outputs can enforce; the agent validates the rest."""
    try:
        strict = _strict(parameters, f"{name}#", parameters)
        for key in parameters.keys() & _DEFINITIONS:
            found = parameters[key].items()
            strict[key] = {of: _strict(one, f"{name}#/{key}/{of}", parameters) for of, one in found}
    except (AttributeError, TypeError) as exc:
        raise ValueError(f"The input schema of tool '{name}' is not a JSON Schema ({exc})") from exc
    return strict


def _strict(schema: Any, path: str, root: Schema) -> Schema:  # noqa: ANN401 - published by a peer
    match schema:
        case {"properties": _} if _COMBINING & schema.keys():
            raise _inexpressible(path, "combines its properties with another schema's")
        case {"allOf": [dict(only)], **rest}:
            return _strict(only | rest, path, root)
        case {"allOf": _}:
            raise _inexpressible(path, "combines several schemas")
        case {"$ref": ref}:
            if not _STRICT_REF.fullmatch(ref) or not resolved(schema, root):
                raise _inexpressible(path, f"refers to {ref}, which is not defined")
            return {"$ref": ref}
        case {"anyOf": union} | {"oneOf": union}:
            branches = [_strict(branch, f"{path}/anyOf/{at}", root) for at, branch in enumerate(union)]
            described = {"description": schema["description"]} if "description" in schema else {}
            return described | {"anyOf": branches}
        case dict() if types := _types(schema):
            return _strict_typed(schema, types, path, root)
    raise _inexpressible(path, "accepts any value")


def _strict_typed(schema: Schema, types: list[str], path: str, root: Schema) -> Schema:
    strict: Schema = {key: schema[key] for key in ("description", "enum", "const") if key in schema}
    strict["type"] = types[0] if len(types) == 1 else types
    if "object" in types:
        strict |= _strict_object(schema, path, root)
    if "array" in types:
        strict["items"] = _strict_items(schema, path, root)
    return strict


def _strict_object(schema: Schema, path: str, root: Schema) -> Schema:
    # An object that declares no properties accepts any.
    is_open = schema.get("additionalProperties", "properties" not in schema)
    if is_open is not False or schema.get("patternProperties"):
        raise _inexpressible(path, "accepts any keys")
    fields = {}
    for key, field in schema.get("properties", {}).items():
        strict = _strict(field, f"{path}/properties/{key}", root)
        # A constant that is its own default, such as the tag of a union, is always sent: null would hide it.
        is_sent = key in schema.get("required", ()) or field.get("const", field) == field.get("default", ...)
        fields[key] = strict if is_sent or _accept([field], None, root) else _nullable(strict)
    return {"properties": fields, "required": list(fields), "additionalProperties": False}


def _strict_items(schema: Schema, path: str, root: Schema) -> Schema:
    """The schema of an array's items. Strict mode has no tuples: each item may have any of the item types."""
    items = [*schema.get("prefixItems", ()), schema.get("items", False)]
    found = _unique([_strict(item, f"{path}/items", root) for item in items if item is not False])
    if not found:
        raise _inexpressible(path, "accepts any items")
    return found[0] if len(found) == 1 else {"anyOf": found}


def _nullable(strict: Schema) -> Schema:
    if "type" in strict and not {"enum", "const"} & strict.keys():
        return strict | {"type": [*_types(strict), "null"]}
    union = strict if "anyOf" in strict else {"anyOf": [strict]}
    return union | {"anyOf": [*union["anyOf"], {"type": "null"}]}


def _types(schema: Schema) -> list[str]:
    """The types that a schema declares, or those of its constants; empty for any type."""
    named = schema.get("type", [TYPES.get(type(value), "object") for value in constants(schema) or ()])
    return [named] if isinstance(named, str) else list(dict.fromkeys(named))


def _unique(schemas: list[Schema]) -> list[Schema]:
    return [one for at, one in enumerate(schemas) if one not in schemas[:at]]


def _inexpressible(path: str, why: str) -> ValueError:
    return ValueError(f"OpenAI's strict mode cannot express {path}, which {why}. Use strict=False")
