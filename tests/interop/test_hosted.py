"""Programs for the published SDK, served by our host (api.md §4)."""

import json
from pathlib import Path

import pytest

from tests.support.commands import oam
from tests.support.peers import PROGRAMS, Pair


@pytest.mark.usefixtures("publishers")
def test_programs_for_the_published_sdk_are_drop_ins(
    published_calls_ours: Pair, url: str, tmp_path: Path
) -> None:
    """`oam up` loads the files that run alone on the published SDK, without a change.

    The other tests of this folder show that their agents work.
    """
    programs = [PROGRAMS / "provider.py", PROGRAMS / "publisher.py"]
    assert all(program.read_text().endswith("\n\nmesh.run()\n") for program in programs)
    hosts = json.loads(oam("status", "--json", "--url", url, cwd=tmp_path).out)
    modules = [module for host in hosts for module in host.get("modules", [])]
    ours = [module for module in modules if module["origin"] in {str(program) for program in programs}]
    assert [("serving", "")] * 2 == [(module["state"], module["error"]) for module in ours]
    [host] = published_calls_ours.processes
    assert not host.has_exited
    assert "connects to" not in host.log  # the URL in the programs is the host's
