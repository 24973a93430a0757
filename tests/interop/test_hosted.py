"""Scripts written for the published SDK, in our host (api.md §4)."""

import json
from pathlib import Path

import pytest

from tests.support.commands import oam
from tests.support.peers import PROGRAMS, Pair


@pytest.mark.usefixtures("publishers")
def test_stock_scripts_are_drop_ins(stock_calls_ours: Pair, url: str, tmp_path: Path) -> None:
    """The files that run alone on the published SDK are loaded by `oam up` as they are.

    That their agents work is what the other tests of this folder show.
    """
    scripts = [PROGRAMS / "provider.py", PROGRAMS / "publisher.py"]
    assert all(script.read_text().endswith("\n\nmesh.run()\n") for script in scripts)
    hosts = json.loads(oam("status", "--json", "--url", url, cwd=tmp_path).out)
    modules = [module for host in hosts for module in host.get("modules", [])]
    ours = [module for module in modules if module["origin"] in {str(script) for script in scripts}]
    assert [("serving", "")] * 2 == [(module["state"], module["error"]) for module in ours]
    [host] = stock_calls_ours.processes
    assert not host.has_exited
    assert "asks for" not in host.log  # the url in the scripts is the host's
