"""Objects of the workspace as they are stored: the standard NATS object store format (ADR-20)."""

import logging
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError

from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET, TOKEN_RE

log = logging.getLogger(__name__)

STREAM: Final = f"OBJ_{ARTIFACTS_BUCKET}"
DESCRIPTIONS: Final = f"$O.{ARTIFACTS_BUCKET}.M.>"
# Bytes; every client reads chunks of any size, and most write this one.
CHUNK: Final = 128 * 1024


@dataclass(slots=True, frozen=True)
class Artifact:
    """One object of the workspace, without its content.

    Attributes:
        key: its name.
        size: bytes.
        modified: when it was put or deleted, by the server's clock; by ours for one just put.
        digest: `SHA-256=` and the digest in URL-safe base64; empty for a deleted one.
        deleted: whether it is there no more.

    """

    key: str
    size: int
    modified: datetime
    digest: str
    deleted: bool = False


class Description(BaseModel):
    """What is stored of an object besides its chunks, under its name.

    `nuid` names its chunks, each put anew; `mtime` is there for clients that need one.
    """

    name: str
    bucket: str = ARTIFACTS_BUCKET
    nuid: str = Field(pattern=f"^{TOKEN_RE.pattern}$")
    size: int = 0
    mtime: str = Field(default_factory=lambda: datetime.now(UTC).isoformat())
    chunks: int = 0
    digest: str = ""
    deleted: bool = False
    options: dict[str, Any] | None = None

    @property
    def is_link(self) -> bool:
        """Whether it has no content but stands for another object."""
        return bool(self.options and self.options.get("link"))

    def artifact(self, modified: datetime) -> Artifact:
        """What users see of it."""
        return Artifact(self.name, self.size, modified, self.digest, self.deleted)


def read_description(data: bytes | None) -> Description | None:
    """A stored description; None, and a warning, for what strangers wrote that is none."""
    try:
        return Description.model_validate_json(data or b"")
    except ValidationError as exc:
        log.warning("an object's description cannot be read: %s", exc.errors(include_url=False)[0])
    return None


def description_subject(key: str) -> str:
    """Where an object's description is stored."""
    return DESCRIPTIONS[:-1] + urlsafe_b64encode(key.encode()).decode()


def chunk_subject(nuid: str) -> str:
    """Where the chunks of one put are stored."""
    return f"$O.{ARTIFACTS_BUCKET}.C.{nuid}"


def digest_text(sha256: bytes) -> str:
    """A digest as descriptions have it."""
    return f"SHA-256={urlsafe_b64encode(sha256).decode()}"
