"""Bearer tokens: valid ones are accepted, all others are refused with the name of the failed check."""

import base64
import hmac
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey
from oam_auth.keys import read_keys
from oam_auth.policy import Identity
from oam_auth.settings import TokenSettings
from oam_auth.tokens import Tokens
from openagentmesh import Unauthenticated
from pydantic import ValidationError

from tests.support.credentials import KEY, claims, token, token_settings, unsigned, write_keys

OTHER = OKPKey.generate_key("Ed25519", parameters={"kid": "first"})
UNKNOWN = OKPKey.generate_key("Ed25519", parameters={"kid": "unknown"})
PEM = OKPKey.generate_key("Ed25519").as_pem(private=True)
ALICE = Identity("alice", frozenset({"a", "b"}))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return load(tmp_path_factory.mktemp("keys"))


def load(folder: Path, **changed: Any) -> Tokens:
    settings = token_settings(folder, **changed)
    return Tokens(settings, [key for file in settings.keys for key in read_keys(file, folder)])


def refusal(tokens: Tokens, value: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        tokens.verify(value)
    rule = caught.value.details["rule"]
    assert isinstance(rule, str)
    # The message, which is sent to the caller, does not contain parts of the token.
    assert all(part not in str(caught.value) for part in value.split(".") if len(part) > 8)
    return rule


def test_a_valid_token_has_subject_and_scopes(tokens: Tokens) -> None:
    """The identity has the token's subject and scopes, also from the cache; scopes are a text or a list."""
    valid = token()
    assert (ALICE, ALICE) == (tokens.verify(valid), tokens.verify(valid))
    assert ALICE == tokens.verify(token(scope=["b", "a"]))
    assert Identity("alice") == tokens.verify(token(scope=None))
    assert ALICE == tokens.verify(token(aud=["others", "mesh"]))
    assert ALICE == tokens.verify(token(header={"alg": "EdDSA"}))
    assert ALICE == tokens.verify(token(header={"kid": None}))


LATER = int(time.time()) + 86_400


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("token.expired", {"exp": 1}),
        ("token.exp", {"exp": None}),
        ("token.exp", {"exp": "tomorrow"}),
        ("token.exp", {"exp": True}),
        ("token.exp", {"exp": 10**400}),
        ("token.nbf", {"nbf": LATER}),
        ("token.nbf", {"nbf": "now"}),
        ("token.iat", {"iat": LATER}),
        ("token.iss", {"iss": "https://id.example.evil"}),
        ("token.iss", {"iss": None}),
        ("token.iss", {"iss": ["https://id.example"]}),
        ("token.aud", {"aud": "other"}),
        ("token.aud", {"aud": None}),
        ("token.aud", {"aud": []}),
        ("token.aud", {"aud": {"mesh": 1}}),
        ("token.sub", {"sub": None}),
        ("token.sub", {"sub": ""}),
        ("token.sub", {"sub": 7}),
        ("token.sub", {"sub": "al\nice"}),
        ("token.sub", {"sub": "a" * 257}),
        ("token.scopes", {"scope": {"a": 1}}),
        ("token.scopes", {"scope": ["a", 1]}),
    ],
)
def test_invalid_claims_are_refused(tokens: Tokens, rule: str, changed: dict[str, Any]) -> None:
    """A signed token with a missing, unexpected or malformed claim is refused, with the claim's name."""
    assert rule == refusal(tokens, token(**changed))


def test_a_cached_token_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was verified before is refused after its `exp` and the leeway."""
    now = int(time.time())
    tokens, valid = load(tmp_path, leeway=5), token(exp=now + 10)
    assert ALICE == tokens.verify(valid)
    monkeypatch.setattr("oam_auth.tokens.time.time", lambda: now + 14)
    assert ALICE == tokens.verify(valid)
    monkeypatch.setattr("oam_auth.tokens.time.time", lambda: now + 15)
    assert "token.expired" == refusal(tokens, valid)


def test_an_unsigned_token_is_refused(tokens: Tokens) -> None:
    """The algorithm `none` is refused in any spelling, as are missing and malformed algorithms."""
    for algorithm in ("none", "None", "NONE", "", None, 7, ["Ed25519"]):
        assert refusal(tokens, unsigned({"alg": algorithm, "kid": "first"}, claims())) in {
            "token.algorithm",
            "token.malformed",
        }


def test_a_public_key_is_not_accepted_as_a_shared_secret(tmp_path: Path) -> None:
    """A token signed with the public key as a shared secret is refused, even if HS256 is accepted."""
    key = RSAKey.generate_key(2048)
    pem = key.as_pem(private=False)
    (tmp_path / "issuer.pem").write_bytes(pem)
    tokens = load(tmp_path, keys=(Path("issuer.pem"),), algorithms=("RS256", "HS256"))
    assert ALICE == tokens.verify(token(key, {"alg": "RS256", "kid": None}))
    for secret in (pem, pem.strip(), key.as_der(private=False)):
        to_sign = unsigned({"alg": "HS256"}, claims())[:-1]
        signature = hmac.digest(secret, to_sign.encode(), "sha256")
        confused = f"{to_sign}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
        assert "token.signature" == refusal(tokens, confused)


@pytest.mark.parametrize(
    ("rule", "key", "header"),
    [
        ("token.signature", OTHER, {}),
        ("token.key", UNKNOWN, {}),
        ("token.algorithm", ECKey.generate_key("P-384"), {"alg": "ES384"}),
        ("token.signature", OTHER, {"jwk": OTHER.as_dict(private=False)}),
        ("token.signature", KEY, {"crit": ["exp"], "exp": 1}),
        ("token.signature", KEY, {"b64": False, "crit": ["b64"]}),
    ],
)
def test_other_keys_and_headers_are_refused(
    tokens: Tokens, rule: str, key: Key, header: dict[str, Any]
) -> None:
    """Another key of the same name, an unknown key, a key in the token and critical headers are refused."""
    try:
        value = token(key, header)
    except JoseError:  # the library refuses to create it
        value = ".".join((unsigned({"alg": "Ed25519", "kid": "first", **header}, claims())[:-1], "AAAA"))
    assert rule == refusal(tokens, value)


def test_keys_for_other_purposes_verify_nothing(tmp_path: Path) -> None:
    """A key with the token's `kid` for another algorithm, or for encryption, is not used."""
    other = ECKey.generate_key("P-256", parameters={"kid": "first"})
    write_keys(tmp_path / "keys.json", other)
    assert "token.signature" == refusal(load(tmp_path, keys=(Path("keys.json"),)), token())
    encrypting = {**KEY.as_dict(private=False), "use": "enc"}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [encrypting]}))
    with pytest.raises(ValueError, match="contains 0 keys"):
        read_keys(Path("keys.json"), tmp_path)


