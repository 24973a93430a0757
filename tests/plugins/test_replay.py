"""The replay plugin: a new version handles recorded requests before it serves."""

from pathlib import Path

import pytest
from openagentmesh import (
    Agent,
    AgentMesh,
    HandlerError,
    Host,
    InvalidInput,
    MeshError,
    MeshTimeout,
    Redactor,
    ReloadResult,
    hookimpl,
)

from tests.support.host_bench import Ledger
from tests.support.modules import Configure, write
from tests.support.reloads import replay_settings, replayable_agent


class Redacting:
    """Redacts secrets, and records failed reloads."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    @hookimpl
    def mesh_redactor(self, agent: Agent) -> Redactor:
        assert agent.replayable

        def redact(body: bytes) -> bytes | None:
            if b"invalid" in body:
                raise ValueError("a redactor's own failure")
            return None if b"private" in body else body.replace(b"secret", b"***")

        return redact

    @hookimpl
    def mesh_reload_failed(self, result: ReloadResult) -> None:
        self.errors.append(result.error)
        raise RuntimeError("a plugin's own failure")


async def reloaded(host: Host, path: Path, source: str) -> ReloadResult:
    """Save a file and reload it."""
    path.write_text(source)
    outcome = await host.reload()
    assert outcome is not None
    return outcome


@pytest.mark.parametrize(
    ("keep", "is_replayable", "replayed"),
    [(2, True, [2, 3]), (9, True, [1, 2, 3]), (9, False, []), (0, True, [])],
    ids=["last ones", "all", "not replayable", "without the plugin"],
)
async def test_a_new_version_handles_the_last_requests(  # noqa: PLR0913 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    *,
    keep: int,
    is_replayable: bool,
    replayed: list[int],
) -> None:
    """The last `keep` requests of replayable agents are replayed, and notes name the differences."""
    more = "replayable=True" if is_replayable else ""
    config = configure({"a.py": replayable_agent(name, "req['n'] * 2", more=more)}, **replay_settings(keep))
    async with Host(config) as host:
        for number in (1, 2, 3):
            await mesh.call(name, {"n": number})
        outcome = await reloaded(
            host, tmp_path / "agents/a.py", replayable_agent(name, "req['n'] * 3", more=more)
        )
        expected = [f'{name}: {{"n":{number}}} → {number * 3} (was {number * 2})' for number in replayed]
        assert expected == outcome.notes
        assert 9 == await mesh.call(name, {"n": 3})


@pytest.mark.parametrize("strict", [False, True])
async def test_a_new_error_refuses_a_strict_reload(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, *, strict: bool
) -> None:
    """A request that fails only with the new version refuses the reload if `strict`, else it is a note."""
    source = replayable_agent(name, "1 / req['n']")
    config = configure({"a.py": source}, **replay_settings(5, strict=strict))
    async with Host(config) as host:
        with pytest.raises(MeshError, match="division by zero"):
            await mesh.call(name, {"n": 0})
        await mesh.call(name, {"n": 1})
        same = await reloaded(host, tmp_path / "agents/a.py", source + "# equivalent\n")
        assert ([], "") == (same.notes, same.error)
        worse = await reloaded(host, tmp_path / "agents/a.py", replayable_agent(name, "1 / (req['n'] - 1)"))
        assert strict == bool(worse.error)
        assert "ZeroDivisionError: division by zero (was 1.0)" in (worse.error or worse.notes[-1])
        assert (0.5 if strict else 1.0) == await mesh.call(name, {"n": 2})


async def test_a_redactor_removes_secrets_from_recorded_requests(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Redacted bodies are recorded, without replies; failures of the plugin affect no request."""
    plugin = Redacting()
    config = configure({"a.py": replayable_agent(name, "req['word']")}, **replay_settings(5))
    async with Host(config, plugins=[plugin]) as host:
        for word in ("secret", "private", "invalid"):
            assert word == await mesh.call(name, {"word": word})
        outcome = await reloaded(host, tmp_path / "agents/a.py", replayable_agent(name, "req['word'] + '!'"))
        assert [f'{name}: {{"word":"***"}} → "***!" (was "***")'] == outcome.notes
        write(tmp_path / "agents", {"a.py": "def x(:\n"})
        await host.reload()
        assert ["SyntaxError: invalid syntax"] == plugin.errors
        assert "hi!" == await mesh.call(name, {"word": "hi"})


@pytest.mark.parametrize("error", ["SystemExit(3)", "KeyboardInterrupt()", "asyncio.CancelledError()"])
async def test_a_candidate_may_raise_anything(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, error: str
) -> None:
    """Any exception of a new version is a difference, and does not end the host."""
    source = replayable_agent(name, "req['word']")
    config = configure({"a.py": source}, **replay_settings(5, strict=True))
    async with Host(config) as host:
        await mesh.call(name, {"word": "hi"})
        raising = source.replace("    return", f"    import asyncio\n    raise {error}\n    return")
        outcome = await reloaded(host, tmp_path / "agents/a.py", raising)
        assert error.partition("(")[0].removeprefix("asyncio.") in outcome.error
        assert "hi" == await mesh.call(name, {"word": "hi"})


