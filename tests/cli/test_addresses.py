"""Which server and credentials a command uses, and its advice when they do not work."""

import json
from pathlib import Path

from tests.support.commands import UNREACHABLE, Process, Result, Up, oam


def test_the_option_overrides_the_variable_which_overrides_the_file(hosted: Up, tmp_path: Path) -> None:
    """OAM_URL takes precedence over `.oam-url` of a folder above; `--url` takes precedence over both."""
    file, below = tmp_path / ".oam-url", tmp_path / "a" / "b"
    below.mkdir(parents=True)
    call = "agent", "call", "nlp.summarizer", '{"text": "x"}'
    answered = Result(0, '{"summary": "x"}\n', "")
    file.write_text(f'url = "{hosted.url}"\n')
    assert answered == oam(*call, cwd=below)
    file.write_text(f"{UNREACHABLE}\n")
    with (
        Process(*call, cwd=below, env={"OAM_URL": hosted.url}) as by_variable,
        Process(*call, "--url", hosted.url, cwd=below, env={"OAM_URL": UNREACHABLE}) as by_option,
    ):
        assert [answered, answered] == [by_variable.finish(), by_option.finish()]


def test_an_unreachable_address_is_reported_with_its_source(tmp_path: Path) -> None:
    """The error names the file or variable that the address comes from, and a remedy for it."""
    file = tmp_path / ".oam-url"
    file.write_text(f"{UNREACHABLE}\n")
    below = tmp_path / "below"
    below.mkdir()
    by_file = oam("status", cwd=below)
    by_variable = oam("status", cwd=below, env={"OAM_URL": UNREACHABLE})
    assert [1, 1] == [by_file.code, by_variable.code]
    assert f"The address comes from {file}: start that server, or remove the file" in by_file.err
    assert "The address comes from OAM_URL: start that server, or unset it" in by_variable.err
    assert "oam up" not in by_file.err + by_variable.err  # it would start another, at another address


def test_a_missing_credentials_file_is_reported_with_its_source(tmp_path: Path) -> None:
    """The error names the variable or file that the path comes from, without advice about addresses."""
    by_variable = oam("status", cwd=tmp_path, env={"OAM_CREDS": "/none.creds"})
    (tmp_path / ".oam-url").write_text(f'url = "{UNREACHABLE}"\ncreds = "none.creds"\n')
    by_file = oam("status", cwd=tmp_path)
    by_option = oam("mesh", "connect", UNREACHABLE, "--creds", "none.creds", cwd=tmp_path)
    assert "The credentials file '/none.creds' from OAM_CREDS does not exist" in by_variable.err
    assert (
        f"The credentials file '{tmp_path}/none.creds' from {tmp_path}/.oam-url does not exist" in by_file.err
    )
    assert "--url" not in by_variable.err + by_file.err
    assert (1, 1, 2) == (by_variable.code, by_file.code, by_option.code)


def test_an_unresolvable_host_name_is_reported_with_the_reason(tmp_path: Path) -> None:
    """The reason is the system's text, not an error number."""
    result = oam("mesh", "catalog", "--url", "nats://no host:4222", cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith(
        "Error [connection_failed] No NATS server is reachable at nats://no host:4222: "
    )
    assert "Unknown error" not in result.err


def test_a_rejected_password_is_not_shown(protected_url: str, tmp_path: Path) -> None:
    """The error names the user and password in the url as what was rejected, without showing them."""
    result = oam("mesh", "catalog", "--url", protected_url.replace("//", "//u:secret@"), cwd=tmp_path)
    assert 1 == result.code
    assert result.err.startswith("Error [connection_denied] ")
    assert "rejects the user and password in the url" in result.err
    assert "secret" not in result.err


def test_connect_writes_the_password_and_does_not_show_it(protected_url: str, tmp_path: Path) -> None:
    """`.oam-url` has the url with its password; the output has it without."""
    result = oam("mesh", "connect", protected_url.replace("//", "//u:correct@"), cwd=tmp_path)
    assert 0 == result.code
    assert "correct" in (tmp_path / ".oam-url").read_text()
    assert "correct" not in result.err


def test_connect_to_an_unreachable_server_writes_no_file(tmp_path: Path) -> None:
    """A failed `mesh connect` reports that, and creates no `.oam-url`."""
    result = oam("mesh", "connect", UNREACHABLE, cwd=tmp_path)
    assert "Check the address; .oam-url was not written." in result.err
    assert not (tmp_path / ".oam-url").exists()


def test_connect_prints_its_error_as_json(tmp_path: Path) -> None:
    """`mesh connect --json` prints the error's envelope, as every command does."""
    result = oam("mesh", "connect", UNREACHABLE, "--json", cwd=tmp_path)
    assert (1, "connection_failed") == (result.code, json.loads(result.err)["code"])
