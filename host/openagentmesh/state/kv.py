"""The shared state of a mesh: texts, bytes and models under keys, in the bucket `mesh-context`."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from inspect import isawaitable
from operator import not_
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt

from openagentmesh.protocol import subjects
from openagentmesh.protocol.errors import InvalidInput, KVConflict, KVKeyExists, NotFound, validation_problems
from openagentmesh.protocol.messages import KVEntry
from openagentmesh.protocol.subjects import CONTEXT_BUCKET
from openagentmesh.transport.backoff import jittered_backoff
from openagentmesh.transport.kv import KVBuckets

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)
Entries = list[KVEntry[T]]
_FIRST_PAUSE_S: Final = 0.01
_MAX_PAUSE_S: Final = 0.5


@dataclass(slots=True)
class Draft(Generic[T]):
    """A key's value inside `cas` and `try_cas`: set `value`, and it is written at the end.

    Attributes:
        key: the key.
        value: the value that was read, then the value to write.
        revision: the revision that was read, then the one that was written; 0 for no key.
        committed: whether it was written, or did not need to be.
        attempted_write: whether the value was changed.
    """

    key: str
    value: T
    revision: int
    committed: bool = False
    attempted_write: bool = False


@dataclass(slots=True, frozen=True)
class _Encoding(Generic[T]):
    """How values are encoded: as text, or as a model's JSON."""

    decode: Callable[[str, bytes], T]
    encode: Callable[[str, T], bytes]


class KV:
    """Texts, bytes and models under keys, shared by all participants of the mesh.

    Keys are words of letters, digits and `-_/=`, joined by dots; `watch` and `list` take patterns with
    `*` and `>`. All methods raise MeshError: NotFound for a missing key, KVKeyExists and KVConflict for
    concurrent changes, InvalidInput for an invalid key or value, ConnectionFailed.
    """

    def __init__(self, ready: Callable[[], Awaitable[KVBuckets]]) -> None:
        self._ready = ready

    async def put(self, key: str, value: str | bytes) -> int:
        """Set a key; returns its revision."""
        buckets = await self._checked(key)
        return await buckets.put(CONTEXT_BUCKET, key, _encode(key, value))

    async def get(self, key: str) -> str:
        """The text under a key."""
        return _text(key, (await self._read(key)).value)

    async def delete(self, key: str) -> None:
        """Delete a key; a missing key is no error."""
        buckets = await self._checked(key)
        await buckets.delete_all(CONTEXT_BUCKET, [key])

    async def create(self, key: str, value: str | bytes) -> int:
        """Create a key; returns its revision.

        Raises:
            KVKeyExists: it exists.
        """
        buckets = await self._checked(key)
        revision = await buckets.compare_and_set(CONTEXT_BUCKET, key, _encode(key, value), None)
        if revision is None:
            raise KVKeyExists(f"The key '{key}' exists already", details={"key": key})
        return revision

    async def update(
        self, key: str, fn: Callable[[str], str | Awaitable[str]], max_retries: int = 10
    ) -> None:
        """Replace a text by `fn` of it; after a concurrent change, retry with the new text.

        There is at least one attempt.

        Raises:
            KVConflict: the key was changed concurrently in all `max_retries` attempts.
        """
        attempts = max(1, max_retries)
        update = AsyncRetrying(
            retry=retry_if_result(not_),
            wait=jittered_backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S),
            stop=stop_after_attempt(attempts),
            retry_error_callback=lambda _state: False,
        )
        if not await update(self._try_update, key, fn):
            raise KVConflict(
                f"The key '{key}' was changed concurrently {attempts} times, so it was not updated.",
                details={"key": key, "tries": attempts},
            )

    async def _try_update(self, key: str, fn: Callable[[str], str | Awaitable[str]]) -> bool:
        async with self.try_cas(key) as draft:
            result = fn(draft.value)
            draft.value = await result if isawaitable(result) else result
        return draft.committed

    async def watch(self, key: str) -> AsyncGenerator[str, None]:
        """The text of a key as it is and each time it changes, also across reconnects.

        With a pattern, of all keys that match. Deletions are not yielded.

        Raises:
            InvalidInput: the value of a matching key is not text.
        """
        buckets = await self._checked(key, pattern=True)
        async with aclosing(buckets.changes(CONTEXT_BUCKET, key)) as entries:
            async for entry in entries:
                if not entry.operation:
                    yield _text(entry.key, entry.value or b"")

    async def list(self, prefix: str = "") -> Entries[bytes]:
        """All keys that begin with `prefix`, with their values."""
        return [
            KVEntry(entry.key, entry.value or b"", entry.revision or 0)
            for entry in await (await self._ready()).entries(CONTEXT_BUCKET, _pattern(prefix))
            if entry.key.startswith(prefix)
        ]

    def cas(self, key: str) -> AbstractAsyncContextManager[Draft[str]]:
        """Read a text, and write it at the end of the block unless it was changed concurrently.

        Raises:
            KVConflict: it was.
        """
        return self._cas(key, _TEXT)

    def try_cas(self, key: str) -> AbstractAsyncContextManager[Draft[str]]:
        """As `cas`, but afterwards `committed` of the draft shows whether it was written."""
        return self._try_cas(key, _TEXT)

    async def put_model(self, key: str, model: BaseModel) -> int:
        """Set a key to a model's JSON; returns its revision."""
        if not isinstance(model, BaseModel):
            raise InvalidInput(f"The value for the key '{key}' is a {type(model).__name__}, not a model.")
        buckets = await self._checked(key)
        return await buckets.put(CONTEXT_BUCKET, key, _model(type(model)).encode(key, model))

    async def get_model(self, key: str, model: type[ModelT]) -> ModelT:
        """The model under a key.

        Raises:
            InvalidInput: the value is not such a model.
        """
        return _model(model).decode(key, (await self._read(key)).value)

    def cas_model(self, key: str, model: type[ModelT]) -> AbstractAsyncContextManager[Draft[ModelT]]:
        """As `cas`, of a model."""
        return self._cas(key, _model(model))

    def try_cas_model(self, key: str, model: type[ModelT]) -> AbstractAsyncContextManager[Draft[ModelT]]:
        """As `try_cas`, of a model."""
        return self._try_cas(key, _model(model))

    async def list_models(self, prefix: str, model: type[ModelT]) -> Entries[ModelT]:
        """All keys that begin with `prefix`, with their models."""
        decode = _model(model).decode
        return [
            KVEntry(entry.key, decode(entry.key, entry.value), entry.revision)
            for entry in await self.list(prefix)
        ]

    @asynccontextmanager
    async def _cas(self, key: str, encoding: _Encoding[T]) -> AsyncIterator[Draft[T]]:
        async with self._try_cas(key, encoding) as draft:
            yield draft
        if not draft.committed:
            raise KVConflict(
                f"The key '{key}' was changed concurrently", details={"key": key, "revision": draft.revision}
            )

    @asynccontextmanager
    async def _try_cas(self, key: str, encoding: _Encoding[T]) -> AsyncIterator[Draft[T]]:
        entry = await self._read(key)
        draft = Draft(key, encoding.decode(key, entry.value), entry.revision)
        yield draft
        value = encoding.encode(key, draft.value)
        if value == encoding.encode(key, encoding.decode(key, entry.value)):
            draft.committed = True
            return
        draft.attempted_write = True
        buckets = await self._ready()
        revision = await buckets.compare_and_set(CONTEXT_BUCKET, key, value, entry.revision)
        if revision is not None:
            draft.committed, draft.revision = True, revision

    async def _read(self, key: str) -> KVEntry[bytes]:
        buckets = await self._checked(key)
        entry = await buckets.get_entry(CONTEXT_BUCKET, key)
        if entry is None:
            raise NotFound(f"There is no key '{key}' in the shared state", details={"key": key})
        return KVEntry(key, entry.value or b"", entry.revision or 0)

    async def _checked(self, key: str, *, pattern: bool = False) -> KVBuckets:
        if reason := subjects.invalid_key(key, pattern=pattern):
            raise InvalidInput(f"{key!r} is not a valid key: {reason}.")
        return await self._ready()


