"""`oam agent call`, `stream` and `send`: results on stdout, one line of JSON each."""

import json
import signal
import subprocess
from pathlib import Path

from tests.support.commands import OAM, Process, Result, Up, environment, until


def test_a_reply_is_the_only_output(hosted: Up) -> None:
    """`agent call` prints the reply on stdout, and nothing on stderr."""
    result = hosted.run("agent", "call", "nlp.summarizer", '{"text": "hello world", "max_length": 5}')
    assert Result(0, '{"summary": "hello"}\n', "") == result


def test_each_chunk_of_a_stream_is_a_line(hosted: Up) -> None:
    """`agent stream` prints each chunk as a line of JSON; its input may be an argument."""
    result = hosted.run("agent", "stream", "time.ticker", '{"count": 3, "every": 0}')
    assert (0, "") == (result.code, result.err)
    assert ['{"number": 0', '{"number": 1', '{"number": 2'] == [
        line.partition(",")[0] for line in result.out.splitlines()
    ]


def test_chunks_are_printed_as_they_arrive(hosted: Up) -> None:
    """A chunk is printed before the next one exists; Ctrl-C then exits without a traceback."""
    payload = '{"count": 2, "every": 10}'
    with Process("agent", "stream", "time.ticker", payload, "--url", hosted.url, cwd=hosted.folder) as stream:
        assert 0 == json.loads(stream.wait_for_line('"number"'))["number"]
        stream.signal(signal.SIGINT)
        result = stream.finish(5)
    assert (130, 1) == (result.code, len(result.out.splitlines()))
    assert "Traceback" not in result.err


def test_a_closed_output_pipe_ends_a_stream_quietly(hosted: Up) -> None:
    """`oam agent stream … | head -n 1` prints one line, and no error about the closed pipe."""
    command = f"'{OAM}' agent stream time.ticker --url {hosted.url} | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        input='{"count": 1000, "every": 0.01}',
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (1, "") == (len(done.stdout.splitlines()), done.stderr)


def test_send_does_not_print_a_result(examples: Up, tmp_path: Path) -> None:
    """`agent send` exits with code 0 and without output, and the agent handles the request once."""
    path = tmp_path / "written"
    result = examples.run("agent", "send", "jobs.write", json.dumps({"path": str(path), "text": "done"}))
    assert (0, "", "") == (result.code, result.out, result.err)
    assert until(lambda: path.exists() and path.read_text() == "done")


def test_send_to_an_unknown_agent_fails(examples: Up) -> None:
    """`agent send` prints the error `not_found` when no agent has the name."""
    result = examples.run("agent", "send", "missing.agent", "{}")
    assert 1 == result.code
    assert result.err.startswith("Error [not_found]")
