"""Rollbacks: publishers and watchers that fail at once restore the old version."""

from functools import partial
from pathlib import Path

import pytest
from openagentmesh import Host
from openagentmesh.runtime.config import load_config
from openagentmesh.runtime.reload import retirement

from tests.support.host_bench import Bench
from tests.support.modules import MESH, agent, write


@pytest.fixture
def _short_probation(monkeypatch: pytest.MonkeyPatch) -> None:
    """New publishers and watchers are rolled back only within 0.3 s, so that tests wait less."""
    monkeypatch.setattr(retirement, "_PROBATION_S", 0.3)


def watcher_agent(name: str, version: str, body: str) -> str:
    """A watcher that records its version when it starts."""
    return (
        f"{MESH}import asyncio\nimport ledger\n@mesh.agent(AgentSpec(name={name!r}))\n"
        f"async def watch() -> None:\n    ledger.runs.append({version!r})\n    {body}\n"
    )


@pytest.mark.usefixtures("_short_probation")
async def test_a_rollback_to_a_failing_version_is_not_repeated(bench: Bench) -> None:
    """When the new and the old version both fail at once, only the new one is rolled back."""
    async with bench.serve({"a.py": watcher_agent(bench.name, "v1", "raise ValueError(1)")}) as host:
        await bench.reloaded({"a.py": watcher_agent(bench.name, "v2", "raise ValueError(2)")})
        await host.wait_retired()
        failures = [reload.error for reload in host.status().reloads if reload.error]
        assert 1 == len(failures)
        assert "ValueError: 2" in failures[0]
        assert 1 == bench.ledger.runs.count("v2")


@pytest.mark.usefixtures("_short_probation")
async def test_a_change_of_settings_is_not_rolled_back(url: str, name: str, tmp_path: Path) -> None:
    """A watcher that failed before and after a change of mesh.toml does not undo the change."""
    toml = f"mesh.url = {url!r}\nhost.entry_points = false\nhost.drain_timeout = 0.5\n"
    path = tmp_path / "mesh.toml"
    path.write_text(toml)
    failing = (
        f"{MESH}@mesh.agent(AgentSpec(name='{name}.p'))\nasync def watch() -> None:\n    raise ValueError\n"
    )
    write(tmp_path / "agents", {"a.py": failing, "b.py": MESH + agent(f"{name}.b")})
    read = partial(load_config, path)
    async with Host(read(), config_file=path, read_config=read) as host:
        path.write_text(f'{toml}limits.queue = 3\nagents."{name}.b".enabled = false\n')
        await host.reload()
        await host.wait_retired()
        assert [f"{name}.p"] == [each.name for each in host.agents]


@pytest.mark.usefixtures("_short_probation")
@pytest.mark.parametrize(
    ("files", "imports"),
    [
        ({"ns/helper.py": "N = 1\n"}, "from ns import helper\n"),
        (
            {"_opt.py": "import missing_module\n"},
            "try:\n    import _opt\nexcept ImportError:\n    _opt = None\n",
        ),
    ],
    ids=["namespace-package", "optional-import"],
)
async def test_a_rollback_is_independent_of_the_imports_of_the_new_version(
    bench: Bench, files: dict[str, str], imports: str
) -> None:
    """The old version is restored if the new one imports a namespace package, or catches a failed import."""
    old = watcher_agent(bench.name, "old", "await asyncio.sleep(99)")
    async with bench.serve({"a.py": old, **files}) as host:
        await bench.reloaded({"a.py": imports + watcher_agent(bench.name, "new", "raise ValueError")})
        await host.wait_retired()
        assert ["old", "new", "old"] == bench.ledger.runs
