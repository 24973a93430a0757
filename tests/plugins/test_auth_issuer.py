"""Keys at the issuer's URL: fetched before agents serve, and fetched again when they change."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import Key, OKPKey
from oam_auth import Auth, Settings, TokenSettings
from oam_auth.keys import fetch_keys
from openagentmesh import AgentMesh, MeshTimeout, PluginFailed, Unauthenticated

from tests.support.credentials import ALL, AUDIENCE, ISSUER, KEY, bearer, token
from tests.support.protection import ProtectedAgents
from tests.support.waiting import until

NEXT = OKPKey.generate_key("Ed25519", parameters={"kid": "next"})


class IssuerServer(ThreadingHTTPServer):
    """Serves keys at /keys.

    Attributes:
        requests: how many requests were received.
        response: status and body of responses.
        is_malformed: it responds by another protocol than HTTP.
        is_slow: it sends a body byte by byte.
        release: requests wait until it is set.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Get)
        self.requests = 0
        self.response: tuple[int, bytes] = (200, b"")
        self.is_malformed = self.is_slow = False
        self.release = threading.Event()
        self.release.set()
        self.publish(KEY)
        self._serving = threading.Thread(target=self.serve_forever)
        self._serving.start()

    def publish(self, *keys: Key) -> None:
        self.response = 200, json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"

    def close(self) -> None:
        self.shutdown()
        self._serving.join()
        self.server_close()


class _Get(BaseHTTPRequestHandler):
    server: IssuerServer

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.release.wait(10)
        if self.server.is_malformed:
            self.wfile.write(b"SMTP ready\r\n")
            return
        code, body = self.server.response
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()
        for number in range(20) if self.server.is_slow else ():
            self.wfile.write(b" " * number)
            time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the standard library
        pass


@pytest.fixture
def issuer() -> Iterator[IssuerServer]:
    running = IssuerServer()
    yield running
    running.close()


def auth(issuer: IssuerServer, **changed: Any) -> Auth:
    tokens = TokenSettings(issuer=ISSUER, audience=AUDIENCE, jwks_url=issuer.url, **changed)
    return Auth(Settings(tokens=tokens, rules=(ALL,)))


async def test_a_new_key_is_fetched_for_the_first_token_with_it(
    url: str, mesh: AgentMesh, name: str, issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token with an unknown key causes a fetch; tokens of the previous key are then refused."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(issuer)).mesh:
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())
        issuer.publish(NEXT)
        assert "alice" == await mesh.call(f"{name}.threaded", "2", headers=bearer(token(NEXT)))
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{name}.threaded", "3", headers=bearer())


async def test_keys_are_fetched_periodically(
    url: str, mesh: AgentMesh, name: str, issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A withdrawn key is refused after `refresh` seconds, without any token with another key."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(issuer, refresh=1)).mesh:
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())
        issuer.publish(NEXT)
        with pytest.raises(Unauthenticated):
            while True:
                await mesh.call(f"{name}.threaded", "2", headers=bearer())


async def test_tokens_with_unknown_keys_do_not_flood_the_issuer(
    url: str, mesh: AgentMesh, name: str, issuer: IssuerServer
) -> None:
    """Many tokens with unknown keys do not cause more fetches within the minimum interval."""
    async with ProtectedAgents(url, name, auth(issuer)).mesh:
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await mesh.call(f"{name}.threaded", "1", headers=bearer(token(NEXT, {"kid": f"k{number}"})))
    assert 1 == issuer.requests


async def test_previous_keys_stay_in_force_when_a_fetch_fails(
    url: str, mesh: AgentMesh, name: str, issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the issuer fails or responds without keys, valid tokens are still accepted."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(issuer)).mesh:
        for response in ((500, b""), (200, b"<html>")):
            issuer.response = response
            with pytest.raises(Unauthenticated) as caught:
                await mesh.call(f"{name}.threaded", "1", headers=bearer(token(NEXT)))
            assert "token.key" == caught.value.details["rule"]
            assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())


