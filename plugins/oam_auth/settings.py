"""`[plugins.auth]`: how callers are verified, and what they may do."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from oam_auth.policy import Rule

Algorithm = Literal[
    "EdDSA", "Ed25519", "Ed448", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512",
    "RS256", "RS384", "RS512", "HS256", "HS384", "HS512",
]  # fmt: skip
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Table(BaseModel):
    # Input is not shown in errors: a secret may be in the wrong place.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _safe_url(url: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname or parts.scheme not in {"http", "https"}:
        raise ValueError(f"{url!r} is not a url of keys, such as https://id.example.com/jwks.json")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError(f"{url!r} is not encrypted, so the keys could be replaced on the way")
    return url


class TokenSettings(_Table):
    """`[plugins.auth.tokens]`: the accepted bearer tokens.

    Attributes:
        issuer: the required `iss`.
        audience: required among the token's `aud`.
        keys: files with the issuer's keys: JWK or JWK Set as JSON, or PEM with a public key.
        jwks_url: the URL of the issuer's keys; https, or this machine.
        refresh: seconds until they are fetched again.
        leeway: seconds that the clocks may differ.
        scopes: the claim with the scopes, a list or text separated by blanks.
    """

    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("EdDSA", "Ed25519", "ES256", "RS256")
    keys: tuple[Path, ...] = ()
    jwks_url: Annotated[str, AfterValidator(_safe_url)] | None = None
    refresh: Annotated[float, Field(ge=1, le=86_400)] = 300
    leeway: Annotated[float, Field(ge=0, le=300)] = 10
    scopes: Annotated[str, Field(min_length=1)] = "scope"

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if not self.keys and self.jwks_url is None:
            raise ValueError("give the issuer's keys: files in keys, or a jwks_url")
        return self


class User(_Table):
    """An entry of `[plugins.auth.signatures.users]`: the owner of a public NKey."""

    subject: Annotated[str, Field(min_length=1, max_length=256)]
    scopes: tuple[str, ...] = ()


class SignatureSettings(_Table):
    """`[plugins.auth.signatures]`: the accepted signatures.

    Attributes:
        users: the signers, by public NKey (`U…`).
        window: seconds that a signature may be old, or its clock ahead.
        remembered: used signatures of each user that are remembered, for twice that long.
    """

    users: Annotated[dict[str, User], Field(min_length=1)]
    window: Annotated[float, Field(ge=1, le=300)] = 30
    remembered: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000

    @field_validator("users", mode="before")
    @classmethod
    def _hide_seeds(cls, users: object) -> object:
        # Before any other validation, whose errors would quote the keys.
        if isinstance(users, dict) and not all(str(key).startswith("U") for key in users):
            raise PydanticCustomError("public_key", "a key is not a public NKey of a user (U…)")
        return users


class CallerSettings(_Table):
    """`[plugins.auth.caller]`: the credentials of this node's requests: a token or a signature.

    Attributes:
        token_file: a file with a bearer token; read again when it changes.
        token_env: the environment variable with a bearer token, without a file.
        nkey_file: a file with the seed (`SU…`) to sign with.
        token_on_events: events carry the token, too, visible to all their subscribers.
    """

    token_file: Path | None = None
    token_env: str = "OAM_TOKEN"  # noqa: S105 - the name of a variable
    nkey_file: Path | None = None
    token_on_events: bool = False

    @model_validator(mode="after")
    def _has_one_credential(self) -> Self:
        if self.token_file is not None and self.nkey_file is not None:
            raise ValueError("token_file and nkey_file are mutually exclusive")
        return self


class Settings(_Table):
    """`[plugins.auth]`; without `tokens` or `signatures` these are not accepted.

    Attributes:
        policy: a TOML file with more `[[rules]]`.
    """

    tokens: TokenSettings | None = None
    signatures: SignatureSettings | None = None
    caller: CallerSettings = CallerSettings()
    rules: tuple[Rule, ...] = ()
    policy: Path | None = None

    def check_rules(self, rules: tuple[Rule, ...]) -> None:
        """Raise ValueError if two rules have one name, or if their subjects cannot be verified."""
        if twice := [name for name, count in Counter(rule.name for rule in rules).items() if count > 1]:
            raise ValueError(f"two rules have the name '{twice[0]}'")
        named = next((rule.name for rule in rules if not rule.anonymous), None)
        if named and self.tokens is None and self.signatures is None:
            raise ValueError(
                f"the rule '{named}' is for verified subjects, but no credentials are accepted: "
                "configure [plugins.auth.tokens] or [plugins.auth.signatures]"
            )
