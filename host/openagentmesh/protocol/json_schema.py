"""JSON Schema documents: references, types and constants."""

from typing import Any, Final
from urllib.parse import unquote

Schema = dict[str, Any]
# The type of a constant; "object" for any other class.
TYPES: Final = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    type(None): "null",
}


def resolve_ref(ref: str, root: object) -> object:
    """What a reference within `root` points to, such as `#/$defs/Item`; None when it points nowhere.

    References to other documents are not followed.
    """
    found: object = root if ref.startswith("#") else None
    for part in ref.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    return found


def resolved(schema: Schema, root: Schema) -> Schema:
    """The schema itself, or the one that it refers to; `{}`, which accepts anything, when there is none."""
    found = resolve_ref(str(schema["$ref"]), root) if "$ref" in schema else schema
    return found if isinstance(found, dict) else {}


def constants(schema: Schema) -> Any:  # noqa: ANN401 - a peer's `enum` may be any JSON value
    """The values that a schema accepts, when it lists them; else None."""
    return [schema["const"]] if "const" in schema else schema.get("enum")
