"""The issuer's keys where it publishes them: fetched before anybody is served, and again when they change."""

import asyncio
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

NEXT = OKPKey.generate_key("Ed25519", parameters={"kid": "next"})


class Publisher(ThreadingHTTPServer):
    """Publishes keys at /keys; `asked` counts how often."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Get)
        self.asked = 0
        self.answer: tuple[int, bytes] = (200, b"")
        self.garbage = self.drips = False
        self.hold = threading.Event()
        self.hold.set()
        self.publish(KEY)
        self._serving = threading.Thread(target=self.serve_forever)
        self._serving.start()

    def publish(self, *keys: Key) -> None:
        self.answer = 200, json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/keys"

    def close(self) -> None:
        self.shutdown()
        self._serving.join()
        self.server_close()


class _Get(BaseHTTPRequestHandler):
    server: Publisher

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.hold.wait(10)
        if self.server.garbage:
            self.wfile.write(b"SMTP ready\r\n")
            return
        code, body = self.server.answer
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()
        for number in range(20) if self.server.drips else ():
            self.wfile.write(b" " * number)
            time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the standard library
        pass


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    running = Publisher()
    yield running
    running.close()


def auth(publisher: Publisher, **changed: Any) -> Auth:
    tokens = TokenSettings(issuer=ISSUER, audience=AUDIENCE, jwks_url=publisher.url, **changed)
    return Auth(Settings(tokens=tokens, rules=(ALL,)))


async def test_a_new_key_counts_as_soon_as_it_is_used(
    url: str, mesh: AgentMesh, name: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token signed with a key that is not known yet has the keys fetched; the old one counts no more."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(publisher)).mesh:
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())
        publisher.publish(NEXT)
        assert "alice" == await mesh.call(f"{name}.plain", "2", headers=bearer(token(NEXT)))
        with pytest.raises(Unauthenticated):
            await mesh.call(f"{name}.plain", "3", headers=bearer())


async def test_keys_are_fetched_again_by_themselves(
    url: str, mesh: AgentMesh, name: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is withdrawn counts no more after `refresh` seconds, though nobody asks for another one."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(publisher, refresh=1)).mesh:
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())
        publisher.publish(NEXT)
        with pytest.raises(Unauthenticated):
            while True:
                await mesh.call(f"{name}.plain", "2", headers=bearer())


async def test_strangers_do_not_make_it_ask_the_issuer(
    url: str, mesh: AgentMesh, name: str, publisher: Publisher
) -> None:
    """However many tokens with unknown keys come, the issuer is asked once in a while."""
    async with ProtectedAgents(url, name, auth(publisher)).mesh:
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await mesh.call(f"{name}.plain", "1", headers=bearer(token(NEXT, {"kid": f"k{number}"})))
    assert 1 == publisher.asked


async def test_keys_from_before_stay_when_the_issuer_is_gone(
    url: str, mesh: AgentMesh, name: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An issuer that fails for a while, or answers nonsense, locks nobody out who has a good token."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    async with ProtectedAgents(url, name, auth(publisher)).mesh:
        for answer in ((500, b""), (200, b"<html>")):
            publisher.answer = answer
            with pytest.raises(Unauthenticated) as caught:
                await mesh.call(f"{name}.plain", "1", headers=bearer(token(NEXT)))
            assert "token.key" == caught.value.details["rule"]
            assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())


async def test_without_keys_it_does_not_start(url: str, name: str, publisher: Publisher) -> None:
    """An issuer that is not there, has no keys, or sends elsewhere, stops the start by the plugin's name."""
    for answer, why in (
        ((404, b""), "404"),
        ((200, b'{"keys": []}'), "contains 0 keys"),
        ((302, b""), "redirects"),
    ):
        publisher.answer = answer
        with pytest.raises(PluginFailed, match=f"'auth' cannot start: .*{why}"):
            async with ProtectedAgents(url, name, auth(publisher)).mesh:
                pass


