"""State that survives a reload: taken from the old version, moved, given to the new one."""

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from functools import partial
from types import CodeType
from typing import Any, Final

from pydantic import SecretBytes, SecretStr, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import PydanticSerializationError, to_json

from openagentmesh.mesh.module_context import Generation, Migration, has_content
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.reload.off_loop import TookTooLong, aside

_PARTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
# What pydantic's JSON has in the place of a secret.
_MASK: Final = "*" * 10
# How often a migration is run: again when requests have changed what it moved.
_TRIES: Final = 4


class Transfer:
    """What one generation takes over from the one before it."""

    def __init__(self, generation: Generation) -> None:
        self._new = generation
        self._old = generation.before or Generation()
        self._copy: dict[str, Any] = {}
        self._moved: dict[str, Any] | None = None
        both = generation.kept.keys() & self._old.kept.keys()
        # The others were taken as they are, when the module was executed.
        self._names = {name for name in both if generation.kept[name] is not self._old.kept[name]}
        self._passed = both - self._names

    @property
    def has_migration(self) -> bool:
        """Whether the author moves the state by a function of the module, and that was not done before."""
        new, old = self._new, self._old
        if new.migration is None or not old.kept:
            return False
        return new.version != old.version or not _same(new.migration, old.migration)

    @property
    def is_moved(self) -> bool:
        """Whether the author's function has moved all that is kept, as it is now."""
        return self._moved is not None and self._copy == self._dumped_all()

    def copy(self) -> None:
        """Take a copy of what is kept, for `migrate`."""
        self._copy = self._dumped_all()

    def migrate(self) -> None:
        """Let the author's function make the new state from the copy of the old one.

        Raises:
            BaseException: whatever that function raises.

        """
        migration = self._new.migration
        assert migration is not None
        moved = migration(deepcopy(self._copy), self._old.version)  # it may change what it is given
        if not isinstance(moved, dict):
            raise MeshError(f"migrate returned {moved!r:.80}, not a dict of what is kept by name.")
        for name, value in moved.items():
            if name not in self._new.kept:
                raise MeshError(f"migrate returned '{name}', and nothing is kept under that name.")
            if name in self._passed and value != self._copy.get(name):
                raise MeshError(
                    f"migrate changes '{name}', a {type(self._new.kept[name]).__name__} that passes as it is "
                    "and which the old version still uses; keep the new form under another name."
                )
            if not _takes_content(self._new.kept[name]):
                self._refuse_change(name)
        self._moved = {name: value for name, value in moved.items() if name not in self._passed}

    def carry_out(self) -> None:
        """Give the new state the content of the old one, as it is at this moment.

        The old state is not touched, so this may fail, or be done again.

        Raises:
            MeshError: something cannot be taken over.
            pydantic.ValidationError: the new class does not take the old content.

        """
        for name, value in self._contents().items():
            kept = self._new.kept[name]
            _fill(kept, _validated(self._new.hints[name], value))

    def _contents(self) -> dict[str, Any]:
        if self._moved is not None:
            return self._moved
        for name in self._names:
            if not _takes_content(self._new.kept[name]):
                self._refuse_change(name)
        return self._dumped(self._names)

    def _dumped_all(self) -> dict[str, Any]:
        """All that was kept and has a JSON form; clients and the like have none."""
        found: dict[str, Any] = {}
        for name in self._old.kept:
            try:
                found |= self._dumped([name])
            except (MeshError, PydanticSerializationError):
                if name not in self._passed:
                    raise
        return found

    def _dumped(self, names: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in names:
            kept = self._old.kept[name]
            try:
                adapter = TypeAdapter[Any](self._old.hints[name])
            except PydanticSchemaGenerationError:
                self._refuse_change(name)
            # What a model computes is no input of it.
            dump = partial(adapter.dump_python, kept, round_trip=True, warnings=False)
            try:
                found[name] = dump(mode="json")
            except UnicodeDecodeError as exc:
                raise MeshError(f"what is kept as '{name}' has no JSON form: {exc}") from exc
            if _MASK in repr(found[name]):
                found[name] = _revealed(found[name], dump(mode="python"))
        return found

    def _refuse_change(self, name: str) -> None:
        was, now = (type(kept.get(name)).__name__ for kept in (self._old.kept, self._new.kept))
        raise MeshError(
            f"'{name}' was kept as a {was}, whose content a {now} cannot take over: models, dataclasses, "
            "dicts, lists, sets and deques can. Give it another name."
        )


async def move(transfers: Sequence[Transfer], limit: float) -> None:
    """Give new state what the old one holds; nothing is awaited after the last look at that.

    The authors' migrations run beside the event loop, until all that is kept is moved as it is now.

    Args:
        transfers: from each generation to the one that is to replace it.
        limit: the seconds that each migration may take.

    Raises:
        MeshError: one takes too long, or requests change the state faster than it is moved; or
            something cannot be taken over.
        BaseException: whatever a migration raises.

    """
    for _ in range(_TRIES):
        waiting = [transfer for transfer in transfers if transfer.has_migration and not transfer.is_moved]
        for transfer in waiting:
            transfer.copy()
            try:
                await aside(transfer.migrate, limit)
            except TookTooLong:
                raise MeshError(
                    f"migrate takes longer than {limit:g}s, which is [host] load_timeout."
                ) from None
        if not waiting:
            break
    if not all(transfer.is_moved for transfer in transfers if transfer.has_migration):
        raise MeshError("requests change what is kept faster than migrate moves it.")
    for transfer in transfers:
        transfer.carry_out()


def _same(one: Migration, other: Migration | None) -> bool:
    """Whether two functions do the same, wherever in their files they are."""
    codes = [getattr(function, "__code__", None) for function in (one, other)]
    return None not in codes and _essence(codes[0]) == _essence(codes[1])


def _essence(code: Any) -> object:  # noqa: ANN401 - a constant may be anything
    if not isinstance(code, CodeType):
        return type(code), code
    return code.co_code, code.co_names, code.co_varnames, tuple(_essence(each) for each in code.co_consts)


def _revealed(dumped: Any, kept: Any) -> Any:  # noqa: ANN401 - what is kept may be of any type
    """What pydantic has dumped as JSON, with the secrets that it masks there as they are `kept`."""
    if isinstance(kept, SecretStr | SecretBytes):
        secret = kept.get_secret_value()
        return secret.decode() if isinstance(secret, bytes) else secret
    if isinstance(dumped, dict) and isinstance(kept, dict):
        return {
            key: _revealed(value, own)
            for (key, value), own in zip(dumped.items(), kept.values(), strict=False)
        }
    if isinstance(dumped, list) and isinstance(kept, Collection):
        return [_revealed(value, own) for value, own in zip(dumped, kept, strict=False)]
    return dumped


def _takes_content(kept: object) -> bool:
    return has_content(kept) or isinstance(kept, dict | list | set | deque)


def _validated(hint: Any, value: object) -> object:  # noqa: ANN401 - what is kept may be of any type
    # As from JSON, where strict models too take a text for a date; migrations may use either name.
    found: object = TypeAdapter[Any](hint).validate_json(to_json(value), by_alias=True, by_name=True)
    return found


def _fill(kept: Any, content: Any) -> None:  # noqa: ANN401 - two objects of one class, whichever
    """Give an object the content of another one of its class; who holds it keeps it."""
    if isinstance(kept, dict | list | set | deque):
        kept.clear()
        (kept.extend if isinstance(kept, list | deque) else kept.update)(content)
        return
    names = (
        [field.name for field in dataclasses.fields(content)]
        if dataclasses.is_dataclass(content)
        else [part for part in _PARTS if hasattr(content, part)]
    )
    for name in names:
        object.__setattr__(kept, name, getattr(content, name))