def _pattern(prefix: str) -> str:
    """The narrowest pattern that matches all keys with a prefix: the server matches whole words."""
    words = prefix.rpartition(".")[0]
    return f"{words}.>" if words and not subjects.invalid_key(words) else ">"


def _encode(key: str, value: object) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidInput(f"The value for the key '{key}' cannot be encoded as UTF-8: {exc}.") from exc
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidInput(
        f"The value for the key '{key}' is a {type(value).__name__}. Give text or bytes, or use put_model."
    )


def _text(key: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"The value of '{key}' is not text; read it with list().") from exc


_TEXT: Final[_Encoding[str]] = _Encoding(_text, _encode)


def _model(model: type[ModelT]) -> _Encoding[ModelT]:
    adapter: TypeAdapter[Any] = TypeAdapter(model)

    def decode(key: str, value: bytes) -> ModelT:
        try:
            found: ModelT = adapter.validate_json(value)
        except ValidationError as exc:
            problems = validation_problems(exc)
            raise InvalidInput(
                f"The value of '{key}' is not a {model.__name__}: {problems[0]['msg']}",
                details={"key": key, "errors": problems},
            ) from exc
        return found

    def encode(key: str, value: ModelT) -> bytes:
        try:
            return adapter.dump_json(adapter.validate_python(value), warnings="error")
        except ValueError as exc:
            raise InvalidInput(f"The value for the key '{key}' is not a {model.__name__}: {exc}") from exc

    return _Encoding(decode, encode)
