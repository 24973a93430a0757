"""What one configuration protects with: the policy, and what proves who asks."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from joserfc.jwk import Key
from openagentmesh import Call
from pydantic import BaseModel, ConfigDict, ValidationError

from oam_auth.following import Stamps, stamps
from oam_auth.identity import AUTHORIZATION, Identity, spellings
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
        stamps: what identified them just before.

    """

    policy: Policy
    tokens: Tokens | None
    signatures: Signatures | None
    identity: Identity
    keys: tuple[Key, ...] = ()
    files: tuple[Path, ...] = ()
    stamps: Stamps = ()

    @classmethod
    def of(cls, settings: Settings, folder: Path, nonces: Nonces, fetched: Sequence[Key] = ()) -> "Guard":
        """Read all that the settings name; relative paths are within the folder.

        Raises:
            ValueError: something is missing or broken, in words for people.

        """
        tokens, signatures, caller = settings.tokens, settings.signatures, settings.caller
        named = [*(tokens.keys if tokens else ()), settings.policy, caller.token_file, caller.nkey_file]
        files = tuple(folder / path.expanduser() for path in named if path is not None)
        before = stamps(files)
        rules = settings.rules
        if settings.policy is not None:
            rules += _read_policy(folder / settings.policy.expanduser())
        settings.check_rules(rules)
        keys = read_keys(tokens.keys, folder) if tokens else []
        return cls(
            Policy(rules),
            Tokens(tokens, [*keys, *fetched]) if tokens else None,
            Signatures(signatures, nonces) if signatures else None,
            Identity.of(caller, folder),
            tuple(keys),
            files,
            before,
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


def _read_policy(path: Path) -> tuple[Rule, ...]:
    try:
        return _PolicyFile.model_validate(tomllib.loads(read_file(path).decode())).rules
    except ValidationError as exc:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ValueError(f"{path}: {wrong}") from exc
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ValueError(f"{path} is no TOML: {exc}") from exc
