"""The workspace's objects as they are stored: the NATS object store format (ADR-20)."""

import logging
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, Field, ValidationError

from openagentmesh.protocol.subjects import ARTIFACTS_BUCKET, TOKEN_RE

log = logging.getLogger(__name__)

STREAM: Final = f"OBJ_{ARTIFACTS_BUCKET}"
METADATA_SUBJECTS: Final = f"$O.{ARTIFACTS_BUCKET}.M.>"
# Bytes. Clients read chunks of any size; most of them write this one.
CHUNK_SIZE: Final = 128 * 1024


@dataclass(slots=True, frozen=True)
class Artifact:
    """One object of the workspace, without its content.

    Attributes:
        key: its name.
        size: bytes.
        modified: when it was put or deleted, by the server's clock; by the local clock right after `put`.
        digest: `SHA-256=` and the digest in URL-safe base64; empty for a deleted object.
        deleted: whether it was deleted.
    """

    key: str
    size: int
    modified: datetime
    digest: str
    deleted: bool = False


class ObjectInfo(BaseModel):
    """The metadata message of an object.

    `nuid` names the subject of its chunks, a new one for each put. `mtime` is for clients that need it.
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
        """Whether it has no content and refers to another object."""
        return bool(self.options and self.options.get("link"))

    def artifact(self, modified: datetime) -> Artifact:
        """The object as users see it."""
        return Artifact(self.name, self.size, modified, self.digest, self.deleted)


def decode_object_info(data: bytes | None) -> ObjectInfo | None:
    """An object's metadata; None, with a warning, when it is malformed."""
    try:
        return ObjectInfo.model_validate_json(data or b"")
    except ValidationError as exc:
        log.warning("malformed object metadata: %s", exc.errors(include_url=False)[0])
    return None


def metadata_subject(key: str) -> str:
    """The subject of an object's metadata."""
    return METADATA_SUBJECTS[:-1] + urlsafe_b64encode(key.encode()).decode()


def chunk_subject(nuid: str) -> str:
    """The subject of the chunks of one put."""
    return f"$O.{ARTIFACTS_BUCKET}.C.{nuid}"


def digest_text(sha256: bytes) -> str:
    """A digest in the form that metadata has."""
    return f"SHA-256={urlsafe_b64encode(sha256).decode()}"
