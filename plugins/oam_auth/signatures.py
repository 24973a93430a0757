"""Signed requests: each one carries an NKey's signature of itself, which counts once."""

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
from openagentmesh import Call, Outgoing, Overloaded

from oam_auth.policy import Proof
from oam_auth.settings import SignatureSettings
from oam_auth.tokens import refused

KEY: Final = "X-Mesh-Nkey"
VERB: Final = "X-Mesh-Nkey-Verb"
TIME: Final = "X-Mesh-Nkey-Time"
NONCE: Final = "X-Mesh-Nkey-Nonce"
SIGNATURE: Final = "X-Mesh-Nkey-Signature"
_REQUEST_ID: Final = "X-Mesh-Request-Id"
# The first line of what is signed, so that it is never mistaken for anything else.
_KIND: Final = "openagentmesh request 1"
_LONGEST_NONCE: Final = 64
_LONGEST_TIME: Final = 15
_MILLISECONDS: Final = 1000
# Bytes of a public NKey.
_LENGTH: Final = 35


class Signer:
    """Signs what leaves with one NKey.

    Raises:
        ValueError: the seed is none.

    """

    def __init__(self, seed: bytes) -> None:
        try:
            self._pair = nkeys.from_seed(seed)
        except (nkeys.NkeysError, ValueError, TypeError) as exc:  # the library's words may quote it
            raise ValueError("it holds no NKey seed, a line that begins with SU") from exc
        self.key: str = self._pair.public_key.decode()

    def sign(self, outgoing: Outgoing) -> None:
        """Add the headers of a signature."""
        headers = outgoing.headers
        headers[KEY], headers[VERB] = self.key, outgoing.verb
        headers[TIME] = str(int(time.time() * _MILLISECONDS))
        headers[NONCE] = secrets.token_urlsafe(16)
        signature = self._pair.sign(_signed(headers, outgoing.subject, outgoing.body))
        headers[SIGNATURE] = base64.urlsafe_b64encode(signature).decode()


def _signed(headers: Mapping[str, str], subject: str, body: bytes) -> bytes:
    """What is signed: lines with the subject, the verb, the request's id, the time, the nonce, the body."""
    told = (headers.get(name, "") for name in (VERB, _REQUEST_ID, TIME, NONCE))
    return "\n".join((_KIND, subject, *told, hashlib.sha256(body).hexdigest())).encode()


@dataclass(slots=True)
class _Used:
    """The nonces that one key has used, with when each was signed and until when it is remembered.

    Attributes:
        nonces: by the agent that was asked, and the nonce.
        forgotten: when the last of those that are not remembered any more was signed.

    """

    nonces: OrderedDict[tuple[str, str], tuple[float, float]] = field(default_factory=OrderedDict)
    forgotten: float = 0.0


class Nonces:
    """Which signatures have been used; none is forgotten that would still count."""

    def __init__(self) -> None:
        self._used: defaultdict[str, _Used] = defaultdict(_Used)

    def use(  # noqa: PLR0913 - all that makes a signature what it is, and two bounds
        self, agent: str, key: str, nonce: str, *, signed: float, window: float, most: int
    ) -> None:
        """Remember a nonce of a key, which may be used once for each agent: several may hear one message.

        Args:
            agent: who was asked.
            key: who signed.
            nonce: what makes the signature another one.
            signed: when it was signed, in seconds since 1970.
            window: for how many seconds it counts, before and after that.
            most: how many are remembered of one key.

        Raises:
            Unauthenticated: it has been used, or may have been.
            Overloaded: too many are remembered; what could not be remembered must not count.

        """
        used, now = self._used[key], time.monotonic()
        while used.nonces and (oldest := next(iter(used.nonces.values())))[1] <= now:
            used.nonces.popitem(last=False)
            used.forgotten = max(used.forgotten, oldest[0])
        # With a wider window, or another clock, one that was forgotten would count again.
        if (agent, nonce) in used.nonces or signed <= used.forgotten:
            raise refused("signature.replayed", "this signature has been used before")
        if len(used.nonces) >= most:
            left = next(iter(used.nonces.values()))[1] - now
            raise Overloaded(
                f"{most} signed requests of one key in {2 * window:g} s are all that are remembered. "
                "Try again later.",
                details={"retry_after_ms": int(left * _MILLISECONDS) + 1},
            )
        # Its clock may be ahead by a window, and it counts until it is a window old.
        used.nonces[agent, nonce] = signed, now + 2 * window


class Signatures:
    """Verifies signed requests.

    Raises:
        ValueError: a user's key is no public NKey.

    """

    def __init__(self, settings: SignatureSettings, nonces: Nonces) -> None:
        self._settings = settings
        self._nonces = nonces
        self._users = {
            key: (_verify_key(key, user.subject), Proof(user.subject, frozenset(user.scopes)))
            for key, user in settings.users.items()
        }

    def prove(self, call: Call) -> Proof:
        """Whom a request's signature proves.

        Raises:
            Unauthenticated: it does not count; `details["rule"]` says why.

        """
        headers, window = call.headers, self._settings.window
        key, nonce = headers.get(KEY, ""), headers.get(NONCE, "")
        # Who is driven by a message does not know what its sender called it.
        if headers.get(VERB) != call.verb and call.verb != "source":
            raise refused("signature.verb", f"what was signed is no {call.verb}")
        if not 0 < len(nonce) <= _LONGEST_NONCE:
            raise refused("signature.nonce", f"the signature's nonce has 1 to {_LONGEST_NONCE} characters")
        if abs(time.time() - _seconds(headers.get(TIME, ""))) > window:
            raise refused("signature.time", f"the signature is not of the last {window:g} seconds")
        if key not in self._users:
            raise refused("signature.key", "the request is signed with a key that is not known here")
        verify_key, proof = self._users[key]
        try:
            signature = base64.b64decode(headers.get(SIGNATURE, ""), altchars=b"-_", validate=True)
            verify_key.verify(_signed(headers, call.subject, call.request.body), signature)
        except (CryptoError, ValueError):  # the bytes are a stranger's
            raise refused("signature.wrong", "the request's signature is wrong") from None
        return proof

    def use_up(self, call: Call) -> None:
        """Let a signature that proves somebody not do so again.

        Raises:
            Unauthenticated: it has been used before.
            Overloaded: too many of this key came to remember them all.

        """
        key, nonce, signed = (call.headers[name] for name in (KEY, NONCE, TIME))
        window, most = self._settings.window, self._settings.remembered
        self._nonces.use(call.agent, key, nonce, signed=_seconds(signed), window=window, most=most)


def _seconds(text: str) -> float:
    """Milliseconds since 1970 as seconds; long ago for what is no number."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _LONGEST_TIME
    return int(text) / _MILLISECONDS if is_number else 0.0


def _verify_key(public: str, subject: str) -> VerifyKey:
    """The key of a user's public NKey: a byte for its kind, 32 for the key, 2 to check the others."""
    try:
        decoded = base64.b32decode(public.encode())
    except (binascii.Error, ValueError):
        decoded = b""
    is_whole = len(decoded) == _LENGTH and nkeys.crc16_checksum(decoded[:-2]) == decoded[-2:]
    if not is_whole or decoded[0] != nkeys.PREFIX_BYTE_USER:
        # Not quoted: it may be the seed.
        raise ValueError(f"signatures.users: the key of '{subject}' is no public NKey of a user (U…)")
    return VerifyKey(decoded[1:-2])
