"""What JetStream answers, as values: messages read back, acknowledgements, stream figures, errors. No I/O.

Sources: the JetStream wire API reference; ADR-31 (direct get and its batch forms).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from relay.bus.messages import Msg, Publication
from relay.errors import BusRefused, BusUnavailable, RevisionConflict

WRONG_LAST_SEQUENCE = 10071
WRONG_LAST_SEQUENCE_IN_FLIGHT = 10164
"""The same from a replicated stream, while another write to the subject is under way."""

NOT_READY = frozenset({10008, 10163})
"""No leader right now, or it is still catching up: asked again, the answer may be another."""


class Stored(NamedTuple):
    """JetStream has the message (PubAck)."""

    stream: str
    sequence: int
    is_duplicate: bool


class StoredMsg(NamedTuple):
    """A message read back from a stream."""

    nats_subject: str
    sequence: int
    payload: bytes
    headers: Mapping[str, str]
    pending: int
    """How many more match the same request."""

    @property
    def is_deleted(self) -> bool:
        """Whether it is a KV delete or purge marker, or the marker of an expired key."""
        return "KV-Operation" in self.headers or "Nats-Marker-Reason" in self.headers


class StreamPage(NamedTuple):
    """Some messages of a stream, in its order."""

    msgs: list[StoredMsg]
    next_sequence: int | None
    """Where the next page starts, None after the last."""


class StreamInfo(NamedTuple):
    """A stream as its leader sees it."""

    config: Mapping[str, Any]
    created: str
    asked_at: str
    """When this was, by the server's clock: RFC 3339; '' when it does not say."""
    messages: int
    size_bytes: int
    first_sequence: int
    """Of an empty stream: the next to be given."""
    last_sequence: int
    """Also when that message is gone; 0 when there never was one."""
    subjects: int


def stream_info(answer: Mapping[str, Any]) -> StreamInfo:
    """The answer to ``STREAM.INFO``."""
    state = answer["state"]
    return StreamInfo(
        answer["config"],
        str(answer["created"]),
        str(answer.get("ts", "")),
        int(state["messages"]),
        int(state["bytes"]),
        int(state["first_seq"]),
        int(state["last_seq"]),
        int(state.get("num_subjects", 0)),
    )


def is_hit(msg: Msg) -> bool:
    """Whether the answer to a direct get is a message of the stream; what the server itself says has no such header.

    A stored message may carry a header ``Status`` of its own.
    """
    return "Nats-Sequence" in msg.headers


def direct_msg(hit: Msg, pending: int = 0) -> StoredMsg:
    """The message of the stream that answers a direct get."""
    headers = hit.headers
    return StoredMsg(headers["Nats-Subject"], int(headers["Nats-Sequence"]), hit.payload, headers, pending)


def batch_msg(hit: Msg) -> StoredMsg:
    """One of the messages that answer a batch direct get: only there the server says itself how many follow."""
    return direct_msg(hit, int(hit.headers.get("Nats-Num-Pending", 0)))


def leader_msg(answer: Mapping[str, Any]) -> StoredMsg:
    """The answer to ``STREAM.MSG.GET``."""
    found = answer["message"]
    headers = _parse_headers(base64.b64decode(found["hdrs"])) if found.get("hdrs") else {}
    return StoredMsg(str(found["subject"]), int(found["seq"]), base64.b64decode(found.get("data", "")), headers, 0)


def _parse_headers(block: bytes) -> dict[str, str]:
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}


def json_object(payload: bytes) -> dict[str, Any]:
    """The answer to an API call. Raises ``BusRefused`` with JetStream's ``err_code``, ``BusUnavailable``."""
    try:
        answer = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise BusUnavailable("JetStream answered something that is not JSON") from error
    if not isinstance(answer, dict):
        raise BusUnavailable("JetStream answered something that is not a JSON object")
    if (problem := answer.get("error")) is not None:
        raise _refusal(problem)
    return answer


def _refusal(problem: Mapping[str, Any]) -> BusUnavailable | BusRefused:
    """What an answer says under ``error``."""
    code = int(problem.get("err_code", problem.get("code", 0)))
    text = f"JetStream: {problem.get('description', 'refused')}"
    return BusUnavailable(text) if code in NOT_READY else BusRefused(text, code)


def acknowledgement(
    answer: Msg | BusUnavailable | BusRefused, publication: Publication
) -> Stored | BusUnavailable | BusRefused:
    """What became of a publication that a stream was to store, errors as values."""
    if not isinstance(answer, Msg):
        return answer
    if status := answer.headers.get("Status"):
        return BusRefused(f"no stream takes {publication.nats_subject}" if status == "503" else status, int(status))
    try:
        told = orjson.loads(answer.payload)
        if "error" not in told:
            return Stored(told["stream"], told["seq"], told.get("duplicate", False))
        refusal = _refusal(told["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return BusUnavailable("JetStream answered something that is no acknowledgement")
    if isinstance(refusal, BusRefused) and refusal.code in {WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_IN_FLIGHT}:
        return RevisionConflict(str(refusal), refusal.code)
    return refusal
