"""Signed requests: each carries a signature by an NKey, which is accepted once."""

import base64
import binascii
import hashlib
import secrets
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import nkeys
from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey
from openagentmesh import Call, ClientOperation, Overloaded

from oam_auth.policy import Identity
from oam_auth.settings import SignatureSettings
from oam_auth.tokens import unauthenticated

KEY: Final = "X-Mesh-Nkey"
VERB: Final = "X-Mesh-Nkey-Verb"
TIME: Final = "X-Mesh-Nkey-Time"
NONCE: Final = "X-Mesh-Nkey-Nonce"
SIGNATURE: Final = "X-Mesh-Nkey-Signature"
_REQUEST_ID: Final = "X-Mesh-Request-Id"
# The first line of what is signed, so that the signature is valid for nothing else.
_KIND: Final = "openagentmesh request 1"
_MAX_NONCE: Final = 64
_MAX_TIME_DIGITS: Final = 15
_MILLISECONDS: Final = 1000
_PUBLIC_KEY_BYTES: Final = 35


class Signer:
    """Signs operations with one NKey; ValueError for an invalid seed."""

    def __init__(self, seed: bytes) -> None:
        try:
            self._pair = nkeys.from_seed(seed)
        except (nkeys.NkeysError, ValueError, TypeError) as exc:  # the library's message may quote it
            raise ValueError("it is not an NKey seed, a line that begins with SU") from exc
        self.key: str = self._pair.public_key.decode()

    def sign(self, operation: ClientOperation) -> None:
        """Add the headers of a signature."""
        headers = operation.headers
        headers[KEY], headers[VERB] = self.key, operation.verb
        headers[TIME] = str(int(time.time() * _MILLISECONDS))
        headers[NONCE] = secrets.token_urlsafe(16)
        signature = self._pair.sign(_signed(headers, operation.subject, operation.body))
        headers[SIGNATURE] = base64.urlsafe_b64encode(signature).decode()


def _signed(headers: Mapping[str, str], subject: str, body: bytes) -> bytes:
    """What is signed: lines with the subject, verb, request id, time, nonce, and the body's digest."""
    values = (headers.get(name, "") for name in (VERB, _REQUEST_ID, TIME, NONCE))
    return "\n".join((_KIND, subject, *values, hashlib.sha256(body).hexdigest())).encode()


@dataclass(slots=True)
class _Used:
    """The `nonces` that one key has used: by agent and nonce when it was signed, and until when it is kept.

    `dropped` is when the latest one that is no longer kept was signed.
    """

    nonces: OrderedDict[tuple[str, str], tuple[float, float]] = field(default_factory=OrderedDict)
    dropped: float = 0.0


class Nonces:
    """The used signatures; none is dropped while it would be accepted."""

    def __init__(self) -> None:
        self._used: defaultdict[str, _Used] = defaultdict(_Used)

    def use(  # noqa: PLR0913 - the parts of a signature, and two bounds
        self, agent: str, key: str, nonce: str, *, signed: float, window: float, limit: int
    ) -> None:
        """Remember a nonce, which may be used once for each agent: several may receive one message.

        It is accepted for `window` seconds before and after `signed`, in seconds since 1970. At most `limit`
        nonces of one key are remembered.

        Raises:
            Unauthenticated: it has been used, or may have been.
            Overloaded: no more can be remembered.
        """
        used, now = self._used[key], time.monotonic()
        while used.nonces and (oldest := next(iter(used.nonces.values())))[1] <= now:
            used.nonces.popitem(last=False)
            used.dropped = max(used.dropped, oldest[0])
        # With a wider window, or another clock, a dropped one would be accepted again.
        if (agent, nonce) in used.nonces or signed <= used.dropped:
            raise unauthenticated("signature.replayed", "this signature has been used before")
        if len(used.nonces) >= limit:
            wait = next(iter(used.nonces.values()))[1] - now
            raise Overloaded(
                f"At most {limit} signed requests of one key in {2 * window:g} s are accepted. "
                "Try again later.",
                details={"retry_after_ms": int(wait * _MILLISECONDS) + 1},
            )
        # Its clock may be ahead by a window, and it is accepted until it is a window old.
        used.nonces[agent, nonce] = signed, now + 2 * window


class Signatures:
    """Verifies signed requests; ValueError if a user's key is not a public NKey."""

    def __init__(self, settings: SignatureSettings, nonces: Nonces) -> None:
        self._settings, self._nonces = settings, nonces
        self._users = {
            key: (_verify_key(key, user.subject), Identity(user.subject, frozenset(user.scopes)))
            for key, user in settings.users.items()
        }

    def verify(self, call: Call) -> Identity:
        """The identity of a request's signer; raises Unauthenticated, with the failed check as its `rule`."""
        headers, window = call.headers, self._settings.window
        key, nonce = headers.get(KEY, ""), headers.get(NONCE, "")
        # A source does not know the verb of the message's sender.
        if headers.get(VERB) != call.verb and call.verb != "source":
            raise unauthenticated("signature.verb", f"the signature is not for a {call.verb}")
        if not 0 < len(nonce) <= _MAX_NONCE:
            raise unauthenticated(
                "signature.nonce", f"the signature's nonce must have 1 to {_MAX_NONCE} characters"
            )
        if abs(time.time() - _seconds(headers.get(TIME, ""))) > window:
            raise unauthenticated(
                "signature.time", f"the signature is older than {window:g} seconds, or from the future"
            )
        if key not in self._users:
            raise unauthenticated("signature.key", "the request is signed with an unknown key")
        verify_key, identity = self._users[key]
        try:
            signature = base64.b64decode(headers.get(SIGNATURE, ""), altchars=b"-_", validate=True)
            verify_key.verify(_signed(headers, call.subject, call.body), signature)
        except (CryptoError, ValueError):
            raise unauthenticated("signature.wrong", "the request's signature is wrong") from None
        return identity

    def use(self, call: Call) -> None:
        """Mark a verified signature as used; raises as `Nonces.use` does."""
        key, nonce, signed = (call.headers[name] for name in (KEY, NONCE, TIME))
        window, limit = self._settings.window, self._settings.remembered
        self._nonces.use(call.agent, key, nonce, signed=_seconds(signed), window=window, limit=limit)


def _seconds(text: str) -> float:
    """Milliseconds since 1970 as seconds; 0 for anything else."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_TIME_DIGITS
    return int(text) / _MILLISECONDS if is_number else 0.0


def _verify_key(public: str, subject: str) -> VerifyKey:
    """The key of a user's public NKey: a byte for its type, 32 for the key, 2 for the checksum."""
    try:
        decoded = base64.b32decode(public.encode())
    except (binascii.Error, ValueError):
        decoded = b""
    is_valid = len(decoded) == _PUBLIC_KEY_BYTES and nkeys.crc16_checksum(decoded[:-2]) == decoded[-2:]
    if not is_valid or decoded[0] != nkeys.PREFIX_BYTE_USER:
        # Not quoted: it may be the seed.
        raise ValueError(f"signatures.users: the key of '{subject}' is not a public NKey of a user (U…)")
    return VerifyKey(decoded[1:-2])
