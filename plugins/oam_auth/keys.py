"""The keys of whoever issues tokens: from files, and from where they are published."""

import json
import time
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Final, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, Key, OctKey, OKPKey, RSAKey

# A set of keys is not larger than this, in bytes, nor has it more keys.
_LARGEST: Final = 1024 * 1024
_MOST_KEYS: Final = 100
# How long it may take to fetch keys, in seconds.
_PATIENCE: Final = 5.0


def read_keys(file: Path, folder: Path) -> tuple[Key, ...]:
    """The keys in a file, whose relative path is within the folder.

    Raises:
        ValueError: it cannot be read, or holds no key that can be used.

    """
    return tuple(_keys_of(str(file), read_file(folder / file.expanduser())))


def read_file(path: Path) -> bytes:
    """What a small file holds.

    Raises:
        ValueError: it is not there, cannot be read, or is too large.

    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(content) > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST} bytes")
    return content


def fetch_keys(url: str) -> list[Key]:
    """The keys that are published at an address; blocks for seconds when nobody answers.

    Raises:
        ValueError: there are none, in words for people.

    """
    # What is not encrypted stays on this machine, whatever proxy the environment names.
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).scheme == "http" else []
    opener = urllib.request.build_opener(_NoRedirects, *direct)
    try:
        with opener.open(url, timeout=_PATIENCE) as answer:
            content = _read(answer)
    except HTTPError as exc:
        with exc:  # it holds the connection
            raise ValueError(f"the keys cannot be fetched from {url}: {exc}") from None
    except (OSError, HTTPException) as exc:
        raise ValueError(f"the keys cannot be fetched from {url}: {exc}") from exc
    if len(content) > _LARGEST:
        raise ValueError(f"what {url} answers is larger than {_LARGEST} bytes")
    return _keys_of(url, content)


def _read(answer: HTTPResponse) -> bytes:
    """What is answered, as far as it is wanted, if it comes in time."""
    until, content = time.monotonic() + _PATIENCE, b""
    while len(content) <= _LARGEST and (more := answer.read1(_LARGEST)):
        content += more
        if time.monotonic() > until:
            raise TimeoutError(f"the answer takes longer than {_PATIENCE:g} s")
    return content


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Keys come from where the configuration says, and from nowhere else."""

    def redirect_request(self, *asked: Any, **_: Any) -> NoReturn:  # noqa: ANN401 - as it is called
        answer: IO[bytes] = asked[1]
        answer.close()
        raise OSError(f"it redirects to {asked[-1]}; give that address if the keys are there")


def _keys_of(where: str, content: bytes) -> list[Key]:
    if content.count(b"-----BEGIN") > 1:
        raise ValueError(f"{where} holds several keys or certificates; a PEM file with one key is wanted")
    try:
        found = _from_pem(content) if b"-----BEGIN" in content else _from_json(content)
    except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # The library's words may quote the key.
        raise ValueError(
            f"{where} holds no key that can be used: a JWK, a JWK Set or a PEM is wanted"
        ) from None
    if not found or len(found) > _MOST_KEYS:
        raise ValueError(f"{where} holds {len(found)} keys to verify with; 1 to {_MOST_KEYS} are wanted")
    if any(key.is_private and not isinstance(key, OctKey) for key in found):
        raise ValueError(
            f"{where} holds a private key: only who issues tokens should have it. Give the public one"
        )
    return found


def _from_json(content: bytes) -> list[Key]:
    read: Any = json.loads(content)
    entries = read.get("keys", [read])
    # As the standard wants: others in a set are ignored, such as keys to encrypt, or of kinds yet unknown.
    usable = [entry for entry in entries if entry.get("use", "sig") == "sig" and _verifies(entry)]
    found, why = [], None
    for entry in usable:
        try:
            found.append(JWKRegistry.import_key(entry))
        except (JoseError, ValueError, TypeError, KeyError) as exc:
            why = exc
    if why is not None and not found:
        raise why
    return found


def _verifies(entry: dict[str, Any]) -> bool:
    return entry.get("kty") in JWKRegistry.key_types and "verify" in entry.get("key_ops", ["verify"])


def _from_pem(content: bytes) -> list[Key]:
    for kind in (RSAKey, ECKey, OKPKey):
        try:
            return [kind.import_key(content)]
        except (JoseError, ValueError, TypeError):
            continue  # a key of another kind
    raise ValueError
