"""What a route counts."""

from openagentmesh import HandlerError
from openagentmesh.serving.stats import RouteStats
from pydantic_core import to_json


def test_any_error_can_be_told() -> None:
    """An author's words may be long, and no text at all: they are cut, and JSON."""
    counts = RouteStats()
    counts.add_error(HandlerError("\udc80" * 10_000))
    assert (500, b'"handler_error: ?') == (len(counts.last_error), to_json(counts.last_error)[:17])
