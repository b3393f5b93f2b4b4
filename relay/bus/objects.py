"""Reading an object of a NATS Object Store: what does not fit into one message.

A bucket is the stream ``OBJ_<bucket>``. An object is one message that describes it, on ``$O.<bucket>.M.<name>`` with
its name in base64url, and its chunks in order, on ``$O.<bucket>.C.<nuid>``. Whoever may write to the bucket may
describe anything: names and numbers are checked before they become a subject or an amount of memory, and the chunks
against length and digest.
Links are not followed, since they lead to buckets that the caller may not read.

Source: ADR-20 (JetStream based object stores).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import time
from typing import Any, Final, NamedTuple

import orjson

from relay.bus.client import seconds_left
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream
from relay.errors import BusRefused, BusUnavailable, RelayError

MAX_NAME_BYTES = 1024
MAX_CHUNKS = 100_000
PAGE_CHUNKS = 256
"""Asked for at once; they take ``jetstream.PAGE_BYTES`` at most."""

_BUCKET: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")
_NUID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST_KIND: Final = "sha-256="


class ObjectUnusable(RelayError):
    """There is no such object, or it is not what it says; the text names no content."""


class ObjectInfo(NamedTuple):
    """What an object says of itself."""

    nuid: str
    size_bytes: int
    chunks: int
    sha256: bytes


def read_object(jetstream: JetStream, bucket: str, name: str, *, max_bytes: int, deadline: float) -> bytes:
    """The object's content, of ``max_bytes`` at most: one that says it is larger is not read.

    Blocks until ``deadline`` (``time.monotonic()``) at most. In memory it takes its size and about one page of chunks.
    Raises ``ObjectUnusable`` for what will not change by itself, ``BusUnavailable`` when there was no answer in time or
    the object was replaced while it was read, ``BusRefused`` when JetStream, or this user, may not be asked.
    """
    info = _described(jetstream, bucket, name, deadline)
    if info.size_bytes > max_bytes:
        raise ObjectUnusable(f"the object has {info.size_bytes} bytes, and may have {max_bytes}")
    content = _joined(jetstream, bucket, info, deadline)
    if len(content) == info.size_bytes and hashlib.sha256(content).digest() == info.sha256:
        return content
    if _described(jetstream, bucket, name, deadline) != info:
        raise BusUnavailable("the object was replaced while it was read")
    if len(content) != info.size_bytes:
        raise ObjectUnusable(
            f"the object has {info.size_bytes} bytes by its description, and not as many in its chunks"
        )
    raise ObjectUnusable("the object's digest is another than that of its chunks")


def _described(jetstream: JetStream, bucket: str, name: str, deadline: float) -> ObjectInfo:
    """As the leader knows it."""
    if not _BUCKET.fullmatch(bucket):
        raise ObjectUnusable("an object's bucket must be 1 to 200 of A-Z a-z 0-9 _ -")
    octets = name.encode("utf-8", "replace")
    if not 1 <= len(octets) <= MAX_NAME_BYTES:
        raise ObjectUnusable(f"an object's name must have 1 to {MAX_NAME_BYTES} bytes")
    nats_subject = f"$O.{bucket}.M.{base64.urlsafe_b64encode(octets).decode()}"
    try:
        found = jetstream.get_last_from_leader(f"OBJ_{bucket}", nats_subject, _left(deadline))
    except BusRefused as error:
        if error.code == STREAM_NOT_FOUND:
            raise ObjectUnusable("there is no such object store bucket") from error
        raise
    if found is None or found.is_deleted:
        raise ObjectUnusable("there is no such object")
    try:
        described = orjson.loads(found.payload)
    except orjson.JSONDecodeError as error:
        raise ObjectUnusable("the object's description cannot be read") from error
    if not isinstance(described, dict):
        raise ObjectUnusable("the object's description cannot be read")
    return _info(described)


def _info(described: dict[str, Any]) -> ObjectInfo:
    if described.get("deleted"):
        raise ObjectUnusable("there is no such object: it was deleted")
    options = described.get("options")
    if isinstance(options, dict) and options.get("link"):
        raise ObjectUnusable("the object is a link, and links are not followed")
    nuid, size_bytes, chunks = described.get("nuid"), described.get("size", 0), described.get("chunks", 0)
    if not (isinstance(nuid, str) and _NUID.fullmatch(nuid)):
        raise ObjectUnusable("the object's description has no usable nuid")
    if not (_is_count(size_bytes) and _is_count(chunks)) or chunks > min(size_bytes, MAX_CHUNKS):
        raise ObjectUnusable("the object's description has no usable size and number of chunks")
    return ObjectInfo(nuid, size_bytes, chunks, _sha256(described.get("digest")))


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _sha256(digest: object) -> bytes:
    """Written by some with ``=`` at the end and by some without, the kind in capitals or not."""
    if isinstance(digest, str) and digest[: len(_DIGEST_KIND)].lower() == _DIGEST_KIND:
        encoded = digest[len(_DIGEST_KIND) :].rstrip("=")
        try:
            sha256 = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
        except (binascii.Error, ValueError):
            sha256 = b""
        if len(sha256) == hashlib.sha256().digest_size:
            return sha256
    raise ObjectUnusable("the object's description has no SHA-256 digest")


def _joined(jetstream: JetStream, bucket: str, info: ObjectInfo, deadline: float) -> bytes:
    """Its chunks one after the other, those that are there; never more than it says it has."""
    content = io.BytesIO()  # grows in place, and gives its bytes away without a copy
    nats_subject = f"$O.{bucket}.C.{info.nuid}"
    sequence: int | None = 1
    missing = info.chunks
    while sequence is not None and missing:
        limit = min(PAGE_CHUNKS, missing)
        page = jetstream.page(f"OBJ_{bucket}", nats_subject, sequence, limit, timeout_seconds=_left(deadline))
        for each in page.msgs:
            content.write(each.payload)
        if content.tell() > info.size_bytes:
            break
        missing -= len(page.msgs)
        sequence = page.next_sequence
    return content.getvalue()


def _left(deadline: float) -> float:
    if time.monotonic() >= deadline:
        raise BusUnavailable("there was no time left to read the object")
    return seconds_left(deadline)
