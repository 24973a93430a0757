"""The statistics of a route."""

from openagentmesh import HandlerError
from openagentmesh.serving.stats import RouteStats
from pydantic_core import to_json


def test_the_last_error_is_bounded_and_valid_unicode() -> None:
    """A long message with lone surrogates is shortened, and can be encoded as JSON."""
    stats = RouteStats()
    stats.add_error(HandlerError("\udc80" * 10_000))
    assert (500, b'"handler_error: ?') == (len(stats.last_error), to_json(stats.last_error)[:17])
