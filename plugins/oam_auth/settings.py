"""`[plugins.auth]`: what mesh.toml says of who asks, and of who may."""

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
    # Somebody may have put a secret into the wrong place.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _safe_url(url: str) -> str:
    parts = urlsplit(url)
    if not parts.hostname or parts.scheme not in {"http", "https"}:
        raise ValueError(f"{url!r} is no address of keys, such as https://id.example.com/jwks.json")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError(f"{url!r} is not encrypted, so anybody between here and there chooses the keys")
    return url


class TokenSettings(_Table):
    """`[plugins.auth.tokens]`: which bearer tokens count.

    Attributes:
        issuer: who must have issued a token, its `iss`.
        audience: for whom a token must be, one of its `aud`.
        algorithms: those that may have signed a token.
        keys: files with the issuer's keys: JWK or JWK Set as JSON, or PEM with a public key.
        jwks_url: where the issuer publishes its keys; https, or this machine.
        refresh: seconds until they are fetched again.
        leeway: seconds that the clocks may differ.
        scopes: the claim with the scopes, a list or a text with blanks.

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
    """One of `[plugins.auth.signatures.users]`: whose public NKey it is."""

    subject: Annotated[str, Field(min_length=1, max_length=256)]
    scopes: tuple[str, ...] = ()


class SignatureSettings(_Table):
    """`[plugins.auth.signatures]`: whose signed requests count.

    Attributes:
        users: who signs, by public NKey (`U…`).
        window: seconds that a signature may be old, or its clock ahead.
        remembered: how many of each user are remembered for twice that long, so that none counts twice.

    """

    users: Annotated[dict[str, User], Field(min_length=1)]
    window: Annotated[float, Field(ge=1, le=300)] = 30
    remembered: Annotated[int, Field(ge=1, le=10_000_000)] = 200_000

    @field_validator("users", mode="before")
    @classmethod
    def _keeps_seeds_out_of_messages(cls, users: object) -> object:
        # Before anything else is said of them, which would quote their keys.
        if isinstance(users, dict) and not all(str(key).startswith("U") for key in users):
            raise PydanticCustomError("public_key", "the key of one of them is no public NKey of a user (U…)")
        return users


class CallerSettings(_Table):
    """`[plugins.auth.caller]`: what requests from here carry; a token, or a signature.

    Attributes:
        token_file: a file with a bearer token; read again when it changes.
        token_env: the environment variable with a bearer token, where no file is given.
        nkey_file: a file with the seed (`SU…`) that signs.
        token_on_events: events carry the token too, which then all their subscribers see.

    """

    token_file: Path | None = None
    token_env: str = "OAM_TOKEN"  # noqa: S105 - the name of a variable
    nkey_file: Path | None = None
    token_on_events: bool = False

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if self.token_file is not None and self.nkey_file is not None:
            raise ValueError("requests carry a token or a signature: give token_file or nkey_file")
        return self


class Settings(_Table):
    """`[plugins.auth]`.

    Attributes:
        tokens: which bearer tokens count; None for none.
        signatures: whose signatures count; None for nobody's.
        caller: what requests from here carry.
        rules: who may do what.
        policy: a TOML file with more `[[rules]]`.

    """

    tokens: TokenSettings | None = None
    signatures: SignatureSettings | None = None
    caller: CallerSettings = CallerSettings()
    rules: tuple[Rule, ...] = ()
    policy: Path | None = None

    def check_rules(self, rules: tuple[Rule, ...]) -> None:
        """Check that rules go together with each other and with the rest.

        Raises:
            ValueError: two have one name, or nobody could ever prove to be whom they are for.

        """
        twice = [name for name, times in Counter(rule.name for rule in rules).items() if times > 1]
        if twice:
            raise ValueError(f"two rules have the name '{twice[0]}'")
        named = next((rule.name for rule in rules if not rule.anonymous), None)
        if named and self.tokens is None and self.signatures is None:
            raise ValueError(
                f"the rule '{named}' is for proven subjects, but nothing proves any: "
                "set up [plugins.auth.tokens] or [plugins.auth.signatures]"
            )
