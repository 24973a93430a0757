"""Fixtures for agents that are deactivated."""

import pytest


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drained subscriptions are kept for a hundredth of a second."""
    monkeypatch.setattr("openagentmesh.transport.connection.LINGER_S", 0.01)
