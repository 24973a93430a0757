"""The published SDK from PyPI, and a caller and providers of each SDK: started once, also in random order."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.commands import environment
from tests.support.peers import (
    OURS,
    HostedPrograms,
    Pair,
    Peer,
    Script,
    Sides,
    interop_environment,
    wait_listed,
)
from tests.support.published_sdk import NotInstalled, install_published

# Well below the timeout of a test, so that the tests are skipped if PyPI is unreachable, and do not fail.
_INSTALL_TIMEOUT_S = 90.0


@pytest.fixture(scope="session")
def published_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the published SDK."""
    try:
        return install_published(tmp_path_factory.mktemp("published") / "venv", _INSTALL_TIMEOUT_S)
    except NotInstalled as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def callers(published_python: Path, url: str) -> Iterator[dict[str, Peer]]:
    """A caller of each SDK."""
    # Warnings are errors for ours, and ignored for the published SDK.
    published_env = environment({"PYTHONWARNINGS": "ignore"})
    with Peer(published_python, url, published_env) as published, Peer(OURS, url, environment()) as ours:
        yield {"published": published.connected(), "ours": ours.connected()}
        assert (0, 0) == (published.close(), ours.close()), ours.log
        assert "" == ours.log


@pytest.fixture(scope="session")
def published(callers: dict[str, Peer]) -> Peer:
    return callers["published"]


@pytest.fixture(scope="session")
def ours(callers: dict[str, Peer]) -> Peer:
    return callers["ours"]


@pytest.fixture(scope="session")
def pairs(
    callers: dict[str, Peer], published_python: Path, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pair]]:
    """Each caller with agents of the other SDK; both SDKs serve the same programs."""
    published_env = interop_environment(url, "interop-published") | {"PYTHONWARNINGS": "ignore"}
    ours_env = interop_environment(url, "interop-ours")
    folder = tmp_path_factory.mktemp("interop")
    with ExitStack() as stack:
        served = [
            stack.enter_context(Script(published_python, program, published_env))
            for program in ("provider.py", "publisher.py")
        ]
        hosted = stack.enter_context(HostedPrograms(folder, url, "provider.py", "publisher.py", env=ours_env))
        pairs = {
            "published calls ours": Pair(callers["published"], "interop-ours", [hosted]),
            "ours calls published": Pair(callers["ours"], "interop-published", list(served)),
        }
        for pair in pairs.values():
            wait_listed(pair.caller, pair.agent("closed"), *pair.processes)
        yield pairs
        assert 0 == hosted.interrupt(), hosted.log


@pytest.fixture(scope="session")
def publishers(pairs: dict[str, Pair]) -> None:
    """Wait until the publishers of both providers are listed."""
    for pair in pairs.values():
        wait_listed(pair.caller, pair.agent("fragile"), *pair.processes)


@pytest.fixture(params=["published calls ours", "ours calls published"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    """A caller of one SDK and agents of the other one, in both directions."""
    return pairs[request.param]


@pytest.fixture
def published_calls_ours(pairs: dict[str, Pair]) -> Pair:
    return pairs["published calls ours"]


@pytest.fixture
def ours_calls_published(pairs: dict[str, Pair]) -> Pair:
    return pairs["ours calls published"]


@pytest.fixture(params=["published writes", "ours writes"])
def sides(request: pytest.FixtureRequest, published: Peer, ours: Peer) -> Sides:
    """A writer of one SDK and a reader of the other one, in both directions."""
    return Sides(published, ours) if request.param == "published writes" else Sides(ours, published)
