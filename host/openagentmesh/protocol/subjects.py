"""Every name on the wire: subjects, headers, buckets (protocol §1–§3, §6)."""

import re
from typing import Final

_WORDS: Final = r"{0}(\.{0})*"
_PATTERN: Final = r">|({0}|\*)(\.({0}|\*))*(\.>)?"
_KEY_WORD: Final = r"[-/_=A-Za-z0-9]+"
NAME_RE: Final = re.compile(_WORDS.format("[A-Za-z0-9_-]+"))
PATTERN_RE: Final = re.compile(_PATTERN.format(r"[^\s.*>]+"))
KEY_RE: Final = re.compile(_WORDS.format(_KEY_WORD))
KEY_PATTERN_RE: Final = re.compile(_PATTERN.format(_KEY_WORD))
TOKEN_RE: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
# A protocol line may have 4096 bytes; these leave room for the rest of the line.
MAX_NAME: Final = 255
MAX_SUBJECT: Final = 1024

CATALOG_BUCKET: Final = "mesh-catalog"
CATALOG_KEY: Final = "catalog"
REGISTRY_BUCKET: Final = "mesh-registry"
INSTANCES_BUCKET: Final = "mesh-instances"
OBSERVABILITY_BUCKET: Final = "mesh-observability"
CONTEXT_BUCKET: Final = "mesh-context"
KV_BUCKETS: Final = (CATALOG_BUCKET, REGISTRY_BUCKET, INSTANCES_BUCKET, OBSERVABILITY_BUCKET, CONTEXT_BUCKET)
ARTIFACTS_BUCKET: Final = "mesh-artifacts"
RESULTS: Final = "mesh.results."
DEATHS: Final = "mesh.death.>"
# NATS service discovery (§10).
SERVICES: Final = "$SRV.>"
# The key of the observability settings for all agents.
GLOBAL_KEY: Final = "global"

REQUEST_ID: Final = "X-Mesh-Request-Id"
INSTANCE_ID: Final = "X-Mesh-Instance-Id"
STREAM: Final = "X-Mesh-Stream"
REPLY_TO: Final = "X-Mesh-Reply-To"
STATUS: Final = "X-Mesh-Status"
STREAM_SEQ: Final = "X-Mesh-Stream-Seq"
STREAM_END: Final = "X-Mesh-Stream-End"
CONTENT_TYPE: Final = "X-Mesh-Content-Type"
TIMEOUT_MS: Final = "X-Mesh-Timeout-Ms"
CREDIT: Final = "X-Mesh-Credit"
ACCEPT: Final = "X-Mesh-Accept"

# Names that the mesh uses itself, so agents cannot have them.
RESERVED_NAMES: Final = frozenset({GLOBAL_KEY})
RESERVED_SUFFIX: Final = ".events"


def is_name(name: object) -> bool:
    """Whether `name` has the form of an agent's name; reserved names have it too."""
    return isinstance(name, str) and NAME_RE.fullmatch(name) is not None


def invalid_name(name: str) -> str | None:
    """Why `name` cannot be an agent's name; None when it can (protocol §1)."""
    if not is_name(name):
        return (
            "a name is made of segments of letters, digits, '_' and '-', joined by single dots, "
            "as in 'nlp.summarizer'"
        )
    if len(name) > MAX_NAME:
        return f"a name has at most {MAX_NAME} characters, this one has {len(name)}"
    if name in RESERVED_NAMES:
        return f"'{name}' is the key of the mesh-wide observability settings"
    if name.endswith(RESERVED_SUFFIX):
        return f"the suffix '{RESERVED_SUFFIX}' is reserved for the events of publishers"
    return None


def invalid_pattern(subject: str) -> str | None:
    """Why `subject` cannot be subscribed to; None when it can."""
    if isinstance(subject, str) and len(subject) <= MAX_SUBJECT and PATTERN_RE.fullmatch(subject):
        return None
    return "words are joined by single dots; '*' stands for one word, '>' at the end for all following words"


def invalid_subject(subject: str) -> str | None:
    """Why `subject` cannot be published to; None when it can."""
    if invalid_pattern(subject) or "*" in subject or ">" in subject:
        return "a subject is words joined by single dots, without wildcards and blanks"
    return None


def invalid_key(key: str, *, pattern: bool = False) -> str | None:
    """Why `key` cannot be the key of a bucket, or with `pattern` a key pattern; None when it can."""
    if not isinstance(key, str) or len(key) > MAX_SUBJECT:
        return f"a key is a text of at most {MAX_SUBJECT} characters"
    if (KEY_PATTERN_RE if pattern else KEY_RE).fullmatch(key):
        return None
    wildcards = "; '*' stands for one word, '>' at the end for all following words" if pattern else ""
    return f"a key is words of letters, digits, '-', '_', '/' and '=', joined by single dots{wildcards}"


def is_token(text: str) -> bool:
    """Whether `text` can be one word of a subject."""
    return isinstance(text, str) and TOKEN_RE.fullmatch(text) is not None


def in_channel(name: str, channel: str) -> bool:
    """Whether `name` is `channel` itself or lies below it, at any depth."""
    return name == channel or name.startswith(channel + ".")


def agent(name: str) -> str:
    """The subject of requests to `name`."""
    return f"mesh.agent.{name}"


def events(name: str) -> str:
    """The subject of the events of the publisher `name`."""
    return f"mesh.agent.{name}{RESERVED_SUFFIX}"


def channel_events(channel: str) -> str:
    """The pattern of the events of all publishers of a channel; it matches requests too."""
    return f"mesh.agent.{channel}.>"


def publisher_of(subject: str) -> str | None:
    """The publisher whose events have this subject; None when the subject carries no events."""
    if subject.startswith("mesh.agent.") and subject.endswith(RESERVED_SUFFIX):
        return subject[len("mesh.agent.") : -len(RESERVED_SUFFIX)] or None
    return None


def queue_group(name: str) -> str:
    """The queue group of all instances of `name`."""
    return f"q.{name}"


def stream(request_id: str) -> str:
    """The subject of the chunks of one stream."""
    return f"mesh.stream.{request_id}"


def results(request_id: str) -> str:
    """The subject of the replies to one `send(on_reply=...)`."""
    return f"{RESULTS}{request_id}"


def errors(name: str) -> str:
    """The subject of copies of the error envelopes of `name`."""
    return f"mesh.errors.{name}"


def death(name: str) -> str:
    """The subject of the death notice of `name`."""
    return f"mesh.death.{name}"


def logs(name: str) -> str:
    """The subject of the log events of `name`; `>` for those of all agents."""
    return f"mesh.logs.{name}"


def host(instance_id: str, verb: str) -> str:
    """The control subject of one host; `verb` is `ping`, `info`, `reload` or `*`."""
    return f"mesh.host.{instance_id}.{verb}"
