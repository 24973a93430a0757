"""What one configuration protects with: the policy, and what proves who asks."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from joserfc.jwk import Key
from openagentmesh import Call
from pydantic import BaseModel, ConfigDict, ValidationError

from oam_auth.identity import AUTHORIZATION, Identity
from oam_auth.keys import read_file, read_keys
from oam_auth.policy import Policy, Proof, Rule
from oam_auth.settings import Settings, TokenSettings
from oam_auth.signatures import KEY, SIGNATURE, Nonces, Signatures
from oam_auth.tokens import Tokens, refused


class _PolicyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...]


@dataclass(slots=True, frozen=True)
class Guard:
    """Decides about requests. Never changes: what changes on disk makes another one.

    Attributes:
        keys: those that were in files.
        files: what it was read from.

    """

    policy: Policy
    tokens: Tokens | None
    signatures: Signatures | None
    identity: Identity
    keys: tuple[Key, ...] = ()
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: Settings, folder: Path, nonces: Nonces, fetched: Sequence[Key] = ()) -> "Guard":
        """Read all that the settings name; relative paths are within the folder.

        Raises:
            ValueError: something is missing or broken, in words for people.

        """
        rules = settings.rules
        if settings.policy is not None:
            rules += _read_policy(folder / settings.policy.expanduser())
        settings.check_rules(rules)
        tokens, signatures, caller = settings.tokens, settings.signatures, settings.caller
        keys = read_keys(tokens.keys, folder) if tokens else []
        files = [*(tokens.keys if tokens else ()), settings.policy, caller.token_file, caller.nkey_file]
        return cls(
            Policy(rules),
            Tokens(tokens, [*keys, *fetched]) if tokens else None,
            Signatures(signatures, nonces) if signatures else None,
            Identity.of(caller, folder),
            tuple(keys),
            tuple(folder / path.expanduser() for path in files if path is not None),
        )

    def with_fetched(self, settings: TokenSettings, fetched: Sequence[Key]) -> "Guard":
        """The same guard with these keys of the issuer besides those in files."""
        return replace(self, tokens=Tokens(settings, [*self.keys, *fetched]))

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
    given = call.headers.get(AUTHORIZATION) or call.headers.get("authorization")
    if given is None:
        return ""
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise refused("credentials.scheme", "the request's Authorization is no bearer token")
    return token.strip()


def _read_policy(path: Path) -> tuple[Rule, ...]:
    try:
        return _PolicyFile.model_validate(tomllib.loads(read_file(path).decode())).rules
    except ValidationError as exc:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ValueError(f"{path}: {wrong}") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ValueError(f"{path} is no TOML: {exc}") from exc
