"""`mesh.migrate` converts kept state for a new version."""

import asyncio
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Bench
from tests.support.modules import MESH, Configure, agent
from tests.support.reloads import COUNTERS, JOBS, counting_agent, reload
from tests.support.waiting import until


def migrating_agent(name: str, version: str, body: str, *, field: str = "calls") -> str:
    """A counter with another field, and a function that migrates the old state."""
    declared = f"class Tally(BaseModel):\n    {field}: int = 0\n    since: str = ''\n"
    more = f"\n@mesh.migrate\ndef migrate(old: dict, from_version: str) -> dict:\n    {body}\n"
    source = counting_agent(name, declared, "Tally()", f".{field}", more)
    return source.replace(f"name={name!r}", f"name={name!r}, version={version!r}")


MIGRATION = "return {'kept': {'calls': old['kept']['count'], 'since': from_version}}"


async def test_a_migration_runs_once_per_version(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """It gets the old state and version; the next reload of the same version transfers the migrated state."""
    source = migrating_agent(name, "2.0.0", MIGRATION)
    async with Host(configure({"a.py": counting_agent(name, *COUNTERS["model"])})) as host:
        await mesh.call(name, {})
        for number in (2, 3):
            assert not (await reload(host, tmp_path, f"# {number}\n{source}")).error
            assert [number, True] == await mesh.call(name, {})
        result = await reload(host, tmp_path, migrating_agent(name, "3.0.0", MIGRATION))
        assert "KeyError: 'count'" in result.error
        assert [4, True] == await mesh.call(name, {})


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ValueError('not this one')", "ValueError: not this one"),
        ("old['kept']['count'] = 99; 1 / 0", "ZeroDivisionError"),
        ("import time\n    while True: time.sleep(0.01)", "migrate takes longer than 0.3s"),
        ("return {'kept': {'calls': 'many'}}", "calls"),
        ("return {'talley': {}}", "migrate returned 'talley', but nothing of that name is kept"),
        ("return None", "migrate returned None, not a dict"),
        ("raise SystemExit(1)", "SystemExit: 1"),
    ],
    ids=[
        "exception",
        "exception-after-change",
        "timeout",
        "invalid-state",
        "unknown-name",
        "no-dict",
        "exit",
    ],
)
async def test_a_failed_migration_is_refused(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, body: str, error: str
) -> None:
    """The reload is refused with the reason, and the old version counts on from its own number."""
    config = configure({"a.py": counting_agent(name, *COUNTERS["model"])}, host={"load_timeout": 0.3})
    async with Host(config) as host:
        await mesh.call(name, {})
        assert error in (await reload(host, tmp_path, migrating_agent(name, "2.0.0", body))).error
        assert [2, True] == await mesh.call(name, {})


async def test_requests_during_a_migration_are_migrated(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """The old version serves while the migration runs in a thread; what it counts then is migrated again."""
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    wait = f"""import pathlib, time
    with open({str(runs)!r}, 'a') as file: file.write('.')
    while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.001)
    {MIGRATION}"""
    async with Host(configure({"a.py": counting_agent(name, *COUNTERS["model"])})) as host:
        await mesh.call(name, {})
        reloading = asyncio.create_task(reload(host, tmp_path, migrating_agent(name, "2.0.0", wait)))
        await until(runs.exists)
        assert [[2, True], [3, True]] == [await mesh.call(name, {}) for _ in range(2)]
        gate.touch()
        assert not (await reloading).error
        assert [4, True] == await mesh.call(name, {})
    assert ".." == runs.read_text()


async def test_a_migration_may_not_change_transferred_state(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path
) -> None:
    """A dict that both versions hold is passed to it, a client is not; changing the dict is refused."""
    kept = "\n@mesh.keep\ndef shared() -> dict:\n    return {'a': 1}\n"
    kept += "\n@mesh.keep\ndef lock() -> object:\n    import threading\n    return threading.Lock()\n"
    body = "old['shared'] = {{'a': {value}}}\n    assert 'lock' not in old\n"
    body += "    return {{'shared': old['shared']}}"
    async with Host(configure({"a.py": counting_agent(name, *COUNTERS["model"], more=kept)})) as host:
        for value, error in ((2, "migrate changes 'shared', a dict that is passed on as it is"), (1, "")):
            source = migrating_agent(name, "2.0.0", body.format(value=value)).replace(
                "\n@mesh.migrate", kept + "\n@mesh.migrate"
            )
            result = await reload(host, tmp_path, source)
            assert error in result.error
            assert bool(error) == bool(result.error)
        assert [1, True] == await mesh.call(name, {})


async def test_a_migration_may_change_and_return_its_argument(bench: Bench) -> None:
    """It works on a copy of its own, which it may change in place and return."""
    source = f"{MESH}{JOBS.format(more='')}{agent(bench.name, 'len(jobs)')}"
    fill = source.replace("return len(jobs)", "jobs['a'] = Job(number=1)\n    return len(jobs)")
    migrating = source.replace("number", "count") + (
        "@mesh.migrate\n"
        "def migrate(old, version):\n"
        "    for job in old['jobs'].values():\n"
        "        job['count'] = job.pop('number')\n"
        "    return old\n"
    )
    async with bench.serve({"a.py": fill}):
        await bench.call()
        await bench.reloaded({"a.py": migrating.replace("len(jobs)", "jobs['a'].count")})
        assert 1 == await bench.call()
