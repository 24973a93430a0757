"""Bearer tokens: JWTs signed by the issuer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from joserfc import jws, jwt
from joserfc.errors import (
    BadSignatureError,
    ClaimError,
    ExpiredTokenError,
    InvalidClaimError,
    JoseError,
    MissingClaimError,
    UnsupportedAlgorithmError,
)
from joserfc.jwk import Key
from joserfc.jws import JWSRegistry
from openagentmesh import Unauthenticated

from oam_auth.policy import Identity
from oam_auth.settings import TokenSettings

_MAX_TOKEN: Final = 16 * 1024
_MAX_SUBJECT: Final = 256
_MAX_CACHED_TOKENS: Final = 10_000


def unauthenticated(rule: str, reason: str) -> Unauthenticated:
    """The refusal of credentials; `rule` names the failed check for programs."""
    return Unauthenticated(f"{reason[0].upper()}{reason[1:]}.", details={"rule": rule})


@dataclass(slots=True, frozen=True)
class Verified:
    """The identity of a token, and when it is valid, in seconds since 1970."""

    identity: Identity
    begins: float
    ends: float


class Tokens:
    """Verifies tokens with a set of keys."""

    def __init__(self, settings: TokenSettings, keys: Sequence[Key]) -> None:
        self.settings = settings
        self._keys = tuple(keys)
        self._verified = lru_cache(maxsize=_MAX_CACHED_TOKENS)(self._verify)

    def verify(self, token: str) -> Identity:
        """The identity of a token; raises Unauthenticated, with the failed check as its `rule`."""
        now, leeway = time.time(), self.settings.leeway
        verified = self._verified(token)
        if now >= verified.ends + leeway:
            raise unauthenticated("token.expired", "the token has expired")
        if now < verified.begins - leeway:
            raise unauthenticated("token.not_yet", "the token is not valid yet")
        return verified.identity

    def is_fetch_useless(self, token: str) -> bool:
        """Whether fetching keys is useless for a token: its key is known, or it is malformed."""
        try:
            return bool(self._candidates(_header_of(token)))
        except Unauthenticated:
            return True

    def _verify(self, token: str) -> Verified:
        header = _header_of(token)
        algorithm = header.get("alg")
        if algorithm not in self.settings.algorithms:
            raise unauthenticated("token.algorithm", "the token's algorithm is not accepted")
        candidates = self._candidates(header)
        if not candidates:
            raise unauthenticated("token.key", "the token is signed with an unknown key")
        for key in candidates:
            if (claims := _claims(token, key, str(algorithm))) is not None:
                return self._checked(claims)
        raise unauthenticated("token.signature", "the token's signature is wrong")

    def _candidates(self, header: dict[str, Any]) -> list[Key]:
        """The keys that may have signed a token: those with its `kid`, else those without one."""
        kid = header.get("kid")
        if kid is None:
            return list(self._keys)
        return [key for key in self._keys if key.kid == kid] or [key for key in self._keys if not key.kid]

    def _checked(self, claims: dict[str, Any]) -> Verified:
        expected = self.settings
        registry = jwt.JWTClaimsRegistry(
            leeway=int(expected.leeway),
            iss={"essential": True, "value": expected.issuer},
            aud={"essential": True, "value": expected.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise unauthenticated("token.expired", "the token has expired") from None
        except MissingClaimError as exc:
            raise unauthenticated(f"token.{exc.claim}", f"the token has no '{exc.claim}'") from None
        except InvalidClaimError as exc:
            problem = "is in the future" if exc.claim in {"nbf", "iat"} else "has another value than expected"
            raise unauthenticated(f"token.{exc.claim}", f"the token's '{exc.claim}' {problem}") from None
        except ClaimError as exc:
            raise unauthenticated("token.claims", f"the token's claims are invalid: {exc.error}") from None
        subject, scopes = claims["sub"], claims.get(expected.scopes, "")
        if not subject.isprintable() or not 0 < len(subject) <= _MAX_SUBJECT:
            raise unauthenticated("token.sub", "the token's 'sub' is invalid")
        scopes = scopes.split() if isinstance(scopes, str) else scopes
        if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
            raise unauthenticated(
                "token.scopes", f"the token's '{expected.scopes}' is neither text nor a list of texts"
            )
        try:
            begins, ends = float(claims.get("nbf", 0)), float(claims["exp"])
        except OverflowError:
            raise unauthenticated("token.exp", "the token's 'exp' is invalid") from None
        return Verified(Identity(subject, frozenset(scopes)), begins, ends)


def _header_of(token: str) -> dict[str, Any]:
    """A token's header, which is not verified yet."""
    malformed = unauthenticated("token.malformed", "the bearer token is not a JWT")
    if len(token) > _MAX_TOKEN:
        raise malformed
    try:
        return dict(jws.extract_compact(token.encode()).headers())
    # Unverified bytes of any kind.
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        raise malformed from None


class _Registry(JWSRegistry):
    """Accepts the algorithms of mesh.toml only.

    The library's own registry warns about "EdDSA", which has a newer name but which issuers use; filtering
    the warning would affect all threads.
    """

    def get_alg(self, name: str) -> Any:  # noqa: ANN401 - the library does not export its type
        """The algorithm of this name, if it is accepted."""
        if name not in (self.allowed or ()) or name not in self.algorithms:
            raise UnsupportedAlgorithmError(f"Algorithm of '{name}' is not allowed")
        return self.algorithms[name]


def _claims(token: str, key: Key, algorithm: str) -> dict[str, Any] | None:
    """The claims of a token that this key has signed; None for another key."""
    try:
        key.check_alg(algorithm)
        return dict(jwt.decode(token, key, registry=_Registry(algorithms=[algorithm])).claims)
    except BadSignatureError:
        return None
    # A key of another type, an unknown critical header, malformed claims.
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        return None
