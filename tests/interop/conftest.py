"""The published SDK from PyPI, and a caller and a provider on either side.

All of them end with the last test of this folder, so that the others have the machine to themselves.
"""

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

# Well below the timeout of a test, so that an unreachable PyPI skips and does not fail.
_INSTALL_TIMEOUT = 90.0


@pytest.fixture(scope="package")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the published SDK."""
    try:
        return install_published(tmp_path_factory.mktemp("published") / "venv", _INSTALL_TIMEOUT)
    except NotInstalled as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="package")
def callers(stock_python: Path, url: str) -> Iterator[dict[str, Peer]]:
    """A caller of each SDK."""
    # Warnings are errors for ours; those of the published SDK are its own matter.
    stock_env = environment({"PYTHONWARNINGS": "ignore"})
    with Peer(stock_python, url, stock_env) as stock, Peer(OURS, url, environment()) as ours:
        yield {"stock": stock.connected(), "ours": ours.connected()}
        assert (0, 0) == (stock.close(), ours.close()), ours.log
        assert "" == ours.log


@pytest.fixture(scope="package")
def stock(callers: dict[str, Peer]) -> Peer:
    return callers["stock"]


@pytest.fixture(scope="package")
def ours(callers: dict[str, Peer]) -> Peer:
    return callers["ours"]


@pytest.fixture(scope="package")
def pairs(
    callers: dict[str, Peer], stock_python: Path, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pair]]:
    """Each caller with agents of the other SDK; both serve the same scripts."""
    stock_env = interop_environment(url, "interop-stock") | {"PYTHONWARNINGS": "ignore"}
    ours_env = interop_environment(url, "interop-ours")
    folder = tmp_path_factory.mktemp("interop")
    with ExitStack() as stack:
        served = [
            stack.enter_context(Script(stock_python, program, stock_env))
            for program in ("provider.py", "publisher.py")
        ]
        hosted = stack.enter_context(HostedPrograms(folder, url, "provider.py", "publisher.py", env=ours_env))
        pairs = {
            "stock calls ours": Pair(callers["stock"], "interop-ours", [hosted]),
            "ours calls stock": Pair(callers["ours"], "interop-stock", list(served)),
        }
        for pair in pairs.values():
            wait_listed(pair.caller, pair.agent("left"), *pair.processes)
        yield pairs
        assert 0 == hosted.interrupt(), hosted.log


@pytest.fixture(scope="package")
def publishers(pairs: dict[str, Pair]) -> None:
    """Both providers' publishers are there."""
    for pair in pairs.values():
        wait_listed(pair.caller, pair.agent("fragile"), *pair.processes)


@pytest.fixture(params=["stock calls ours", "ours calls stock"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    """Either side as the caller of the other."""
    return pairs[request.param]


@pytest.fixture
def stock_calls_ours(pairs: dict[str, Pair]) -> Pair:
    return pairs["stock calls ours"]


@pytest.fixture
def ours_calls_stock(pairs: dict[str, Pair]) -> Pair:
    return pairs["ours calls stock"]


@pytest.fixture(params=["stock writes", "ours writes"])
def sides(request: pytest.FixtureRequest, stock: Peer, ours: Peer) -> Sides:
    """Either side as the one who writes what the other reads."""
    return Sides(stock, ours) if request.param == "stock writes" else Sides(ours, stock)
