"""Every error code of the mesh as a person and as a program sees it."""

import json

import pytest

from tests.support.commands import UNREACHABLE, Process, Up, oam, run_parallel

LARGE = json.dumps("x" * 2_000_000)


def check(code: str, *arguments: str, host: Up, given: str = "") -> str:
    """Run a command for people and for programs side by side; both tell the code and end with 1."""
    shown, envelope = run_parallel(arguments, (*arguments, "--json"), cwd=host.folder, stdin_text=given)
    assert (1, "") == (shown.code, shown.out)
    assert shown.err.startswith(f"Error [{code}] ")
    assert "Traceback" not in shown.err + envelope.err
    assert (1, "") == (envelope.code, envelope.out)
    [line] = envelope.err.splitlines()
    told = json.loads(line)
    assert ["code", "message", "agent", "request_id", "details"] == list(told)
    assert code == told["code"]
    assert told["message"] in shown.err
    return shown.err


@pytest.mark.parametrize(
    ("code", "verb", "agent", "given"),
    [
        ("not_found", "call", "nobody.home", "{}"),
        ("invocation_mismatch", "call", "time.ticker", "{}"),
        ("invocation_mismatch", "stream", "echo", "{}"),
        ("invalid_input", "call", "nlp.summarizer", "{}"),
        ("handler_error", "call", "fail", "{}"),
        ("quota_used_up", "call", "quota", "{}"),
        ("payload_too_large", "call", "echo", LARGE),
    ],
)
def test_codes_of_requests(hosted: Up, code: str, verb: str, agent: str, given: str) -> None:
    """What is wrong with a request is an error with its code; the input is JSON from stdin."""
    check(code, "agent", verb, agent, "--url", hosted.url, host=hosted, given=given)


def test_timeout(hosted: Up) -> None:
    """An agent that does not answer within `--timeout` is a `timeout` with the seconds in it."""
    given = json.dumps({"until": str(hosted.folder / "never")})
    shown = check(
        "timeout", "agent", "call", "hold", given, "--timeout", "0.2", "--url", hosted.url, host=hosted
    )
    assert "within 0.2s" in shown


@pytest.mark.usefixtures("narrow_is_busy")
def test_overloaded(hosted: Up) -> None:
    """An agent that has as many requests as it may refuses the next one at once."""
    check("overloaded", "agent", "call", "narrow", "{}", "--url", hosted.url, host=hosted)


def test_connection_failed(hosted: Up) -> None:
    """An address that nobody answers at is told with what can be done."""
    assert "oam up" in check("connection_failed", "status", "--url", UNREACHABLE, host=hosted)


def test_connection_denied(hosted: Up, protected_url: str) -> None:
    """A server that wants credentials is told with how to give them."""
    assert "OAM_CREDS" in check("connection_denied", "mesh", "catalog", "--url", protected_url, host=hosted)


def test_errors_are_heard_by_all(hosted: Up) -> None:
    """`mesh listen mesh.errors.> --json` prints a copy of each error as one JSON record."""
    arguments = "mesh", "listen", "mesh.errors.>", "--json", "--url", hosted.url
    with Process(*arguments, cwd=hosted.folder) as listening:
        listening.wait_for_line("listening on mesh.errors.>")
        oam("agent", "call", "fail", "{}", "--url", hosted.url, cwd=hosted.folder)
        record = json.loads(listening.wait_for_line('"mesh.errors.fail"'))
    body = json.loads(record["body"])
    assert ("handler_error", "something odd", "fail") == (body["code"], body["message"], body["agent"])
