"""Verifies the callers of requests, with one state of the configuration and its files."""

import logging
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from joserfc.jwk import Key
from openagentmesh import Call
from pydantic import BaseModel, ConfigDict, ValidationError

from oam_auth.credentials import AUTHORIZATION, Credentials, authorization_names
from oam_auth.file_watch import Stamps, stamps
from oam_auth.keys import read_file, read_keys
from oam_auth.policy import Identity, Policy, Rule
from oam_auth.settings import Settings
from oam_auth.signatures import KEY, SIGNATURE, Nonces, Signatures
from oam_auth.tokens import Tokens, unauthenticated

log = logging.getLogger(__name__)

T = TypeVar("T")


class _PolicyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]


@dataclass(slots=True, frozen=True)
class Authenticator:
    """Verifies callers. Immutable: a changed file makes a new one.

    Attributes:
        tokens: verifies bearer tokens; None if they are not accepted.
        signatures: verifies signed requests; None if they are not accepted.
        credentials: what requests of this node carry.
        keys: the keys of each file.
        stamps: of all files, from before they were read.
    """

    policy: Policy
    tokens: Tokens | None
    signatures: Signatures | None
    credentials: Credentials
    keys: Mapping[Path, tuple[Key, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    stamps: Stamps = ()

    @classmethod
    def load(
        cls,
        settings: Settings,
        folder: Path,
        nonces: Nonces,
        fetched: Sequence[Key] = (),
        previous: "Authenticator | None" = None,
    ) -> "Authenticator":
        """Read all files of the settings; relative paths start at the folder.

        A part that cannot be read is that of `previous`, with an error in the log.

        Raises:
            ValueError: a part is missing or invalid, and there is no previous one.
        """
        tokens, signatures, caller = settings.tokens, settings.signatures, settings.caller
        key_files = tokens.keys if tokens else ()
        named = [*key_files, settings.policy, caller.token_file, caller.nkey_file]
        files = tuple(folder / path.expanduser() for path in named if path is not None)
        before = stamps(files)
        policy, credentials, known = (
            (previous.policy, previous.credentials, previous.keys) if previous else (None, None, {})
        )
        policy = _or_previous(partial(_policy, settings, folder), policy)
        keys = {file: _or_previous(partial(read_keys, file, folder), known.get(file)) for file in key_files}
        credentials = _or_previous(partial(Credentials.load, caller, folder), credentials)
        return cls(
            policy,
            Tokens(tokens, [*chain(*keys.values()), *fetched]) if tokens else None,
            Signatures(signatures, nonces) if signatures else None,
            credentials,
            keys,
            files,
            before,
        )

    @property
    def keys_in_files(self) -> list[Key]:
        """The keys of all files."""
        return list(chain(*self.keys.values()))

    def with_fetched(self, fetched: Sequence[Key]) -> "Authenticator":
        """The same with these keys of the issuer, in addition to those in files."""
        if self.tokens is None:
            return self
        return replace(self, tokens=Tokens(self.tokens.settings, [*self.keys_in_files, *fetched]))

    def use_signature(self, call: Call) -> None:
        """Mark the signature of a verified request as used; raises as `Signatures.use` does."""
        if self.signatures is not None and KEY in call.headers:
            self.signatures.use(call)

    def verify(self, call: Call) -> Identity | None:
        """The verified identity of a caller, None without credentials; raises Unauthenticated."""
        headers, token = call.headers, bearer_token(call)
        is_signed = KEY in headers or SIGNATURE in headers
        if token and is_signed:
            raise unauthenticated(
                "credentials.two", "the request carries a token and a signature; send one of them"
            )
        if token:
            if self.tokens is None:
                raise unauthenticated("credentials.tokens", "bearer tokens are not accepted")
            return self.tokens.verify(token)
        if is_signed:
            if self.signatures is None:
                raise unauthenticated("credentials.signatures", "signatures are not accepted")
            return self.signatures.verify(call)
        return None


def bearer_token(call: Call) -> str:
    """The token of a request, or an empty text; raises Unauthenticated for another Authorization header."""
    found = authorization_names(call.headers)
    if not found:
        return ""
    if found != [AUTHORIZATION]:
        reason = f"the token belongs into one header, spelled {AUTHORIZATION}"
        raise unauthenticated("credentials.header", reason)
    scheme, _, token = call.headers[AUTHORIZATION].partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise unauthenticated("credentials.scheme", "the Authorization header is not a bearer token")
    return token.strip()


def _or_previous(read: Callable[[], T], previous: T | None) -> T:
    try:
        return read()
    except ValueError as exc:
        if previous is None:
            raise
        log.error("auth: the previous state stays in force: %s", exc)  # noqa: TRY400 - not a defect of ours
        return previous


def _policy(settings: Settings, folder: Path) -> Policy:
    rules = settings.rules
    if settings.policy is not None:
        rules += _read_policy(folder / settings.policy.expanduser())
    settings.check_rules(rules)
    return Policy(rules)


def _read_policy(path: Path) -> tuple[Rule, ...]:
    try:
        return _PolicyFile.model_validate(tomllib.loads(read_file(path).decode())).rules
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ValueError(f"{path}: {problems}") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ValueError(f"{path} is not TOML: {exc}") from exc
