"""What participants tell each other besides requests and replies (protocol §9)."""

from typing import Literal

from pydantic import BaseModel


class DeathNotice(BaseModel):
    """The last instance serving an agent is gone.

    `detected_at` is an ISO 8601 time with its offset.
    """

    agent: str
    reason: Literal["disconnect", "graceful_shutdown"]
    detected_at: str
    instance_id: str
