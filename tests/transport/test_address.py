"""The address and credentials when none are given: the environment, then the nearest `.oam-url`."""

from pathlib import Path

import pytest
from openagentmesh import ConnectionFailed
from openagentmesh.transport import address
from openagentmesh.transport.address import Address

URL = "nats://mesh.example.com:4222"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, without the variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OAM_URL", raising=False)
    monkeypatch.delenv("OAM_CREDS", raising=False)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (f"{URL}\n", URL),
        (f"\n  {URL}  \n", URL),
        ("mesh.example.com:4222", "mesh.example.com:4222"),
        (f"{URL}?x=1", f"{URL}?x=1"),
        (f'url = "{URL}"\n', URL),
        (f'# the team\'s server\nurl = "{URL}"\n', URL),
        ("", None),
    ],
    ids=["url", "blanks", "without-scheme", "query", "toml", "comment", "empty"],
)
def test_a_file_contains_a_url_or_toml(tmp_path: Path, text: str, url: str | None) -> None:
    """A `.oam-url` contains a bare url or TOML, also with comments; an empty one sets nothing."""
    (tmp_path / ".oam-url").write_text(text)
    assert Address(url) == address.nearest()


def test_the_nearest_file_is_used(tmp_path: Path) -> None:
    """The first `.oam-url` from the folder upwards is used; it is not merged with those above."""
    (tmp_path / ".oam-url").write_text(f'url = "{URL}"\ncreds = "far.creds"\n')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert URL == address.nearest(below).url
    (tmp_path / "a" / ".oam-url").write_text("nats://near:4222")
    assert Address("nats://near:4222") == address.nearest(below)


def test_a_credentials_path_is_relative_to_the_file(tmp_path: Path) -> None:
    """A relative `creds` starts at the folder of its `.oam-url`; an absolute one is unchanged."""
    file = tmp_path / ".oam-url"
    file.write_text('creds = "my.creds"\n')
    assert Address(None, str(tmp_path / "my.creds")) == address.nearest()
    file.write_text('creds = "/etc/my.creds"\n')
    assert Address(None, "/etc/my.creds") == address.nearest()


@pytest.mark.parametrize("content", [b"url = nonsense\n", b"url = \xff\n"], ids=["not-toml", "not-utf8"])
def test_an_unreadable_file_is_reported(tmp_path: Path, content: bytes) -> None:
    """The error names a file that contains neither a url nor TOML."""
    (tmp_path / ".oam-url").write_bytes(content)
    with pytest.raises(ConnectionFailed, match=r"\.oam-url"):
        address.nearest()


@pytest.mark.parametrize("creds", [None, "/home/me/my.creds", '/home/a "b"/c\\d.creds'])
def test_a_written_file_can_be_read(tmp_path: Path, creds: str | None) -> None:
    """`nearest` reads what `write` has written, with any path of the credentials."""
    address.write(tmp_path, URL, creds)
    assert Address(URL, creds) == address.nearest()


def test_a_url_without_credentials_is_written_bare(tmp_path: Path) -> None:
    """Without credentials the file contains only the url, which other implementations can read."""
    assert f"{URL}\n" == address.write(tmp_path, URL).read_text()


def test_the_argument_precedes_the_environment_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is: the argument, the variable, the file, the default."""
    assert ("nats://localhost:4222", None) == (address.url_or_default(), address.creds_or_none())
    address.write(tmp_path, "nats://file:1", "/file.creds")
    assert ("nats://file:1", "/file.creds") == (address.url_or_default(), address.creds_or_none())
    monkeypatch.setenv("OAM_URL", "nats://env:1")
    monkeypatch.setenv("OAM_CREDS", "/env.creds")
    assert ("nats://env:1", "/env.creds") == (address.url_or_default(), address.creds_or_none())
    assert "nats://given:1" == address.url_or_default("nats://given:1")
    assert "/given.creds" == address.creds_or_none("/given.creds")


def test_a_written_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """A url may contain a password, so the mode is 0600, also of a file that existed before."""
    (tmp_path / ".oam-url").write_text("nats://old")
    path = address.write(tmp_path, "nats://user:secret@127.0.0.1:4222")
    assert 0o600 == path.stat().st_mode & 0o777
