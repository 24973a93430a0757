"""Loads that take too long or are interrupted by a stop."""

import asyncio
import sys
from pathlib import Path

from openagentmesh import Host

from tests.support.host_bench import Bench, Ledger
from tests.support.modules import MESH, Configure, agent, write
from tests.support.reloads import off_loop_threads, reload
from tests.support.waiting import until

# It ignores its interruption, at a step of Python, until the test lets it end.
HANGING = """import ledger
ledger.started.set()
while not ledger.go.is_set():
    try:
        while not ledger.go.wait(0.01): pass
    except BaseException: pass
"""


async def test_a_stop_aborts_a_reload(bench: Bench) -> None:
    """The stop does not wait for a load that hangs, and no module of the host stays imported."""
    threads = off_loop_threads()
    async with bench.serve({"a.py": MESH + agent(bench.name)}) as host:
        bench.write({"a.py": HANGING})
        reloading = asyncio.create_task(host.reload())
        assert await asyncio.to_thread(bench.ledger.started.wait, 5)
    assert reloading.cancelled()
    bench.ledger.go.set()
    await until(lambda: off_loop_threads() <= threads)
    assert not [name for name in sys.modules if name.startswith("oam_agents")]


async def test_files_after_an_aborted_load_can_be_fixed(bench: Bench) -> None:
    """Both new files fail with the file that hangs; the later one can be edited and served."""
    async with bench.serve({"z.py": MESH + agent(f"{bench.name}.z")}, load_timeout=0.2) as host:
        hanging = "import time\nfor _ in range(400): time.sleep(0.01)\n"
        await bench.refused({"a.py": hanging, "b.py": MESH + agent(f"{bench.name}.b") + "\nimport ledger\n"})
        assert {"failed"} == {
            module.state for module in host.modules if module.origin.display_name != "agents/z.py"
        }
        bench.path("a.py").unlink()
        await bench.reloaded({"b.py": MESH + agent(f"{bench.name}.b", "'fixed'")})
        await host.node.wait_served()
        assert "fixed" == await bench.call(".b")


async def test_an_aborted_load_executes_no_further_files(
    configure: Configure, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """When the file that hung ends, the files after it are neither executed nor imported."""
    files = {"a.py": MESH + agent(f"{name}.a"), "z.py": MESH + agent(f"{name}.z")}
    async with Host(configure(files, host={"load_timeout": 0.2})) as host:
        executed, threads = tmp_path / "executed", off_loop_threads()
        write(tmp_path / "agents", {"b.py": f"import pathlib\npathlib.Path({str(executed)!r}).touch()\n"})
        result = await reload(host, tmp_path, HANGING)
        assert "takes too long" in result.error
        assert off_loop_threads() - threads
        ledger.go.set()
        await until(lambda: off_loop_threads() <= threads)
        assert not executed.exists()
        imported = [module.rpartition(".")[2] for module in sys.modules if module.startswith("oam_agents.")]
        assert ["a", "z"] == sorted(imported)


async def test_the_status_has_the_error_of_an_aborted_load(
    configure: Configure, name: str, tmp_path: Path, ledger: Ledger
) -> None:
    """A file that failed at the start for another reason has the timeout as its error, with the line."""
    threads = off_loop_threads()
    async with Host(configure({"a.py": "def broken(:\n"}, host={"load_timeout": 0.2})) as host:
        assert "SyntaxError" in host.modules[0].error
        await reload(host, tmp_path, HANGING)
        assert "takes too long" in host.modules[0].error
        assert host.modules[0].line.endswith("a.py:5")
        ledger.go.set()
        await until(lambda: off_loop_threads() <= threads)
