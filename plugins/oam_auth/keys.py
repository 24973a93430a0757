"""The issuer's keys: from files, and from its URL."""

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

_MAX_BYTES: Final = 1024 * 1024
_MAX_KEYS: Final = 100
_FETCH_TIMEOUT_S: Final = 5.0


def read_keys(file: Path, folder: Path) -> tuple[Key, ...]:
    """The keys in a file; ValueError if it cannot be read, or contains no usable key."""
    return tuple(_keys_of(str(file), read_file(folder / file.expanduser())))


def read_file(path: Path) -> bytes:
    """The content of a small file; ValueError if it is missing, cannot be read, or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes")
    return content


def fetch_keys(url: str) -> list[Key]:
    """The keys at a URL; blocks for some seconds. ValueError if they cannot be fetched, or none is usable."""
    # Unencrypted requests stay on this machine, whatever proxy the environment names.
    direct = [urllib.request.ProxyHandler({})] if urlsplit(url).scheme == "http" else []
    opener = urllib.request.build_opener(_NoRedirects, *direct)
    try:
        with opener.open(url, timeout=_FETCH_TIMEOUT_S) as response:
            content = _read(response)
    except HTTPError as exc:
        with exc:  # it holds the connection
            raise ValueError(f"the keys cannot be fetched from {url}: {exc}") from None
    except (OSError, HTTPException) as exc:
        raise ValueError(f"the keys cannot be fetched from {url}: {exc}") from exc
    if len(content) > _MAX_BYTES:
        raise ValueError(f"the answer of {url} is larger than {_MAX_BYTES} bytes")
    return _keys_of(url, content)


def _read(response: HTTPResponse) -> bytes:
    """The body of a response, up to the maximum, if it arrives in time."""
    deadline, content = time.monotonic() + _FETCH_TIMEOUT_S, b""
    while len(content) <= _MAX_BYTES and (more := response.read1(_MAX_BYTES)):
        content += more
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer takes longer than {_FETCH_TIMEOUT_S:g} s")
    return content


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: keys come from the configured URL only."""

    def redirect_request(self, *arguments: Any, **_: Any) -> NoReturn:  # noqa: ANN401 - as urllib calls it
        response: IO[bytes] = arguments[1]
        response.close()
        raise OSError(f"it redirects to {arguments[-1]}; configure that url if it is the right one")


def _keys_of(source: str, content: bytes) -> list[Key]:
    if content.count(b"-----BEGIN") > 1:
        raise ValueError(f"{source} contains several keys or certificates; expected a PEM file with one key")
    try:
        found = _from_pem(content) if b"-----BEGIN" in content else _from_json(content)
    except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # The library's message may quote the key.
        raise ValueError(f"{source} contains no usable key; expected a JWK, a JWK Set or a PEM") from None
    if not found or len(found) > _MAX_KEYS:
        raise ValueError(f"{source} contains {len(found)} keys to verify with; expected 1 to {_MAX_KEYS}")
    if any(key.is_private and not isinstance(key, OctKey) for key in found):
        raise ValueError(
            f"{source} contains a private key, which only the issuer should have. Give the public one"
        )
    return found


def _from_json(content: bytes) -> list[Key]:
    loaded: Any = json.loads(content)
    entries = loaded.get("keys", [loaded])
    # By the standard, other keys of a set are ignored: keys to encrypt, or of unknown types.
    usable = [entry for entry in entries if entry.get("use", "sig") == "sig" and _verifies(entry)]
    found, error = [], None
    for entry in usable:
        try:
            found.append(JWKRegistry.import_key(entry))
        except (JoseError, ValueError, TypeError, KeyError) as exc:
            error = exc
    if error is not None and not found:
        raise error
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
