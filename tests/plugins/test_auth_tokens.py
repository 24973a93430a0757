"""Bearer tokens: which ones count, and by which word the others are refused."""

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
    return made(tmp_path_factory.mktemp("keys"))


def made(folder: Path, **changed: Any) -> Tokens:
    settings = token_settings(folder, **changed)
    return Tokens(settings, [key for file in settings.keys for key in read_keys(file, folder)])


def refusal(tokens: Tokens, value: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        tokens.verify(value)
    rule = caught.value.details["rule"]
    assert isinstance(rule, str)
    # Nothing of a token, nor of a key, is in what a caller or a log gets.
    assert all(part not in str(caught.value) for part in value.split(".") if len(part) > 8)
    return rule


def test_a_good_token_proves_its_subject_and_scopes(tokens: Tokens) -> None:
    """Twice the same, by the cache; scopes are a text with blanks, or a list."""
    good = token()
    assert (ALICE, ALICE) == (tokens.verify(good), tokens.verify(good))
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
def test_claims_that_are_not_wanted_are_refused(tokens: Tokens, rule: str, changed: dict[str, Any]) -> None:
    """Well signed, but of another issuer, for others, out of time, or nobody's."""
    assert rule == refusal(tokens, token(**changed))


def test_a_token_counts_no_longer_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was verified before; the clocks may differ by the leeway."""
    now = int(time.time())
    tokens, good = made(tmp_path, leeway=5), token(exp=now + 10)
    assert ALICE == tokens.verify(good)
    monkeypatch.setattr("oam_auth.tokens.time.time", lambda: now + 14)
    assert ALICE == tokens.verify(good)
    monkeypatch.setattr("oam_auth.tokens.time.time", lambda: now + 15)
    assert "token.expired" == refusal(tokens, good)


def test_an_unsigned_token_is_refused(tokens: Tokens) -> None:
    """`none` is no algorithm, however it is written."""
    for algorithm in ("none", "None", "NONE", "", None, 7, ["Ed25519"]):
        assert refusal(tokens, unsigned({"alg": algorithm, "kid": "first"}, claims())) in {
            "token.algorithm",
            "token.malformed",
        }


def test_a_public_key_is_no_secret(tmp_path: Path) -> None:
    """A token signed with the public key as a shared secret is refused, even where HS256 is allowed."""
    key = RSAKey.generate_key(2048)
    pem = key.as_pem(private=False)
    (tmp_path / "issuer.pem").write_bytes(pem)
    tokens = made(tmp_path, keys=(Path("issuer.pem"),), algorithms=("RS256", "HS256"))
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
    """Another key of the same name, an unknown one, one in the token; what must be understood and is not."""
    try:
        value = token(key, header)
    except JoseError:  # the library refuses to make it
        value = ".".join((unsigned({"alg": "Ed25519", "kid": "first", **header}, claims())[:-1], "AAAA"))
    assert rule == refusal(tokens, value)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A key that is there, for another algorithm or for encryption, verifies nothing."""
    other = ECKey.generate_key("P-256", parameters={"kid": "first"})
    write_keys(tmp_path / "keys.json", other)
    assert "token.signature" == refusal(made(tmp_path, keys=(Path("keys.json"),)), token())
    encrypting = {**KEY.as_dict(private=False), "use": "enc"}
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [encrypting]}))
    with pytest.raises(ValueError, match="contains 0 keys"):
        read_keys(Path("keys.json"), tmp_path)


@given(st.text(max_size=300) | st.text(alphabet="eyJ.abc-_=0\n", max_size=300))
def test_any_text_is_refused(tokens: Tokens, text: str) -> None:
    """Whatever a stranger sends instead of a token has its refusal."""
    refusal_of_garbage = refusal(tokens, text)
    assert refusal_of_garbage.startswith("token.")
    assert isinstance(tokens.has_key_for(text), bool)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jku", "b64", "zip", "enc"]), JSON), JSON
)
def test_any_unsigned_json_is_refused(tokens: Tokens, head: dict[str, Any], body: object) -> None:
    """Headers and claims of any shape, and JSON nested deeper than Python reads."""
    assert refusal(tokens, unsigned(head, body)).startswith("token.")
    assert refusal(tokens, unsigned(head | {"alg": "Ed25519"}, body) + "AAAA").startswith("token.")


def test_deep_json_is_refused(tokens: Tokens) -> None:
    """Nested thousands of levels deep, in the header or the claims, or more than 16 KiB."""
    deep = base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=")
    assert "token.malformed" == refusal(tokens, f"{deep}.{deep}.AAAA")
    assert "token.malformed" == refusal(tokens, token(padding="x" * 20_000))
    assert "token.malformed" == refusal(tokens, "a.b.c.d.e")


@given(st.data())
def test_a_changed_token_proves_nothing_else(tokens: Tokens, data: st.DataObject) -> None:
    """One character of a good token changed: refused, or the same bytes written otherwise."""
    good = token(exp=LATER)
    place = data.draw(st.integers(0, len(good) - 1))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.="
    changed = good[:place] + data.draw(st.sampled_from(letters)) + good[place + 1 :]
    try:
        proof = tokens.verify(changed)
    except Unauthenticated:
        return
    assert ALICE == proof


@pytest.mark.parametrize(
    ("content", "why"),
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
        "empty",
        "no key",
        "no keys",
        "a wrong one",
        "no list",
        "deep",
        "private",
        "two PEMs",
        "a wrong PEM",
        "a private PEM",
    ],
)
def test_a_broken_key_file_is_named(tmp_path: Path, content: str, why: str) -> None:
    """By the file, without what is in it."""
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match=rf"keys\.json .*({why})") as caught:
        read_keys(Path("keys.json"), tmp_path)
    assert str(KEY.as_dict(private=True)["d"]) not in str(caught.value)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_key_file_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever is in a file of keys, it is refused and named."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.json contains"):
        read_keys(Path("any.json"), folder)


def test_key_files_of_all_kinds_are_read(tmp_path: Path) -> None:
    """A JWK Set, a JWK, and PEM of each kind of key; others in a set are ignored."""
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
    ("changed", "why"),
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
def test_unsafe_settings_are_refused(changed: dict[str, Any], why: str) -> None:
    """No algorithm is none, an issuer and an audience are always wanted, and keys come over a safe way."""
    with pytest.raises(ValidationError, match=why):
        TokenSettings(**({"issuer": "i", "audience": "a", "keys": ("k",)} | changed))