def test_too_large_an_answer_is_refused(publisher: Publisher) -> None:
    """More than a megabyte is no set of keys."""
    publisher.answer = 200, b" " * (1024 * 1024 + 1)
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        fetch_keys(publisher.url)


async def test_other_settings_keep_the_keys(
    publisher: Publisher, url: str, name: str, tmp_path: Path
) -> None:
    """What was fetched counts when the issuer fails and a setting changes; another issuer is refused."""
    plugin = auth(publisher)
    async with ProtectedAgents(url, name, plugin).mesh, AgentMesh(url) as mesh:
        publisher.answer = 500, b""
        plugin.mesh_configure(auth(publisher, leeway=11).state.settings, tmp_path)
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())
        elsewhere = auth(publisher).state.settings.model_dump()
        elsewhere["tokens"]["jwks_url"] += "/other"
        with pytest.raises(ValueError, match="another issuer takes effect after a restart"):
            plugin.mesh_configure(Settings.model_validate(elsewhere), tmp_path)
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())


async def test_who_gives_up_throws_no_keys_away(
    url: str, mesh: AgentMesh, name: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger has the keys fetched and goes before they come: they count for the others all the same."""
    async with ProtectedAgents(url, name, auth(publisher)).mesh as provider:
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())
        monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 3600.0)
        plugin = provider._plugins.all[0].implementation
        assert isinstance(plugin, Auth)
        plugin.state.issuer._next_fetch = 0.0
        publisher.publish(NEXT)
        publisher.hold.clear()
        with pytest.raises(MeshTimeout):
            await mesh.call(f"{name}.plain", "1", headers=bearer(token(NEXT)), timeout=0.1)
        publisher.hold.set()
        async with asyncio.timeout(10):
            while plugin.state.issuer.keys[0].kid != "next":
                await asyncio.sleep(0.01)
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer(token(NEXT)))


async def test_an_issuer_that_speaks_no_http_ends_nothing(
    url: str, mesh: AgentMesh, name: str, monkeypatch: pytest.MonkeyPatch, publisher: Publisher
) -> None:
    """Whatever goes wrong while keys are fetched again, they are fetched again after that."""
    monkeypatch.setattr("oam_auth.file_watch._MIN_FETCH_INTERVAL_S", 0.0)
    monkeypatch.setattr("oam_auth.auth_state._RETRY_S", 0.01)
    async with ProtectedAgents(url, name, auth(publisher, refresh=1)).mesh:
        assert "alice" == await mesh.call(f"{name}.plain", "1", headers=bearer())
        publisher.garbage = True
        while publisher.asked < 3:
            await asyncio.sleep(0.01)
        publisher.garbage = False
        publisher.publish(NEXT)
        with pytest.raises(Unauthenticated):
            while True:
                await mesh.call(f"{name}.plain", "2", headers=bearer())


def test_an_answer_that_drips_is_not_waited_for(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is for all of it, not for each byte."""
    monkeypatch.setattr("oam_auth.keys._FETCH_TIMEOUT_S", 0.2)
    publisher.drips = True
    with pytest.raises(ValueError, match="takes longer than"):
        fetch_keys(publisher.url)


def test_no_proxy_sees_what_stays_here(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without encryption keys come from this machine, and on no other way."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ["first"] == [key.kid for key in fetch_keys(publisher.url)]


def test_keys_of_kinds_yet_unknown_are_ignored(publisher: Publisher) -> None:
    """In a set with others; one that has nothing else is refused."""
    unknown = {"kty": "OKP", "crv": "Ed9000", "x": "AAAA"}
    publisher.answer = 200, json.dumps({"keys": [unknown, KEY.as_dict(private=False)]}).encode()
    assert ["first"] == [key.kid for key in fetch_keys(publisher.url)]
    publisher.answer = 200, json.dumps({"keys": [unknown]}).encode()
    with pytest.raises(ValueError, match="contains no usable key"):
        fetch_keys(publisher.url)
