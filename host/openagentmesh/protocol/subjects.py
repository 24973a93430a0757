"""Every name on the wire: subjects, headers, buckets (protocol §1–§3, §6)."""

import re
from typing import Final

NAME_RE: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
PATTERN_RE: Final = re.compile(r">|([^\s.*>]+|\*)(\.([^\s.*>]+|\*))*(\.>)?")
KEY_RE: Final = re.compile(r"[-/_=A-Za-z0-9]+(\.[-/_=A-Za-z0-9]+)*")
TOKEN_RE: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
# A subject may be 4096 bytes with all the rest of its line; this leaves room for both.
MAX_NAME: Final = 255
MAX_SUBJECT: Final = 1024

CATALOG_BUCKET: Final = "mesh-catalog"
CATALOG_KEY: Final = "catalog"
REGISTRY_BUCKET: Final = "mesh-registry"
INSTANCES_BUCKET: Final = "mesh-instances"
OBSERVABILITY_BUCKET: Final = "mesh-observability"
CONTEXT_BUCKET: Final = "mesh-context"
KV_BUCKETS: Final = (
    CATALOG_BUCKET,
    REGISTRY_BUCKET,
    INSTANCES_BUCKET,
    OBSERVABILITY_BUCKET,
    CONTEXT_BUCKET,
)
ARTIFACTS_BUCKET: Final = "mesh-artifacts"
# What NATS' own tools ask about services (§10).
MICRO: Final = "$SRV.>"
# The key of the observability settings that hold for all agents.
EVERY_AGENT: Final = "global"

REQUEST_ID: Final = "X-Mesh-Request-Id"
INSTANCE_ID: Final = "X-Mesh-Instance-Id"
STREAM: Final = "X-Mesh-Stream"
REPLY_TO: Final = "X-Mesh-Reply-To"
STATUS: Final = "X-Mesh-Status"
SOURCE: Final = "X-Mesh-Source"
STREAM_SEQ: Final = "X-Mesh-Stream-Seq"
STREAM_END: Final = "X-Mesh-Stream-End"
USAGE: Final = "X-Mesh-Usage"
CONTENT_TYPE: Final = "X-Mesh-Content-Type"
TIMEOUT_MS: Final = "X-Mesh-Timeout-Ms"
CREDIT: Final = "X-Mesh-Credit"
ACCEPT: Final = "X-Mesh-Accept"

# Names under which the mesh itself keeps something, so no agent may have them.
RESERVED_NAMES: Final = frozenset({EVERY_AGENT})
RESERVED_TAIL: Final = ".events"


def can_be_name(name: object) -> bool:
    """Whether something is a text that can stand in a subject as a name, whoever may have it."""
    return isinstance(name, str) and NAME_RE.fullmatch(name) is not None


def invalid_name(name: str) -> str | None:
    """Why `name` cannot name an agent, or None when it can (protocol §1)."""
    if not can_be_name(name):
        return (
            "a name is made of segments of letters, digits, '_' and '-', joined by single dots, "
            "as in 'nlp.summarizer'"
        )
    if len(name) > MAX_NAME:
        return f"a name has at most {MAX_NAME} characters, this one has {len(name)}"
    if name in RESERVED_NAMES:
        return f"'{name}' is the key of the mesh-wide observability settings"
    if name.endswith(RESERVED_TAIL):
        return f"'{RESERVED_TAIL}' at the end belongs to what a publisher emits"
    return None


def invalid_pattern(subject: str) -> str | None:
    """Why `subject` cannot be subscribed to, or None when it can."""
    if isinstance(subject, str) and len(subject) <= MAX_SUBJECT and PATTERN_RE.fullmatch(subject):
        return None
    return "words are joined by single dots; '*' stands for one word, '>' at the end for all that follow"


def invalid_subject(subject: str) -> str | None:
    """Why nothing can be sent to `subject`, or None when it can."""
    if invalid_pattern(subject) or "*" in subject or ">" in subject:
        return "a subject is words joined by single dots, without wildcards and blanks"
    return None


def invalid_key(key: str, *, pattern: bool = False) -> str | None:
    """Why `key` cannot be a key of a bucket, or None when it can; with `pattern` also wildcards."""
    if not isinstance(key, str) or len(key) > MAX_SUBJECT:
        return f"a key is a text of at most {MAX_SUBJECT} characters"
    words = [word for word in key.split(".") if word != "*"] if pattern else [key]
    if pattern and words[-1:] == [">"]:
        words.pop()
    if all(KEY_RE.fullmatch(word) for word in words) and key:
        return None
    return "a key is made of words of letters, digits, '-', '_', '/' and '=', joined by single dots" + (
        "; '*' stands for one word, '>' at the end for all that follow" if pattern else ""
    )


def is_token(text: str) -> bool:
    """Whether `text` can stand between two dots of a subject."""
    return isinstance(text, str) and TOKEN_RE.fullmatch(text) is not None


def channel_of(name: str) -> str:
    """The leading segments of an agent's name; empty for a name of one segment."""
    return name.rpartition(".")[0]


def in_channel(name: str, channel: str) -> bool:
    """Whether `name` is `channel` itself or lies below it, at any depth."""
    return name == channel or name.startswith(channel + ".")


def agent(name: str) -> str:
    """Where `name` is invoked."""
    return f"mesh.agent.{name}"


def events(name: str) -> str:
    """Where the publisher `name` emits."""
    return f"mesh.agent.{name}{RESERVED_TAIL}"


def channel_events(channel: str) -> str:
    """Where all publishers of a channel emit; requests of its agents pass there too."""
    return f"mesh.agent.{channel}.>"


def publisher_of(subject: str) -> str | None:
    """The publisher whose events go to `subject`; None when it carries no events."""
    if subject.startswith("mesh.agent.") and subject.endswith(RESERVED_TAIL):
        return subject[len("mesh.agent.") : -len(RESERVED_TAIL)] or None
    return None


def queue_group(name: str) -> str:
    """The queue group in which all instances of `name` share its requests."""
    return f"q.{name}"


def stream(request_id: str) -> str:
    """Where the chunks of one stream go."""
    return f"mesh.stream.{request_id}"


RESULTS: Final = "mesh.results."


def results(request_id: str) -> str:
    """Where the replies to one `send(on_reply=...)` go."""
    return f"{RESULTS}{request_id}"


def errors(name: str) -> str:
    """Where a copy of every error envelope of `name` goes."""
    return f"mesh.errors.{name}"


def death(name: str) -> str:
    """Where the last instance serving `name` is reported gone."""
    return f"mesh.death.{name}"


DEATHS: Final = "mesh.death.>"


def logs(name: str) -> str:
    """Where the log events of `name` go; `>` for those of all agents."""
    return f"mesh.logs.{name}"


def host(instance_id: str, verb: str) -> str:
    """One host's own subject; `verb` is `ping`, `info`, `reload` or `*`."""
    return f"mesh.host.{instance_id}.{verb}"
