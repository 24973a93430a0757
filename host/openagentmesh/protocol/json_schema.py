"""JSON Schema documents: following references."""

from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any]


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
    """The schema itself, or the one that it refers to."""
    found = resolve_ref(str(schema["$ref"]), root) if "$ref" in schema else schema
    return found if isinstance(found, dict) else {}