@given(st.text(max_size=300) | st.text(alphabet="eyJ.abc-_=0\n", max_size=300))
def test_arbitrary_text_is_refused(tokens: Tokens, text: str) -> None:
    """Any text instead of a token is refused with a rule."""
    assert refusal(tokens, text).startswith("token.")
    assert isinstance(tokens.is_fetch_useless(text), bool)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jku", "b64", "zip", "enc"]), JSON), JSON
)
def test_arbitrary_unsigned_json_is_refused(tokens: Tokens, head: dict[str, Any], body: object) -> None:
    """Any JSON as header and claims is refused without a valid signature."""
    assert refusal(tokens, unsigned(head, body)).startswith("token.")
    assert refusal(tokens, unsigned(head | {"alg": "Ed25519"}, body) + "AAAA").startswith("token.")


def test_malformed_tokens_are_refused(tokens: Tokens) -> None:
    """JSON that is nested thousands of levels deep, more than 16 KiB, and too many parts are `malformed`."""
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")
    assert "token.malformed" == refusal(tokens, f"{deep}.{deep}.AAAA")
    assert "token.malformed" == refusal(tokens, token(padding="x" * 20_000))
    assert "token.malformed" == refusal(tokens, "a.b.c.d.e")


@given(st.data())
def test_a_changed_token_has_no_other_identity(tokens: Tokens, data: st.DataObject) -> None:
    """A token with one changed character is refused, or it encodes the same bytes as before."""
    valid = token(exp=LATER)
    index = data.draw(st.integers(0, len(valid) - 1))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.="
    changed = valid[:index] + data.draw(st.sampled_from(letters)) + valid[index + 1 :]
    try:
        identity = tokens.verify(changed)
    except Unauthenticated:
        return
    assert ALICE == identity


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no usable key"),
        ("{}", "contains no usable key|contains 0 keys"),
        ('{"keys": []}', "contains 0 keys"),
        ('{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "!"}]}', "contains no usable key"),
        ('{"keys": 7}', "contains no usable key"),
        ("[" * 5000, "contains no usable key"),
        (json.dumps(KEY.as_dict(private=True)), "private key"),
        (2 * (PEM.decode() + "\n"), "several keys"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "contains no usable key"),
        (PEM.decode(), "private key"),
    ],
    ids=[
        "empty", "empty object", "empty set", "invalid key", "no list", "deeply nested", "private JWK",
        "two PEMs", "invalid PEM", "private PEM",
    ],
)  # fmt: skip
def test_an_invalid_key_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """The error names the file and the problem, without the file's content."""
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match=rf"keys\.json .*({message})") as caught:
        read_keys(Path("keys.json"), tmp_path)
    assert str(KEY.as_dict(private=True)["d"]) not in str(caught.value)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_key_files_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Any content that is not a key is a ValueError that names the file."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.json contains"):
        read_keys(Path("any.json"), folder)


def test_key_files_of_all_formats_are_read(tmp_path: Path) -> None:
    """A JWK Set, a JWK, and PEM of each type of key are read; unknown keys of a set are ignored."""
    keys: list[RSAKey | ECKey | OKPKey] = [RSAKey.generate_key(2048), ECKey.generate_key("P-256"), KEY]
    for number, pem in enumerate(key.as_pem(private=False) for key in keys):
        (tmp_path / f"{number}.pem").write_bytes(pem)
    (tmp_path / "one.json").write_text(json.dumps(KEY.as_dict(private=False)))
    unknown = {"kty": "AKP", "alg": "ML-DSA-44"}
    (tmp_path / "set.json").write_text(json.dumps({"keys": [unknown, KEY.as_dict(private=False)]}))
    files = ["0.pem", "1.pem", "2.pem", "one.json", "set.json"]
    found = [key for file in files for key in read_keys(Path(file), tmp_path)]
    assert ["RSA", "EC", "OKP", "OKP", "OKP"] == [key.key_type for key in found]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algorithms": ("none",)}, "algorithms"),
        ({"algorithms": ()}, "algorithms"),
        ({"issuer": ""}, "issuer"),
        ({"keys": ()}, "give the issuer's keys"),
        ({"jwks_url": "http://id.example/keys"}, "not encrypted"),
        ({"jwks_url": "file:///etc/passwd"}, "is not a url of keys"),
        ({"leeway": 1e9}, "leeway"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_unsafe_settings_are_refused(changed: dict[str, Any], message: str) -> None:
    """The algorithm `none`, an empty issuer, missing keys and unencrypted URLs are refused."""
    with pytest.raises(ValidationError, match=message):
        TokenSettings(**({"issuer": "i", "audience": "a", "keys": ("k",)} | changed))
