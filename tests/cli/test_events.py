"""Events, messages on subjects and log events: printed one line each until Ctrl-C."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator

import pytest
from openagentmesh.cli.output import print_each

from tests.support.commands import Process, Up, oam, until


def test_events_of_a_publisher_are_printed_until_ctrl_c(examples: Up) -> None:
    """`agent subscribe` prints events as JSON lines as they arrive, and exits with code 0 on Ctrl-C."""
    with Process("agent", "subscribe", "market.gold", "--url", examples.url, cwd=examples.folder) as process:
        process.wait_for_line('"item": "gold"')
        process.signal(signal.SIGINT)
        result = process.finish()
    assert 0 == result.code
    events = [json.loads(line) for line in result.out.splitlines()]
    assert {"gold"} == {event["item"] for event in events}
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("name", "code"), [("echo", "invocation_mismatch"), ("missing.agent", "not_found")])
def test_subscribing_to_another_kind_of_agent_fails(examples: Up, name: str, code: str) -> None:
    """`agent subscribe` fails immediately for an agent that is no publisher, and for an unknown one."""
    result = examples.run("agent", "subscribe", name)
    assert (1, "") == (result.code, result.out)
    assert result.err.startswith(f"Error [{code}]")


def test_listen_prints_published_messages_as_json(examples: Up) -> None:
    """`mesh listen --json` prints a message of `mesh publish` with its subject and body."""
    with Process(
        "mesh", "listen", "by.hand", "--json", "--url", examples.url, cwd=examples.folder
    ) as process:
        process.wait_for_line("stop with Ctrl-C")
        assert 0 == examples.run("mesh", "publish", "by.hand", '{"item": "tea"}').code
        assert '{\\"item\\":\\"tea\\"}' in process.wait_for_line('by.hand"')


def test_listen_prints_the_errors_of_all_agents(hosted: Up) -> None:
    """`mesh listen mesh.errors.> --json` prints a copy of each error as one JSON object."""
    arguments = "mesh", "listen", "mesh.errors.>", "--json", "--url", hosted.url
    with Process(*arguments, cwd=hosted.folder) as process:
        process.wait_for_line("listening on mesh.errors.>")
        oam("agent", "call", "fail", "{}", "--url", hosted.url, cwd=hosted.folder)
        message = json.loads(process.wait_for_line('"mesh.errors.fail"'))
    body = json.loads(message["body"])
    assert ("handler_error", "something odd", "fail") == (body["code"], body["message"], body["agent"])


def test_a_changed_log_level_applies_to_running_agents(examples: Up) -> None:
    """After `observe set`, `observe logs --json` prints the debug events of the next request."""
    assert 0 == examples.run("observe", "set", "nlp.echo", "--log-level", "debug").code
    assert {"log_level": "debug"} == examples.run("observe", "config", "nlp.echo", "--json").json
    logs = "observe", "logs", "nlp.echo", "--json", "--url", examples.url
    with Process(*logs, cwd=examples.folder) as process:
        process.wait_for_line("stop with Ctrl-C")
        assert until(
            lambda: examples.run("agent", "call", "nlp.echo", '"hello"').code == 0 and len(process.out) >= 3
        )
        process.signal(signal.SIGINT)
        result = process.finish()
    assert 0 == result.code
    events = [json.loads(line) for line in result.out.splitlines()]
    assert {"request_received", "request_completed", "usage_reported"} <= {e["event"] for e in events}
    keys = ["timestamp", "level", "agent", "event", "request_id", "message", "data"]
    assert all(keys == list(event) for event in events)


def test_the_global_log_level_is_set_and_printed(examples: Up) -> None:
    """`observe set --global` sets the level that `observe config` prints without an agent."""
    assert 0 == examples.run("observe", "set", "--global", "--log-level", "warn").code
    assert "warn" in examples.run("observe", "config").out


async def test_on_begin_is_awaited_after_the_first_item_is_requested(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`print_each` awaits `on_begin` when the subscription exists, and before the first item arrives."""
    order: list[str] = []
    begun = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        order.append("requested")
        await begun.wait()
        yield "item"

    async def on_begin() -> None:
        order.append("begun")
        begun.set()

    await print_each(items(), str, on_begin)
    assert ["requested", "begun"] == order
    assert "item\n" == capsys.readouterr().out