async def test_the_replay_of_all_requests_has_one_timeout(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a version hangs, the replay ends at the timeout, and a note counts the skipped requests."""
    monkeypatch.setattr("oam_replay._TIMEOUT_S", 0.2)
    source = replayable_agent(name, "req['word']")
    async with Host(configure({"a.py": source}, **replay_settings(5))) as host:
        for word in ("one", "two", "three"):
            await mesh.call(name, {"word": word})
        hanging = source.replace("    return", "    import asyncio\n    await asyncio.sleep(9)\n    return")
        outcome = await reloaded(host, tmp_path / "agents/a.py", hanging)
        assert [
            f'{name}: {{"word":"one"}} → no answer within 0.2s (was "one")',
            f"{name}: 2 of 3 requests are not replayed, the limit is 0.2s for all",
        ] == outcome.notes


async def test_a_request_that_timed_out_is_not_recorded(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A request that ended at its timeout is not replayed."""
    source = "import asyncio\n" + replayable_agent(name, "await asyncio.sleep(req['delay'])")
    async with Host(configure({"a.py": source}, **replay_settings(5))) as host:
        await mesh.call(name, {"delay": 0})
        with pytest.raises(MeshTimeout):
            await mesh.call(name, {"delay": 9}, timeout=0.2)
        outcome = await reloaded(host, tmp_path / "agents/a.py", source.replace("return await", "await"))
        assert [] == outcome.notes


async def test_the_serving_version_handles_no_recorded_request_again(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Its replies are recorded; only after a rollback it handles older requests once more."""
    watcher = f"""
@mesh.agent(AgentSpec(name={name + ".watch"!r}))
async def watch() -> None:
    import asyncio
    await asyncio.Event().wait()
"""

    def source(version: int) -> str:
        recorded = f"(ledger.runs.append(f'{version} handles {{req[chr(110)]}}'), req['n'])[1]"
        return "import ledger\n" + replayable_agent(name, recorded) + watcher

    file = tmp_path / "agents/a.py"
    async with Host(configure({"a.py": source(1)}, **replay_settings(10))) as host:
        for version in (2, 3):
            await mesh.call(name, {"n": version})
            assert not (await reloaded(host, file, source(version))).error
        failing = source(4).replace("    import asyncio\n", "    raise ValueError('at once')\n")
        await reloaded(host, file, failing)
        await host.wait_retired()
        await mesh.call(name, {"n": 5})
        assert not (await reloaded(host, file, source(6))).error
    by_callers = ["1 handles 2", "2 handles 3", "3 handles 5"]
    after_rollback = ["3 handles 2", "3 handles 3"]
    by_candidates = [
        *("2 handles 2", "3 handles 2", "3 handles 3", "4 handles 2", "4 handles 3"),
        *("6 handles 2", "6 handles 3", "6 handles 5"),
    ]
    assert sorted(by_callers + by_candidates + after_rollback) == sorted(ledger.runs)


async def test_a_replayed_request_has_the_caller_of_the_original(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A handler that depends on its caller and its subject returns the same."""
    returned = "[current_call().caller.instance_id, current_call().subject]"
    source = "from openagentmesh import current_call\n" + replayable_agent(name, returned)
    async with Host(configure({"a.py": source}, **replay_settings(5, strict=True))) as host:
        assert [mesh.instance_id, f"mesh.agent.{name}"] == await mesh.call(name, {})
        outcome = await reloaded(host, tmp_path / "agents/a.py", source + "# equivalent\n")
        assert ([], "") == (outcome.notes, outcome.error)


async def test_only_requests_that_reached_the_handler_are_recorded(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """Invalid input is not recorded; an error whose text cannot be made is."""
    declared = "class Odd(Exception):\n    def __str__(self) -> str:\n        raise ValueError\n"
    source = replayable_agent(name, "req['n']").replace("    return", "    if not req: raise Odd\n    return")
    source = source.replace("@mesh.agent", f"{declared}\n@mesh.agent")
    async with Host(configure({"a.py": source}, **replay_settings(5))) as host:
        for payload in (1, "text"):
            with pytest.raises(InvalidInput):
                await mesh.call(name, payload)
        with pytest.raises(HandlerError):
            await mesh.call(name, {})
        assert 1 == await mesh.call(name, {"n": 1})
        outcome = await reloaded(host, tmp_path / "agents/a.py", source.replace("raise Odd", "return 0"))
    [note] = outcome.notes
    assert f"{name}: {{}} → 0 (was " in note
    assert "Odd: <exception str() failed>" in note
