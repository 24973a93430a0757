"""State that survives a reload: copied from the old version, migrated, given to the new one."""

import dataclasses
from collections import deque
from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import partial
from types import CodeType
from typing import Any, Final

from pydantic import SecretBytes, SecretStr, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import PydanticSerializationError, to_json

from openagentmesh.mesh.module_context import Generation, has_content
from openagentmesh.protocol.errors import MeshError
from openagentmesh.runtime.reload.off_loop import TookTooLong, run_off_loop

_PARTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
# What pydantic's JSON has in place of a secret.
_MASK: Final = "*" * 10
# How often a migration runs: repeated when requests have changed the state that it migrated.
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
    def needs_migration(self) -> bool:
        """Whether a new or changed function of the author has to convert the current state."""
        new, old = self._new, self._old
        if new.migration is None or not old.kept:
            return False
        if new.version == old.version and _comparable(new.migration) == _comparable(old.migration):
            return False
        return self._migrated is None or self._copy != self._dumped_all()

    async def migrate(self, limit_s: float) -> None:
        """Run the author's function on a copy of the kept state, off the loop."""
        self._copy = self._dumped_all()
        try:
            await run_off_loop(self._migrate, limit_s)
        except TookTooLong:
            raise MeshError(
                f"migrate takes longer than {limit_s:g}s, which is [host] load_timeout."
            ) from None

    def _migrate(self) -> None:
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
        self._check_accepts_content(name)

    def carry_out(self) -> None:
        """Set the new state to the current content of the old one, which is not modified.

        Raises:
            MeshError: an object cannot be taken over.
            pydantic.ValidationError: the new class does not accept the old content.
        """
        for name, value in self._contents().items():
            # As JSON, where strict models accept text for a date; migrations may use aliases or names.
            adapter = TypeAdapter[Any](self._new.hints[name])
            content = adapter.validate_json(to_json(value), by_alias=True, by_name=True)
            _fill(self._new.kept[name], content)

    def _contents(self) -> dict[str, Any]:
        if self._migrated is not None:
            return self._migrated
        for name in self._names:
            self._check_accepts_content(name)
        return {name: self._dumped(name) for name in self._names}

    def _dumped_all(self) -> dict[str, Any]:
        """The kept state that has a JSON form; clients, for example, have none."""
        found: dict[str, Any] = {}
        for name in self._old.kept:
            try:
                found[name] = self._dumped(name)
            except (MeshError, PydanticSerializationError):
                if name not in self._passed_on:
                    raise
        return found

    def _dumped(self, name: str) -> Any:  # noqa: ANN401 - any JSON
        try:
            adapter = TypeAdapter[Any](self._old.hints[name])
        except PydanticSchemaGenerationError as exc:
            raise self._incompatible(name) from exc
        # Computed fields are not inputs.
        dump = partial(adapter.dump_python, self._old.kept[name], round_trip=True, warnings=False)
        try:
            dumped = dump(mode="json")
        except UnicodeDecodeError as exc:
            raise MeshError(f"the kept object '{name}' has no JSON form: {exc}") from exc
        return _revealed(dumped, dump(mode="python")) if _MASK in repr(dumped) else dumped

    def _check_accepts_content(self, name: str) -> None:
        kept = self._new.kept[name]
        if not has_content(kept) and not isinstance(kept, dict | list | set | deque):
            raise self._incompatible(name)

    def _incompatible(self, name: str) -> MeshError:
        was, now = (type(kept.get(name)).__name__ for kept in (self._old.kept, self._new.kept))
        return MeshError(
            f"'{name}' was a {was}, whose content a {now} cannot take over: models, dataclasses, dicts, "
            "lists, sets and deques can. Keep it under another name."
        )


async def transfer_state(transfers: Sequence[StateTransfer], limit_s: float) -> None:
    """Set the new state to the old one; nothing is awaited once that has been read.

    The authors' migrations run off the loop, each for at most `limit_s` seconds, repeated until their results
    are those of the current state.

    Raises:
        MeshError: a migration takes too long, requests change the state faster, or an object does not fit.
        BaseException: whatever a migration raises.
    """
    migrations = 0
    while pending := [transfer for transfer in transfers if transfer.needs_migration]:
        if migrations == _MAX_MIGRATIONS:
            raise MeshError("requests change the kept state faster than migrate converts it.")
        migrations += 1
        for transfer in pending:
            await transfer.migrate(limit_s)
    for transfer in transfers:
        transfer.carry_out()


def _comparable(function: object) -> object:
    """A function's code, to be compared with another one's, wherever in their files they are."""
    code = getattr(function, "__code__", function)
    if not isinstance(code, CodeType):  # a constant
        return type(code), code
    return code.co_code, code.co_names, code.co_varnames, tuple(_comparable(each) for each in code.co_consts)


def _revealed(dumped: Any, kept: Any) -> Any:  # noqa: ANN401 - what is kept may be of any type
    """Pydantic's JSON form, with the secrets that it masks replaced by those in `kept`."""
    if isinstance(kept, SecretStr | SecretBytes):
        secret = kept.get_secret_value()
        return secret.decode() if isinstance(secret, bytes) else secret
    if isinstance(dumped, dict) and isinstance(kept, dict):
        pairs = zip(dumped.items(), kept.values(), strict=False)
        return {key: _revealed(value, own) for (key, value), own in pairs}
    if isinstance(dumped, list) and isinstance(kept, Collection):
        return [_revealed(value, own) for value, own in zip(dumped, kept, strict=False)]
    return dumped


def _fill(kept: Any, content: Any) -> None:  # noqa: ANN401 - two objects of one class, whichever
    """Set an object's content to that of another one of its class; references to it stay valid."""
    if isinstance(kept, dict | list | set | deque):
        kept.clear()
        (kept.extend if isinstance(kept, list | deque) else kept.update)(content)
        return
    if dataclasses.is_dataclass(content):
        names = [field.name for field in dataclasses.fields(content)]
    else:
        names = [part for part in _PARTS if hasattr(content, part)]
    for name in names:
        object.__setattr__(kept, name, getattr(content, name))
