"""Tokens of an issuer, keys and signers, for tests of the auth plugin."""

import base64
import json
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nkeys
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import Key, OKPKey
from oam_auth import Rule, Settings, SignatureSettings, TokenSettings, User

ISSUER = "https://id.example"
AUDIENCE = "mesh"
KEY = OKPKey.generate_key("Ed25519", parameters={"kid": "first"})
ALL = Rule(name="all", subjects=("*",), agents=(">",), verbs=("call", "stream", "send", "source"))


def claims(**changed: Any) -> dict[str, Any]:
    """Valid claims, with changes; a change to None removes a claim."""
    valid = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 3600, "scope": "a b"}
    return {name: value for name, value in (valid | changed).items() if value is not None}


def token(key: Key = KEY, header: dict[str, Any] | None = None, **changed: Any) -> str:
    """A token that the issuer has signed."""
    head = {"alg": "Ed25519", "kid": key.kid} | (header or {})
    head = {name: value for name, value in head.items() if value is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        return jwt.encode(head, claims(**changed), key, algorithms=[str(head["alg"])])


def bearer(value: str | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token() if value is None else value}"}


def write_keys(path: Path, *keys: Key) -> Path:
    """Write the public parts of keys as a JWK Set."""
    public = [key.as_dict(private=False, use="sig") for key in keys or (KEY,)]
    path.write_text(json.dumps({"keys": public}))
    return path


def token_settings(folder: Path, **changed: Any) -> TokenSettings:
    keys = {"keys": (write_keys(folder / "keys.json"),)} if "keys" not in changed else {}
    return TokenSettings(**{"issuer": ISSUER, "audience": AUDIENCE, **keys, **changed})


def settings(folder: Path, rules: Iterable[Rule] = (ALL,), **changed: Any) -> Settings:
    return Settings(tokens=token_settings(folder), rules=tuple(rules), **changed)


def seed() -> tuple[bytes, str]:
    """A new NKey: its seed and its public key."""
    encoded = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return encoded, nkeys.from_seed(encoded).public_key.decode()


def signers(**users: str) -> SignatureSettings:
    """Settings that accept signatures of these users: public keys by subjects."""
    return SignatureSettings(users={key: User(subject=subject) for subject, key in users.items()})


def unsigned(head: dict[str, Any], body: object) -> str:
    """A token without a signature."""
    parts = (json.dumps(part).encode() for part in (head, body))
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."
