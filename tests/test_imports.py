"""What importing the package loads and installs, here and where the system has less."""

import subprocess
import sys
from contextlib import nullcontext
from textwrap import dedent

import pytest
from openagentmesh.runtime.loading.imports import Imports


def run(program: str) -> str:
    """Run a program in an interpreter of its own; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=False, timeout=60
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_no_host() -> None:
    """Neither host, file watcher, server nor command line are loaded; `Host` is, when it is used."""
    program = """
        import sys, openagentmesh
        heavy = ("openagentmesh.runtime", "openagentmesh.transport.server", "watchfiles", "typer", "rich")
        print([name for name in sys.modules if name.startswith(heavy)])
        openagentmesh.Host
        print("openagentmesh.runtime.host" in sys.modules)
    """
    assert ["[]", "True"] == run(program).splitlines()


def test_without_fcntl_a_caller_is_imported() -> None:
    """Windows has no `fcntl`, and neither `O_NOCTTY` nor `SIGHUP`."""
    program = """
        import asyncio, os, signal, sys
        import nats.js, pluggy, rich.console, tenacity, typer.main, watchfiles  # cannot be simulated
        from pydantic import BaseModel, TypeAdapter
        sys.modules["fcntl"], sys.platform = None, "win32"
        del os.O_NOCTTY, signal.SIGHUP, signal.SIGURG
        import openagentmesh, openagentmesh.cli.main, openagentmesh.runtime.host
        print(openagentmesh.Host.__name__)
    """
    assert "Host" == run(program)


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_without_signal_handlers_of_the_loop_a_signal_stops_a_mesh(signal: str) -> None:
    """The event loop of Windows has no `add_signal_handler`: the signal module's are used then."""
    program = f"""
        import asyncio, os, signal
        from openagentmesh.mesh.runner import stop_event

        class Loop(asyncio.SelectorEventLoop):
            def add_signal_handler(self, *_):
                raise NotImplementedError

        async def main():
            stop = stop_event()
            os.kill(os.getpid(), signal.{signal})
            async with asyncio.timeout(10):
                await stop.wait()

        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(main())
        print("stopped")
    """
    assert "stopped" == run(program)


def test_a_host_that_does_not_reload_leaves_no_hooks(tmp_path: object) -> None:
    """With `reload = false` no finder and no audit hook is installed after its modules are loaded."""
    program = f"""
        import asyncio, pathlib, sys
        hooks = []
        add, sys.addaudithook = sys.addaudithook, lambda hook: (hooks.append(hook), add(hook))
        from openagentmesh import Host
        from openagentmesh.runtime.config import Config, HostSection

        folder = pathlib.Path({str(tmp_path)!r})
        (folder / "agents").mkdir()
        (folder / "agents" / "a.py").write_text(
            "import _helper\\nfrom openagentmesh import AgentMesh, AgentSpec\\nmesh = AgentMesh()\\n"
            "@mesh.agent(AgentSpec(name='a'))\\nasync def a(req: dict) -> int:\\n    return _helper.VALUE\\n"
        )
        (folder / "agents" / "_helper.py").write_text("VALUE = 7\\n")
        before = list(sys.meta_path)

        async def main(reload):
            section = HostSection(agents=["agents"], entry_points=False, reload=reload)
            async with Host(Config(folder=folder, host=section)) as host:
                print([agent.name for agent in host.agents], sys.meta_path == before, len(hooks))

        asyncio.run(main(False))
        asyncio.run(main(True))
    """
    assert ["['a'] True 0", "['a'] False 1"] == run(program).splitlines()


def test_finding_modules_changes_no_list_that_another_thread_reads() -> None:
    """With `reload = false` the finder is in `sys.meta_path` for moments; a list in use stays as it is."""
    imports = Imports(lambda _managed: nullcontext(), tracks_changes=False)
    before = sys.meta_path
    content = list(before)
    with imports.finding(), imports.finding():
        assert content == before
        assert imports in sys.meta_path
    assert content == list(sys.meta_path)
