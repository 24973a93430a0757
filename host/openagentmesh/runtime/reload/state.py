"""State that survives a reload: copied from the old version, migrated, given to the new one."""

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
from openagentmesh.runtime.reload.off_loop import TookTooLong, run_off_loop

_PARTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
# What pydantic's JSON has in place of a secret.
_MASK: Final = "*" * 10
# How often a migration runs: again when requests have changed the state that it migrated.
_MAX_MIGRATIONS: Final = 4


class StateTransfer:
    """What one generation takes over from the previous one."""

    def __init__(self, generation: Generation) -> None:
        self._new = generation
        self._old = generation.previous or Generation()
        self._copy: dict[str, Any] = {}
        self._migrated: dict[str, Any] | None = None
        both = generation.kept.keys() & self._old.kept.keys()
        # The others were passed on as they are, when the module was executed.
        self._names = {name for name in both if generation.kept[name] is not self._old.kept[name]}
        self._passed_on = both - self._names

    @property
    def has_migration(self) -> bool:
        """Whether a new or changed function of the author converts the state."""
        new, old = self._new, self._old
        if new.migration is None or not old.kept:
            return False
        return new.version != old.version or not _is_same_function(new.migration, old.migration)

    @property
    def is_migrated(self) -> bool:
        """Whether the migration's result is that of the current state."""
        return self._migrated is not None and self._copy == self._dumped_all()

    def copy(self) -> None:
        """Copy the kept state, for `migrate`."""
        self._copy = self._dumped_all()

    def migrate(self) -> None:
        """Run the author's function on the copy.

        Raises:
            MeshError: its result is invalid.
            BaseException: whatever it raises.
        """
        migration = self._new.migration
        assert migration is not None
        migrated = migration(deepcopy(self._copy), self._old.version)  # it may modify its argument
        if not isinstance(migrated, dict):
            raise MeshError(f"migrate returned {migrated!r:.80}, not a dict of the kept state by name.")
        for name, value in migrated.items():
            self._check_migrated(name, value)
        self._migrated = {name: value for name, value in migrated.items() if name not in self._passed_on}

    def _check_migrated(self, name: str, value: object) -> None:
        if name not in self._new.kept:
            raise MeshError(f"migrate returned '{name}', but nothing of that name is kept.")
        if name in self._passed_on and value != self._copy.get(name):
            raise MeshError(
                f"migrate changes '{name}', a {type(self._new.kept[name]).__name__} that is passed on as it "
                "is and that the old version still uses; keep the new form under another name."
            )
        if not _accepts_content(self._new.kept[name]):
            self._refuse_change(name)

    def carry_out(self) -> None:
        """Set the new state to the current content of the old one.

        The old state is not modified, so this may fail or be repeated.

        Raises:
            MeshError: an object cannot be taken over.
            pydantic.ValidationError: the new class does not accept the old content.
        """
        for name, value in self._contents().items():
            kept = self._new.kept[name]
            _fill(kept, _validated(self._new.hints[name], value))

    def _contents(self) -> dict[str, Any]:
        if self._migrated is not None:
            return self._migrated
        for name in self._names:
            if not _accepts_content(self._new.kept[name]):
                self._refuse_change(name)
        return self._dumped(self._names)

    def _dumped_all(self) -> dict[str, Any]:
        """The kept state that has a JSON form; clients, for example, have none."""
        found: dict[str, Any] = {}
        for name in self._old.kept:
            try:
                found |= self._dumped([name])
            except (MeshError, PydanticSerializationError):
                if name not in self._passed_on:
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
            # Computed fields are not inputs.
            dump = partial(adapter.dump_python, kept, round_trip=True, warnings=False)
            try:
                found[name] = dump(mode="json")
            except UnicodeDecodeError as exc:
                raise MeshError(f"the kept object '{name}' has no JSON form: {exc}") from exc
            if _MASK in repr(found[name]):
                found[name] = _revealed(found[name], dump(mode="python"))
        return found

    def _refuse_change(self, name: str) -> None:
        was, now = (type(kept.get(name)).__name__ for kept in (self._old.kept, self._new.kept))
        raise MeshError(
            f"'{name}' was a {was}, whose content a {now} cannot take over: models, dataclasses, dicts, "
            "lists, sets and deques can. Keep it under another name."
        )


async def transfer_state(transfers: Sequence[StateTransfer], limit_s: float) -> None:
    """Set the new state to the old one; nothing is awaited after the last look at that.

    The authors' migrations run off the loop, until their results are those of the current state.

    Args:
        transfers: from each generation to the one that replaces it.
        limit_s: seconds that each migration may take.

    Raises:
        MeshError: a migration takes too long, or requests change the state faster than it runs; or an
            object cannot be taken over.
        BaseException: whatever a migration raises.
    """
    with_migration = [transfer for transfer in transfers if transfer.has_migration]
    for _ in range(_MAX_MIGRATIONS):
        pending = [transfer for transfer in with_migration if not transfer.is_migrated]
        if not pending:
            break
        for transfer in pending:
            await _migrate(transfer, limit_s)
    if not all(transfer.is_migrated for transfer in with_migration):
        raise MeshError("requests change the kept state faster than migrate converts it.")
    for transfer in transfers:
        transfer.carry_out()


async def _migrate(transfer: StateTransfer, limit_s: float) -> None:
    transfer.copy()
    try:
        await run_off_loop(transfer.migrate, limit_s)
    except TookTooLong:
        raise MeshError(f"migrate takes longer than {limit_s:g}s, which is [host] load_timeout.") from None


def _is_same_function(one: Migration, other: Migration | None) -> bool:
    """Whether two functions have the same code, wherever in their files they are."""
    codes = [getattr(function, "__code__", None) for function in (one, other)]
    return None not in codes and _comparable(codes[0]) == _comparable(codes[1])


def _comparable(code: Any) -> object:  # noqa: ANN401 - a constant may be anything
    if not isinstance(code, CodeType):
        return type(code), code
    return code.co_code, code.co_names, code.co_varnames, tuple(_comparable(each) for each in code.co_consts)


def _revealed(dumped: Any, kept: Any) -> Any:  # noqa: ANN401 - what is kept may be of any type
    """Pydantic's JSON form, with the secrets that it masks replaced by those in `kept`."""
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


def _accepts_content(kept: object) -> bool:
    return has_content(kept) or isinstance(kept, dict | list | set | deque)


def _validated(hint: Any, value: object) -> object:  # noqa: ANN401 - what is kept may be of any type
    # As JSON, where strict models accept text for a date; migrations may use aliases or names.
    found: object = TypeAdapter[Any](hint).validate_json(to_json(value), by_alias=True, by_name=True)
    return found


def _fill(kept: Any, content: Any) -> None:  # noqa: ANN401 - two objects of one class, whichever
    """Set an object's content to that of another one of its class; references to it stay valid."""
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
