"""Bearer tokens: JWTs that the issuer has signed."""

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

from oam_auth.policy import Proof
from oam_auth.settings import TokenSettings

_LONGEST: Final = 16 * 1024
_LONGEST_SUBJECT: Final = 256
# Tokens that were verified and need not be again.
_MOST_VERIFIED: Final = 10_000


def refused(rule: str, why: str) -> Unauthenticated:
    """The refusal of credentials; `rule` says for programs which check they failed."""
    return Unauthenticated(f"{why[0].upper()}{why[1:]}.", details={"rule": rule})


@dataclass(slots=True, frozen=True)
class Verified:
    """What a token proves, and from when to when, in seconds since 1970."""

    proof: Proof
    begins: float
    ends: float


class Tokens:
    """Verifies tokens with a set of keys."""

    def __init__(self, settings: TokenSettings, keys: Sequence[Key]) -> None:
        self._settings = settings
        self._keys = tuple(keys)
        self._verified = lru_cache(maxsize=_MOST_VERIFIED)(self._verify)

    def prove(self, token: str) -> Proof:
        """Whom a token proves.

        Raises:
            Unauthenticated: it does not count; `details["rule"]` says why.

        """
        now, leeway = time.time(), self._settings.leeway
        verified = self._verified(token)
        if now >= verified.ends + leeway:
            raise refused("token.expired", "the token has expired")
        if now < verified.begins - leeway:
            raise refused("token.not_yet", "the token does not count yet")
        return verified.proof

    def knows_key_of(self, token: str) -> bool:
        """Whether a key may be the one that a token names; garbage names none that could be fetched."""
        try:
            return bool(self._candidates(_header_of(token)))
        except Unauthenticated:
            return True

    def _verify(self, token: str) -> Verified:
        header = _header_of(token)
        algorithm = header.get("alg")
        if algorithm not in self._settings.algorithms:
            raise refused("token.algorithm", "the token's algorithm is not one of those allowed")
        candidates = self._candidates(header)
        if not candidates:
            raise refused("token.key", "the token is signed with a key that is not known here")
        for key in candidates:
            claims = _claims(token, key, str(algorithm))
            if claims is not None:
                return self._checked(claims)
        raise refused("token.signature", "the token's signature is wrong")

    def _candidates(self, header: dict[str, Any]) -> list[Key]:
        """The keys that a token may be signed with: the one it names, else those without a name."""
        named = header.get("kid")
        if named is None:
            return list(self._keys)
        return [key for key in self._keys if key.kid == named] or [key for key in self._keys if not key.kid]

    def _checked(self, claims: dict[str, Any]) -> Verified:
        wanted = self._settings
        registry = jwt.JWTClaimsRegistry(
            leeway=int(wanted.leeway),
            iss={"essential": True, "value": wanted.issuer},
            aud={"essential": True, "value": wanted.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise refused("token.expired", "the token has expired") from None
        except MissingClaimError as exc:
            raise refused(f"token.{exc.claim}", f"the token has no '{exc.claim}'") from None
        except InvalidClaimError as exc:
            raise refused(
                f"token.{exc.claim}", f"the token's '{exc.claim}' is not what is wanted here"
            ) from None
        except ClaimError as exc:
            raise refused("token.claims", f"the token's claims do not count: {exc.error}") from None
        subject, scopes = claims["sub"], claims.get(wanted.scopes, "")
        if not subject.isprintable() or not 0 < len(subject) <= _LONGEST_SUBJECT:
            raise refused("token.sub", "the token's 'sub' is not what is wanted here")
        scopes = scopes.split() if isinstance(scopes, str) else scopes
        if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
            raise refused(
                "token.scopes", f"the token's '{wanted.scopes}' is neither a text nor a list of texts"
            )
        try:
            begins, ends = float(claims.get("nbf", 0)), float(claims["exp"])
        except OverflowError:
            raise refused("token.exp", "the token's 'exp' is not what is wanted here") from None
        return Verified(Proof(subject, frozenset(scopes)), begins, ends)


def _header_of(token: str) -> dict[str, Any]:
    """What a token says of itself, which nothing has proven yet."""
    malformed = refused("token.malformed", "what came as a bearer token is no JWT")
    if len(token) > _LONGEST:
        raise malformed
    try:
        return dict(jws.extract_compact(token.encode()).headers())
    # The bytes are a stranger's.
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        raise malformed from None


class _Registry(JWSRegistry):
    """Takes the algorithms that mesh.toml allows, and those only.

    The library's own one warns of "EdDSA", which has a newer name; issuers use the old one, and to
    keep a warning quiet is to change what holds for all threads.
    """

    def get_alg(self, name: str) -> Any:  # noqa: ANN401 - the library does not export its type
        """The algorithm of this name.

        Raises:
            UnsupportedAlgorithmError: it is not allowed.

        """
        if name not in (self.allowed or ()) or name not in self.algorithms:
            raise UnsupportedAlgorithmError(f"Algorithm of '{name}' is not allowed")
        return self.algorithms[name]


def _claims(token: str, key: Key, algorithm: str) -> dict[str, Any] | None:
    """The claims of a token that this key has signed; None when another one has."""
    try:
        key.check_alg(algorithm)
        return dict(jwt.decode(token, key, registry=_Registry(algorithms=[algorithm])).claims)
    except BadSignatureError:
        return None
    # A key of another kind, a header that has to be understood and is not, claims that are none.
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        return None
