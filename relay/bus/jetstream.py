"""JetStream as Relay uses it: stored publishes, the API as JSON, direct gets. No nats-py JetStream context.

A stored publish is a plain publish with our own inbox as its reply subject: 5 µs, where an awaited
``kv.put`` costs 104. Every call has its own deadline. Errors are ``BusUnavailable`` (no answer: what
was published may or may not be stored) and ``BusRefused`` with JetStream's ``err_code``.

Sources: the JetStream wire API reference; ADR-31 (direct get and its batch forms); ADR-8 (KV).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from gevent.event import Event

from relay.bus.client import Bus, Msg, Publication
from relay.errors import BusRefused, BusUnavailable, RevisionConflict

API = "$JS.API"

WRONG_LAST_SEQUENCE = 10071
STREAM_NOT_FOUND = 10059
WRONG_STREAM = 10060
NO_MESSAGE_FOUND = 10037
TOO_LARGE_FOR_STREAM = 10054
STREAM_NAME_IN_USE = 10058
NOT_ENABLED = 10076
NOT_ENABLED_FOR_ACCOUNT = 10039

MULTI_GET_LIMIT = 1000
"""Keys in one ``multi_last`` request; the server answers at most 1,024 matches."""

EXPECTED_LAST_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_STREAM = "Nats-Expected-Stream"
DEDUPLICATION_ID = "Nats-Msg-Id"


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


class JetStream:
    """JetStream over one ``Bus``. All methods block the calling greenlet for at most ``timeout_seconds``."""

    def __init__(self, bus: Bus, timeout_seconds: float = 5.0) -> None:
        self._bus = bus
        self._timeout_seconds = timeout_seconds

    def store(
        self, publications: list[Publication], timeout_seconds: float
    ) -> list[Stored | BusUnavailable | BusRefused]:
        """Publishes all in one write and waits for every acknowledgement; same order, errors as values.

        ``RevisionConflict`` is the answer to a wrong ``Nats-Expected-Last-Subject-Sequence``.
        """
        answers = self._bus.request_all(publications, timeout_seconds)
        return [
            answer if isinstance(answer, Exception) else _acknowledgement(answer, publication)
            for publication, answer in zip(publications, answers, strict=True)
        ]

    def api(self, call: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One JetStream API call, e.g. ``STREAM.INFO.EMAIL_LOG``; the answer's JSON object.

        Raises ``BusUnavailable``; ``BusRefused`` with JetStream's ``err_code``, 503 when JetStream is not there.
        """
        payload = orjson.dumps(body) if body is not None else b""
        answer = self._bus.request(Publication(f"{API}.{call}", payload), self._timeout_seconds)
        return _json_object(answer.payload)

    def get_last(self, stream: str, nats_subject: str) -> StoredMsg | None:
        """The last message on a subject: by direct get, or from the leader where the stream allows no direct get."""
        try:
            request = Publication(f"{API}.DIRECT.GET.{stream}.{nats_subject}", b"")
            answer = self._bus.request(request, self._timeout_seconds)
        except BusRefused as error:
            if error.code != 503:
                raise
            return self.get_last_from_leader(stream, nats_subject)
        if answer.status == "404":
            return None
        return _stored_msg(answer)

    def get_last_from_leader(self, stream: str, nats_subject: str) -> StoredMsg | None:
        """The same question asked of the leader: never stale, and works without ``allow_direct``."""
        return self._ask_leader(stream, {"last_by_subj": nats_subject})

    def _ask_leader(self, stream: str, question: Mapping[str, Any]) -> StoredMsg | None:
        try:
            found = self.api(f"STREAM.MSG.GET.{stream}", question)["message"]
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return None
            raise
        headers = _parse_headers(base64.b64decode(found["hdrs"])) if found.get("hdrs") else {}
        return StoredMsg(str(found["subject"]), int(found["seq"]), base64.b64decode(found.get("data", "")), headers, 0)

    def get_many(self, stream: str, request: Mapping[str, Any]) -> list[StoredMsg]:
        """A batch direct get (``multi_last``, or ``batch`` with ``next_by_subj``): what the stream has, in its order.

        A stream that allows no direct get (lfx's chart makes such a bucket) is asked message by message.
        Raises ``BusUnavailable`` when the answers stop coming, ``BusRefused`` (413: more than 1,024 matches).
        """
        batch = _Batch()
        token = self._bus.request_stream(Publication(f"{API}.DIRECT.GET.{stream}", orjson.dumps(request)), batch)
        try:
            if not batch.done.wait(self._timeout_seconds):
                raise BusUnavailable(f"JetStream did not finish answering within {self._timeout_seconds:g} s")
        finally:
            self._bus.forget(token)
        if isinstance(batch.error, BusRefused) and batch.error.code == 503:
            return self._get_many_from_leader(stream, request)
        if batch.error is not None:
            raise batch.error
        return batch.found

    def _get_many_from_leader(self, stream: str, request: Mapping[str, Any]) -> list[StoredMsg]:
        if (nats_subjects := request.get("multi_last")) is not None:
            found = [self.get_last_from_leader(stream, nats_subject) for nats_subject in nats_subjects]
            return [each for each in found if each is not None]
        taken: list[StoredMsg] = []
        sequence = int(request["seq"])
        while len(taken) < int(request["batch"]):
            each = self._ask_leader(stream, {"seq": sequence, "next_by_subj": request["next_by_subj"]})
            if each is None:
                break
            taken.append(each._replace(pending=1))
            sequence = each.sequence + 1
        else:
            return taken
        return [*taken[:-1], *(each._replace(pending=0) for each in taken[-1:])]


class _Batch:
    """Collects a batch direct get: messages, then an end marker (204), or one error status."""

    def __init__(self) -> None:
        self.found: list[StoredMsg] = []
        self.error: BusUnavailable | BusRefused | None = None
        self.done = Event()

    def take(self, msg: Msg) -> bool:
        if not msg.status:
            self.found.append(_stored_msg(msg))
            return False
        if msg.status not in {"204", "404"}:
            self.error = BusRefused(f"JetStream answered {msg.status} to a batch get", int(msg.status))
        self.done.set()
        return True

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        self.error = error
        self.done.set()


def _stored_msg(msg: Msg) -> StoredMsg:
    if msg.status:
        raise BusRefused(f"JetStream answered {msg.status} to a direct get", int(msg.status))
    headers = msg.headers
    return StoredMsg(
        headers["Nats-Subject"],
        int(headers["Nats-Sequence"]),
        msg.payload,
        headers,
        int(headers.get("Nats-Num-Pending", 0)),
    )


def _parse_headers(block: bytes) -> dict[str, str]:
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise BusUnavailable("JetStream answered something that is not JSON") from error
    if not isinstance(answer, dict):
        raise BusUnavailable("JetStream answered something that is not a JSON object")
    if (problem := answer.get("error")) is not None:
        code = int(problem.get("err_code", problem.get("code", 0)))
        raise BusRefused(f"JetStream: {problem.get('description', 'refused')}", code)
    return answer


def _acknowledgement(msg: Msg, publication: Publication) -> Stored | BusUnavailable | BusRefused:
    if msg.status:
        return BusRefused(
            f"no stream takes {publication.nats_subject}" if msg.status == "503" else msg.status, int(msg.status)
        )
    try:
        answer = _json_object(msg.payload)
        return Stored(str(answer["stream"]), int(answer["seq"]), bool(answer.get("duplicate", False)))
    except BusRefused as error:
        return RevisionConflict(str(error), error.code) if error.code == WRONG_LAST_SEQUENCE else error
    except BusUnavailable as error:
        return error
