"""Errors of the mesh as commands print them, as text and as JSON."""

import json
from pathlib import Path

import pytest

from tests.support.commands import UNREACHABLE, Up, oam, run_parallel
from tests.support.servers import running_server

TOO_LARGE = json.dumps("x" * 2_000_000)
MAX_ONE_STREAM = """
jetstream {{ store_dir: "{store}" }}
accounts {{ A {{ jetstream {{ max_streams: 1 }}, users: [{{ user: u, password: p }}] }} }}
"""


def check(code: str, *arguments: str, host: Up, stdin_text: str = "") -> str:
    """Check that a command fails with this error code, as text and with `--json`; returns the text."""
    text, envelope = run_parallel(arguments, (*arguments, "--json"), cwd=host.folder, stdin_text=stdin_text)
    assert (1, "") == (text.code, text.out)
    assert text.err.startswith(f"Error [{code}] ")
    assert "Traceback" not in text.err + envelope.err
    assert (1, "") == (envelope.code, envelope.out)
    [line] = envelope.err.splitlines()
    error = json.loads(line)
    assert ["code", "message", "agent", "request_id", "details"] == list(error)
    assert code == error["code"]
    assert error["message"] in text.err
    return text.err


@pytest.mark.parametrize(
    ("code", "verb", "agent", "payload"),
    [
        pytest.param("not_found", "call", "missing.agent", "{}", id="unknown agent"),
        pytest.param("invocation_mismatch", "call", "time.ticker", "{}", id="call of a streamer"),
        pytest.param("invocation_mismatch", "stream", "echo", "{}", id="stream of a responder"),
        pytest.param("invalid_input", "call", "nlp.summarizer", "{}", id="invalid input"),
        pytest.param("handler_error", "call", "fail", "{}", id="exception in the handler"),
        pytest.param("quota_used_up", "call", "quota", "{}", id="code of the application"),
        pytest.param("payload_too_large", "call", "echo", TOO_LARGE, id="large payload"),
    ],
)
def test_a_failed_request_prints_its_error_code(
    hosted: Up, code: str, verb: str, agent: str, payload: str
) -> None:
    """A request with JSON from stdin that fails prints the error with its code."""
    check(code, "agent", verb, agent, "--url", hosted.url, host=hosted, stdin_text=payload)


def test_a_timeout_names_the_seconds(hosted: Up) -> None:
    """A call without a reply within `--timeout` prints `timeout` with the number of seconds."""
    payload = json.dumps({"until": str(hosted.folder / "never")})
    call = "agent", "call", "hold", payload, "--timeout", "0.2", "--url", hosted.url
    assert "within 0.2s" in check("timeout", *call, host=hosted)


@pytest.mark.usefixtures("narrow_is_busy")
def test_an_agent_at_its_limit_refuses_a_request(hosted: Up) -> None:
    """A call of an agent that runs as many requests as permitted prints `overloaded`."""
    check("overloaded", "agent", "call", "narrow", "{}", "--url", hosted.url, host=hosted)


def test_an_unreachable_server_is_reported_with_advice(hosted: Up) -> None:
    """`connection_failed` for an address without a server advises to start one with `oam up`."""
    assert "oam up" in check("connection_failed", "status", "--url", UNREACHABLE, host=hosted)


def test_missing_credentials_are_reported_with_advice(hosted: Up, protected_url: str) -> None:
    """`connection_denied` of a server that requires credentials names the variable for them."""
    assert "OAM_CREDS" in check("connection_denied", "mesh", "catalog", "--url", protected_url, host=hosted)


def test_a_server_without_jetstream_is_reported_with_a_remedy(tmp_path: Path) -> None:
    """The error names the option that starts a server with JetStream, immediately and without other hints."""
    with running_server() as url:
        result = oam("kv", "put", "a", "1", "--url", url, cwd=tmp_path)
    reason = "JetStream is off; start the server with `nats-server -js`, or enable it for this account."
    assert result.err.startswith("Error [connection_failed] Opening the bucket '")
    assert result.err.endswith(f"' failed: {reason}\n")


def test_an_error_of_jetstream_is_reported_in_its_words(tmp_path: Path) -> None:
    """When a server with JetStream rejects a request, the error has its description and code, immediately."""
    config = tmp_path / "server.conf"
    config.write_text(MAX_ONE_STREAM.format(store=tmp_path / "store"))
    with running_server("-c", str(config)) as url:
        result = oam("kv", "put", "a", "1", "--url", url.replace("//", "//u:p@"), cwd=tmp_path)
    assert 1 == result.code
    assert result.err.endswith(
        " failed: the server reported 'maximum number of streams reached' (code 10027).\n"
    )
