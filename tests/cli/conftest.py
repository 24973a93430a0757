"""Projects on disk, and one `oam up` for all tests that only ask."""

from collections.abc import Iterator

import pytest

from tests.support.commands import Process, Up, write_project
from tests.support.servers import running_server


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A running `oam up`; tests only ask it."""
    folder = write_project(
        tmp_path_factory.mktemp("hosted") / "dev",
        "echo",
        "summarizer",
        "ticker",
        holds=("hold", "narrow"),
        broken=True,
        toml="[agents.narrow]\nconcurrency = 1\nqueue = 0\n",
    )
    with Up(folder) as host:
        yield host


@pytest.fixture(scope="session")
def narrow_is_busy(hosted: Up) -> Iterator[None]:
    """The agent `narrow` has as many requests as it takes."""
    release = hosted.folder / "release-narrow"
    with Process(
        "agent", "call", "narrow", f'{{"until": "{release}"}}', "--url", hosted.url, cwd=hosted.folder
    ):
        hosted.wait_for_line("narrow runs")
        yield
        release.touch()


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """The address of a server that wants the user `u` with the password `geheim`."""
    with running_server("--user", "u", "--pass", "geheim") as found:
        yield found
