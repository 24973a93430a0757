"""`oam status`: hosts, modules that failed to load, and the state of agents."""

from tests.support.commands import Up, until


def test_a_failed_module_is_shown_with_its_traceback(hosted: Up) -> None:
    """`oam status` shows the host, the failed module with its traceback, and the agents served."""
    result = hosted.run("status")
    assert (0, "") == (result.code, result.err)
    assert f"dev  pid {hosted.pid}" in result.out
    assert "agents/broken.py: ValueError: not today" in result.out
    assert f'File "{hosted.folder}/agents/broken.py", line 3' in result.out
    assert "nlp.summarizer" in result.out


def test_the_status_as_json_has_the_same_facts(hosted: Up) -> None:
    """`oam status --json` has the pid, modules with state and line, agents and the server."""
    status = hosted.status
    failed = [module for module in status["modules"] if module["state"] == "failed"]
    assert [("agents/broken.py", "ValueError: not today", f"{hosted.folder}/agents/broken.py:3")] == [
        (module["origin"], module["error"], module["line"]) for module in failed
    ]
    assert 'raise ValueError("not today")' in failed[0]["traceback"]
    assert (hosted.pid, "dev", hosted.url) == (
        status["pid"],
        status["host"],
        status["embedded_server"]["url"],
    )
    expected = {"echo", "fail", "hold", "narrow", "nlp.summarizer", "quota", "time.ticker"}
    assert expected == {agent["name"] for agent in status["agents"]}


def test_background_tasks_and_inactive_agents_are_shown(examples: Up) -> None:
    """Publishers and watchers have their state, restarts and last error; inactive agents the reason."""
    lines: dict[str, str] = {}

    def is_restarted() -> bool:
        shown = examples.run("status").out
        lines.update((line.split()[0], line) for line in shown.splitlines() if line.startswith("  "))
        return "watcher  running  1 restart" in lines["ops.janitor"]

    assert until(is_restarted)
    assert "publisher  running" in lines["market.gold"]
    assert "RuntimeError: the folder is not mounted" in lines["ops.janitor"]
    assert "inactive: its condition is false" in lines["desk.trade"]
