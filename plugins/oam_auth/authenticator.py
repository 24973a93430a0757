"""What one configuration protects with: the policy, and what proves who asks."""

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

from oam_auth.credentials import AUTHORIZATION, Identity, spellings
from oam_auth.file_watch import Stamps, stamps
from oam_auth.keys import read_file, read_keys
from oam_auth.policy import Policy, Proof, Rule
from oam_auth.settings import Settings, TokenSettings
from oam_auth.signatures import KEY, SIGNATURE, Nonces, Signatures
from oam_auth.tokens import Tokens, refused

log = logging.getLogger(__name__)

T = TypeVar("T")


class _PolicyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]


@dataclass(slots=True, frozen=True)
class Guard:
    """Decides about requests. Never changes: what changes on disk makes another one.

    Attributes:
        keys: those that were in each file.
        files: what it was read from.
        stamps: what identified them just before.

    """

    policy: Policy
    tokens: Tokens | None
    signatures: Signatures | None
    identity: Identity
    keys: Mapping[Path, tuple[Key, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    stamps: Stamps = ()

    @classmethod
    def of(
        cls,
        settings: Settings,
        folder: Path,
        nonces: Nonces,
        fetched: Sequence[Key] = (),
        before: "Guard | None" = None,
    ) -> "Guard":
        """Read all that the settings name; relative paths are within the folder.

        Each part that is broken now is as it was `before`, and the log says why.

        Raises:
            ValueError: something is missing or broken, and nothing was before; in words for people.

        """
        tokens, signatures, caller = settings.tokens, settings.signatures, settings.caller
        key_files = tokens.keys if tokens else ()
        named = [*key_files, settings.policy, caller.token_file, caller.nkey_file]
        files = tuple(folder / path.expanduser() for path in named if path is not None)
        seen = stamps(files)
        policy = _or_before(partial(_policy, settings, folder), before.policy if before else None)
        keys = {
            file: _or_before(partial(read_keys, file, folder), before.keys.get(file) if before else None)
            for file in key_files
        }
        identity = _or_before(partial(Identity.of, caller, folder), before.identity if before else None)
        return cls(
            policy,
            Tokens(tokens, [*chain(*keys.values()), *fetched]) if tokens else None,
            Signatures(signatures, nonces) if signatures else None,
            identity,
            keys,
            files,
            seen,
        )

    @property
    def keys_in_files(self) -> list[Key]:
        """The keys that were in all files together."""
        return list(chain(*self.keys.values()))

    def with_fetched(self, settings: TokenSettings, fetched: Sequence[Key]) -> "Guard":
        """The same guard with these keys of the issuer besides those in files."""
        return replace(self, tokens=Tokens(settings, [*self.keys_in_files, *fetched]))

    def use_up(self, call: Call) -> None:
        """Let a signature that was believed not count again.

        Raises:
            Unauthenticated: it has been used before.
            Overloaded: too many of this signer came to remember them all.

        """
        if self.signatures is not None and KEY in call.headers:
            self.signatures.use_up(call)

    def prove(self, call: Call) -> Proof | None:
        """Who is proven to ask; None for nobody, who says nothing.

        Raises:
            Unauthenticated: what the request says of who asks does not count.

        """
        headers, token = call.headers, bearer_token(call)
        signed = KEY in headers or SIGNATURE in headers
        if token and signed:
            raise refused(
                "credentials.two", "the request carries a token and a signature; one of them is wanted"
            )
        if token:
            if self.tokens is None:
                raise refused("credentials.tokens", "bearer tokens do not count here")
            return self.tokens.prove(token)
        if signed:
            if self.signatures is None:
                raise refused("credentials.signatures", "signatures do not count here")
            return self.signatures.prove(call)
        return None


def bearer_token(call: Call) -> str:
    """The token of a request; empty when it has none.

    Raises:
        Unauthenticated: its Authorization is something else.

    """
    found = spellings(call.headers)
    if not found:
        return ""
    if found != [AUTHORIZATION]:
        why = f"the request's token stands in the header {AUTHORIZATION}, in these letters and nowhere else"
        raise refused("credentials.header", why)
    given = call.headers[AUTHORIZATION]
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise refused("credentials.scheme", "the request's Authorization is no bearer token")
    return token.strip()


def _or_before(read: Callable[[], T], before: T | None) -> T:
    """What is read now, else what was read before."""
    try:
        return read()
    except ValueError as exc:
        if before is None:
            raise
        log.error("auth: what was read before stays in force: %s", exc)  # noqa: TRY400 - no bug of ours
        return before


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
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ValueError(f"{path}: {wrong}") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ValueError(f"{path} is no TOML: {exc}") from exc
