"""State that survives a reload: taken from the old version, moved, given to the new one."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter

from openagentmesh.mesh.loading import Generation
from openagentmesh.protocol.errors import MeshError

_PARTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


class Transfer:
    """What one generation takes over from the one before it."""

    def __init__(self, generation: Generation) -> None:
        self._new = generation
        self._old = generation.before or Generation()
        self._moved: dict[str, Any] | None = None
        both = generation.kept.keys() & self._old.kept.keys()
        # The others were taken as they are, when the module was executed.
        self._names = [name for name in both if generation.kept[name] is not self._old.kept[name]]

    @property
    def has_migration(self) -> bool:
        """Whether the author moves the state by a function of the module."""
        return self._new.migration is not None and bool(self._old.kept)

    def migrate(self) -> None:
        """Let the author's function make the new state from a copy of the old one.

        Raises:
            BaseException: whatever that function raises.

        """
        migration = self._new.migration
        assert migration is not None
        self._moved = migration(self._dumped(self._old.kept), self._old.version)

    def try_out(self) -> None:
        """Make sure that `carry_out` will do.

        Raises:
            MeshError: something cannot be taken over.
            pydantic.ValidationError: the new class does not take the old content.

        """
        for name, value in self._contents().items():
            _validated(name, self._new.kept[name], value)

    def carry_out(self) -> None:
        """Give the new state the content of the old one, as it is at this moment."""
        for name, value in self._contents().items():
            kept = self._new.kept[name]
            _fill(kept, _validated(name, kept, value))

    def _contents(self) -> dict[str, Any]:
        if self._moved is not None:
            passed = self._old.kept.keys() - set(self._names)
            names = self._new.kept.keys() - passed
            return {name: value for name, value in self._moved.items() if name in names}
        return self._dumped(self._names)

    def _dumped(self, names: Iterable[str]) -> dict[str, Any]:
        kept = self._old.kept
        return {name: TypeAdapter(type(kept[name])).dump_python(kept[name], mode="json") for name in names}


def _validated(name: str, kept: object, value: object) -> object:
    if not isinstance(kept, BaseModel) and not dataclasses.is_dataclass(kept):
        raise MeshError(
            f"'{name}' is kept and a {type(kept).__name__} of the reloaded file. Only pydantic models, "
            "dataclasses and what other packages define can be kept; make it one of these."
        )
    found: object = TypeAdapter(type(kept)).validate_python(value)
    return found


def _fill(kept: object, content: object) -> None:
    """Give an object the content of another one of its class; who holds it keeps it."""
    names = (
        [field.name for field in dataclasses.fields(content)]
        if dataclasses.is_dataclass(content)
        else [part for part in _PARTS if hasattr(content, part)]
    )
    for name in names:
        object.__setattr__(kept, name, getattr(content, name))