async def test_the_start_fails_without_keys(url: str, name: str, issuer: IssuerServer) -> None:
    """If the issuer responds with an error, without keys or with a redirect, the plugin fails to start."""
    for response, reason in (
        ((404, b""), "404"),
        ((200, b'{"keys": []}'), "contains 0 keys"),
        ((302, b""), "redirects"),
    ):
        issuer.response = response
        with pytest.raises(PluginFailed, match=f"'auth' cannot start: .*{reason}"):
            async with ProtectedAgents(url, name, auth(issuer)).mesh:
                pass


def test_a_response_above_the_size_limit_is_refused(issuer: IssuerServer) -> None:
    """A response of more than one MiB is refused."""
    issuer.response = 200, b" " * (1024 * 1024 + 1)
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        fetch_keys(issuer.url)


async def test_fetched_keys_are_kept_when_settings_change(
    issuer: IssuerServer, url: str, name: str, tmp_path: Path
) -> None:
    """Fetched keys are kept if the issuer fails while a setting changes; another issuer is refused."""
    plugin = auth(issuer)
    async with ProtectedAgents(url, name, plugin).mesh, AgentMesh(url) as mesh:
        issuer.response = 500, b""
        plugin.mesh_configure(auth(issuer, leeway=11).state.settings, tmp_path)
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())
        other = auth(issuer).state.settings.model_dump()
        other["tokens"]["jwks_url"] += "/other"
        with pytest.raises(ValueError, match="another issuer takes effect after a restart"):
            plugin.mesh_configure(Settings.model_validate(other), tmp_path)
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())


async def test_a_cancelled_request_does_not_cancel_the_fetch(
    url: str, mesh: AgentMesh, name: str, issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the request that caused a fetch is cancelled, the fetched keys are used for other requests."""
    plugin = auth(issuer)
    async with ProtectedAgents(url, name, plugin).mesh:
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())
        monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 3600.0)
        plugin.state.issuer._next_fetch = 0.0
        issuer.publish(NEXT)
        issuer.release.clear()
        with pytest.raises(MeshTimeout):
            await mesh.call(f"{name}.threaded", "1", headers=bearer(token(NEXT)), timeout=0.1)
        issuer.release.set()
        await until(lambda: plugin.state.issuer.keys[0].kid == "next")
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer(token(NEXT)))


async def test_fetches_continue_after_a_malformed_response(
    url: str, mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, issuer: IssuerServer
) -> None:
    """After responses that are not HTTP, keys are fetched again."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    monkeypatch.setattr("oam_auth.auth_state._RETRY_S", 0.01)
    async with ProtectedAgents(url, name, auth(issuer, refresh=1)).mesh:
        assert "alice" == await mesh.call(f"{name}.threaded", "1", headers=bearer())
        issuer.is_malformed = True
        await until(lambda: issuer.requests >= 3)
        issuer.is_malformed = False
        issuer.publish(NEXT)
        with pytest.raises(Unauthenticated):
            while True:
                await mesh.call(f"{name}.threaded", "2", headers=bearer())


def test_a_slow_response_times_out(issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout applies to the whole response, not to each of its parts."""
    monkeypatch.setattr("oam_auth.keys._FETCH_TIMEOUT_S", 0.2)
    issuer.is_slow = True
    with pytest.raises(ValueError, match="takes longer than"):
        fetch_keys(issuer.url)


def test_unencrypted_fetches_use_no_proxy(issuer: IssuerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys at an http URL are fetched from this machine directly, without the proxy of the environment."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ["first"] == [key.kid for key in fetch_keys(issuer.url)]


def test_keys_of_unknown_types_are_ignored(issuer: IssuerServer) -> None:
    """A set may contain keys of unknown types; it is refused if it has no others."""
    unknown = {"kty": "OKP", "crv": "Ed9000", "x": "AAAA"}
    issuer.response = 200, json.dumps({"keys": [unknown, KEY.as_dict(private=False)]}).encode()
    assert ["first"] == [key.kid for key in fetch_keys(issuer.url)]
    issuer.response = 200, json.dumps({"keys": [unknown]}).encode()
    with pytest.raises(ValueError, match="contains no usable key"):
        fetch_keys(issuer.url)
