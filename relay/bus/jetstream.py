"""JetStream as Relay uses it: stored publishes, the API as JSON, direct gets. No nats-py JetStream context.

A stored publish is a plain publish with our own inbox as its reply subject: 5 µs, where an awaited
``kv.put`` costs 104.

Direct gets are answered by any replica, and a replica may lag: what it has is a piece of the stream
without holes, but its end may be missing. So what a direct get does not find is asked again of the
stream's leader (``STREAM.MSG.GET``). The same request serves a stream that allows no direct get, a user who may
not ask for one, and a server that is too old to know batches: it answers with one message and never says the end.

Every call has one deadline for all the requests it makes: ``timeout_seconds``, or the ``JetStream``'s own.
Every call raises ``BusUnavailable`` (not connected, no answer in time, no leader right now: what was
published may or may not be stored) and ``BusRefused`` with JetStream's ``err_code``, 503 when JetStream is not
there, or ``DENIED`` when this user may not ask for it; what else a code means, the method says.

Sources: the JetStream wire API reference; ADR-31 (direct get and its batch forms); ADR-8 (KV).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson
from gevent.event import Event

from relay.bus.client import Bus, Msg, Publication, seconds_left
from relay.bus.follow import Follower
from relay.bus.outbox import DENIED
from relay.bus.stored import (
    Stored,
    StoredMsg,
    StreamInfo,
    StreamPage,
    acknowledgement,
    batch_msg,
    direct_msg,
    is_hit,
    json_object,
    leader_msg,
    stream_info,
)
from relay.errors import BusRefused, BusUnavailable

__all__ = ["DENIED", "JetStream", "Stored", "StoredMsg", "StreamInfo", "StreamPage"]

API = "$JS.API"

STREAM_NOT_FOUND = 10059
WRONG_STREAM = 10060
NO_MESSAGE_FOUND = 10037
SEQUENCE_NOT_FOUND = 10043
TOO_LARGE_FOR_STREAM = 10054
STREAM_NAME_IN_USE = 10058
NOT_ENABLED = 10076
NOT_ENABLED_FOR_ACCOUNT = 10039

TOO_MANY_RESULTS = 413

MULTI_GET_LIMIT = 1000
"""Keys in one ``multi_last`` request; the server answers at most 1,024 matches."""

PAGE_LIMIT = 1000
PAGE_BYTES = 4 * 1024 * 1024
"""Of a page, unless its first message alone is larger: what a reader of large records holds in memory at a time."""

LEADER_REQUESTS_AT_ONCE = 250
"""The server's queue of API requests is everybody's; full, it drops what it holds."""

EXPECTED_LAST_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_STREAM = "Nats-Expected-Stream"
DEDUPLICATION_ID = "Nats-Msg-Id"

LEAST_NATS_SERVER = (2, 12)
FIRST_WITH_BATCHES = (2, 11)

ONE_MESSAGES_OWN = frozenset({413, TOO_LARGE_FOR_STREAM})
"""Refusals that say nothing about the next message: this one is too large for the server or the stream."""

NO_DIRECT_GET = frozenset({503, DENIED})
"""Nobody answers, or nobody may ask: the leader is asked instead."""


class JetStream:
    """JetStream over one ``Bus``. All methods block the calling greenlet until their deadline at most."""

    def __init__(self, bus: Bus, timeout_seconds: float = 5.0) -> None:
        self._bus = bus
        self._timeout_seconds = timeout_seconds

    # -- write -----------------------------------------------------------------------------
    def store(
        self, publications: list[Publication], timeout_seconds: float | None = None
    ) -> list[Stored | BusUnavailable | BusRefused]:
        """Publishes all in one write and waits for every acknowledgement; same order, errors as values.

        ``RevisionConflict`` is the answer to a wrong ``Nats-Expected-Last-Subject-Sequence``. Never raises.
        """
        answers = self._bus.request_all(publications, self._seconds(timeout_seconds))
        return list(map(acknowledgement, answers, publications))

    def delete_msg(self, stream: str, sequence: int, timeout_seconds: float | None = None) -> bool:
        """Deletes one message and overwrites its bytes; False when the stream has no such message (any more).

        May be repeated. Raises ``BusRefused`` when the stream forbids it or never got that far.
        """
        try:
            self.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence}, timeout_seconds)
        except BusRefused as error:
            if error.code in {SEQUENCE_NOT_FOUND, NO_MESSAGE_FOUND}:
                return False
            raise
        return True

    # -- ask the leader --------------------------------------------------------------------
    def api(
        self, call: str, body: Mapping[str, Any] | None = None, timeout_seconds: float | None = None
    ) -> dict[str, Any]:
        """One JetStream API call, e.g. ``STREAM.INFO.EMAIL_LOG``; the answer's JSON object."""
        answer = self._bus.request(_api_request(call, body), self._seconds(timeout_seconds))
        return json_object(answer.payload)

    def stream_info(self, stream: str, timeout_seconds: float | None = None) -> StreamInfo:
        """The stream's configuration and figures. ``STREAM_NOT_FOUND`` when there is none."""
        return stream_info(self.api(f"STREAM.INFO.{stream}", None, timeout_seconds))

    def last_sequence(self, stream: str, timeout_seconds: float | None = None) -> int:
        """The sequence of the newest message that was stored, 0 when there never was one."""
        return self.stream_info(stream, timeout_seconds).last_sequence

    def count_by_subject(
        self, stream: str, nats_subject_filter: str, timeout_seconds: float | None = None
    ) -> dict[str, int]:
        """How many messages each subject has that the filter (``*`` and ``>`` are wildcards) matches and has any.

        One request for every 100,000 subjects; subjects that come or go between two requests may be missed.
        """
        deadline = self.deadline(timeout_seconds)
        counts: dict[str, int] = {}
        offset = 0
        while True:
            body = {"subjects_filter": nats_subject_filter, "offset": offset}
            answer = self.api(f"STREAM.INFO.{stream}", body, seconds_left(deadline))
            page = answer["state"].get("subjects") or {}
            counts |= page
            offset += len(page)
            if not page or offset >= int(answer.get("total", 0)):
                return counts

    def get_last_from_leader(
        self, stream: str, nats_subject: str, timeout_seconds: float | None = None
    ) -> StoredMsg | None:
        """The last message on a subject, never stale; None when there is none."""
        return self._ask_leader(stream, {"last_by_subj": nats_subject}, self._seconds(timeout_seconds))

    def _ask_leader(self, stream: str, question: Mapping[str, Any], timeout_seconds: float) -> StoredMsg | None:
        try:
            return leader_msg(self.api(f"STREAM.MSG.GET.{stream}", question, timeout_seconds))
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return None
            raise

    def _last_of_each_from_leader(
        self, stream: str, nats_subjects: Sequence[str], deadline: float
    ) -> Iterable[StoredMsg]:
        for start in range(0, len(nats_subjects), LEADER_REQUESTS_AT_ONCE):
            asked = nats_subjects[start : start + LEADER_REQUESTS_AT_ONCE]
            requests = [_api_request(f"STREAM.MSG.GET.{stream}", {"last_by_subj": each}) for each in asked]
            for answer in self._bus.request_all(requests, seconds_left(deadline)):
                if isinstance(answer, Exception):
                    raise answer
                if answer.status:
                    raise BusRefused(f"JetStream answered {answer.status} for {stream}", int(answer.status))
                try:
                    yield leader_msg(json_object(answer.payload))
                except BusRefused as error:
                    if error.code != NO_MESSAGE_FOUND:
                        raise

    def _page_from_leader(
        self, stream: str, nats_subject: str, from_sequence: int, limit: int, max_bytes: int, deadline: float
    ) -> StreamPage:
        """Message by message: the end that a replica has not got yet, or all where no direct get is allowed."""
        msgs: list[StoredMsg] = []
        size_bytes = 0
        for _ in range(limit + 1):  # one more, to know whether it is the last page
            question = {"seq": from_sequence, "next_by_subj": nats_subject}
            each = self._ask_leader(stream, question, seconds_left(deadline))
            if each is None:
                return StreamPage(msgs, None)
            size_bytes += len(each.payload)
            if len(msgs) == limit or (msgs and size_bytes > max_bytes):
                break
            msgs.append(each._replace(pending=1))
            from_sequence = each.sequence + 1
        return StreamPage(msgs, from_sequence)

    # -- ask any replica -------------------------------------------------------------------
    def get_last(self, stream: str, nats_subject: str, timeout_seconds: float | None = None) -> StoredMsg | None:
        """The last message on a subject, None when there is none. A miss is asked again of the leader."""
        deadline = self.deadline(timeout_seconds)
        try:
            request = Publication(f"{API}.DIRECT.GET.{stream}.{nats_subject}", b"")
            answer = self._bus.request(request, seconds_left(deadline))
            if is_hit(answer):
                return direct_msg(answer)
            if answer.status != "404":
                raise BusRefused(f"JetStream answered {answer.status} to a direct get", int(answer.status or 0))
        except BusRefused as error:
            if error.code not in NO_DIRECT_GET:
                raise
        return self.get_last_from_leader(stream, nats_subject, seconds_left(deadline))

    def get_last_of_each(
        self, stream: str, nats_subjects: Sequence[str], timeout_seconds: float | None = None
    ) -> dict[str, StoredMsg]:
        """The last message on each of the (plain) subjects, those that have none left out; 1,000 a request.

        Misses are asked again of the leader. A hit may be stale by what its replica lags.
        """
        deadline = self.deadline(timeout_seconds)
        found: dict[str, StoredMsg] = {}
        for start in range(0, len(nats_subjects), MULTI_GET_LIMIT):
            asked = nats_subjects[start : start + MULTI_GET_LIMIT]
            for each in self._batch(stream, {"multi_last": asked}, seconds_left(deadline)) or ():
                found[each.nats_subject] = each
        missing = [nats_subject for nats_subject in nats_subjects if nats_subject not in found]
        found |= {each.nats_subject: each for each in self._last_of_each_from_leader(stream, missing, deadline)}
        return found

    def page(
        self,
        stream: str,
        nats_subject: str,
        from_sequence: int,
        limit: int = PAGE_LIMIT,
        *,
        max_bytes: int = PAGE_BYTES,
        timeout_seconds: float | None = None,
    ) -> StreamPage:
        """The messages on ``nats_subject`` (``*`` and ``>`` are wildcards) from a sequence on.

        At most ``limit`` and about ``max_bytes``, at least one when there is one. What stands before the end of a
        page was all seen; the last page's end is the leader's.
        """
        deadline = self.deadline(timeout_seconds)
        from_sequence = max(1, from_sequence)
        request = {"seq": from_sequence, "next_by_subj": nats_subject, "batch": limit, "max_bytes": max_bytes}
        found = self._batch(stream, request, seconds_left(deadline)) or []
        if found:
            from_sequence = found[-1].sequence + 1
            if found[-1].pending:
                return StreamPage(found, from_sequence)
        rest_bytes = max_bytes - sum(len(each.payload) for each in found)
        limit = limit - len(found) if rest_bytes > 0 else 0
        rest = self._page_from_leader(stream, nats_subject, from_sequence, limit, rest_bytes, deadline)
        return StreamPage(found + rest.msgs, rest.next_sequence)

    def get_many(
        self, stream: str, request: Mapping[str, Any], timeout_seconds: float | None = None
    ) -> list[StoredMsg]:
        """A batch direct get as it is (``multi_last``, or ``seq``, ``next_by_subj`` and ``batch``): what a replica has.

        In the stream's order. A stream that allows no direct get is asked message by message. ``TOO_MANY_RESULTS``
        for more than 1,024 matches of ``multi_last``.
        """
        deadline = self.deadline(timeout_seconds)
        found = self._batch(stream, request, seconds_left(deadline))
        if found is not None:
            return found
        if (nats_subjects := request.get("multi_last")) is not None:
            return list(self._last_of_each_from_leader(stream, nats_subjects, deadline))
        page = self._page_from_leader(
            stream, request["next_by_subj"], int(request["seq"]), int(request["batch"]), PAGE_BYTES, deadline
        )
        if page.next_sequence is None and page.msgs:
            page.msgs[-1] = page.msgs[-1]._replace(pending=0)
        return page.msgs

    def _batch(self, stream: str, request: Mapping[str, Any], timeout_seconds: float) -> list[StoredMsg] | None:
        """None: no batch is to be had here, or there is no such stream; the leader knows."""
        if _is_older(self._bus.server_version, FIRST_WITH_BATCHES):
            return None
        batch = _Batch()
        token = self._bus.request_stream(Publication(f"{API}.DIRECT.GET.{stream}", orjson.dumps(request)), batch)
        try:
            if not batch.done.wait(timeout_seconds):
                raise BusUnavailable(f"JetStream did not finish answering within {timeout_seconds:.3g} s")
        finally:
            self._bus.forget(token)
        if isinstance(batch.error, BusRefused) and batch.error.code in NO_DIRECT_GET:
            return None
        if batch.error is not None:
            raise batch.error
        return batch.found

    # -- follow ----------------------------------------------------------------------------
    def follow(
        self,
        stream: str,
        nats_subject_filter: str,
        *,
        from_sequence: int | None = None,
        on_gap: Callable[[int, int], None] | None = None,
        timeout_seconds: float | None = None,
    ) -> Follower:
        """Every message that the filter matches, from a sequence on (None: from now), then live, each once, in order.

        Returns when the stream is being followed, in time or not at all; see ``Follower``, which must be closed.
        ``STREAM_NOT_FOUND`` when there is none.
        """
        follower = Follower(self._bus, self.api, stream, nats_subject_filter, on_gap)
        follower.open(from_sequence, self._seconds(timeout_seconds))
        return follower

    # -- this server -----------------------------------------------------------------------
    @property
    def server_problem(self) -> str:
        """What an old nats-server lacks for this, in one sentence; '' for one that is new enough, or not known yet."""
        return old_server_problem(self._bus.server_version)

    @property
    def max_payload_bytes(self) -> int:
        """What a message to this server may hold, header fields included."""
        return self._bus.max_payload_bytes

    def _seconds(self, timeout_seconds: float | None) -> float:
        return self._timeout_seconds if timeout_seconds is None else timeout_seconds

    def deadline(self, timeout_seconds: float | None) -> float:
        """On ``time.monotonic()``, of a call that begins now."""
        return time.monotonic() + self._seconds(timeout_seconds)


def old_server_problem(version: str) -> str:
    """What an older nats-server lacks, '' for one that is new enough."""
    if not _is_older(version, LEAST_NATS_SERVER):
        return ""
    least = ".".join(map(str, LEAST_NATS_SERVER))
    return f"nats-server {version} is older than {least}: tracking needs its batch reads; update the server"


def _is_older(version: str, least: tuple[int, int]) -> bool:
    try:
        return tuple(int(part) for part in version.split("-")[0].split(".")[:2]) < least
    except ValueError:  # not known yet
        return False


def _api_request(call: str, body: Mapping[str, Any] | None) -> Publication:
    return Publication(f"{API}.{call}", orjson.dumps(body) if body is not None else b"")


class _Batch:
    """Collects a batch direct get: messages, then an end marker (204), or one error status."""

    def __init__(self) -> None:
        self.found: list[StoredMsg] = []
        self.error: BusUnavailable | BusRefused | None = None
        self.done = Event()

    def take(self, msg: Msg) -> bool:
        if is_hit(msg):
            self.found.append(batch_msg(msg))
            return False
        if msg.status not in {"204", "404"}:
            self.error = BusRefused(f"JetStream answered {msg.status} to a batch get", int(msg.status or 0))
        elif self._is_torn(msg):
            self.error = BusUnavailable("a part of JetStream's answer was lost")
        self.done.set()
        return True

    def _is_torn(self, end: Msg) -> bool:
        """Whether messages are missing: the client drops what it cannot hold, without a word to us.

        Each message names the one before it, the end marker the last.
        """
        before = 0
        for each in self.found:
            if int(each.headers.get("Nats-Last-Sequence", before)) != before:
                return True
            before = each.sequence
        return int(end.headers.get("Nats-Last-Sequence", before)) != before

    def fail(self, error: BusUnavailable | BusRefused) -> None:
        self.error = error
        self.done.set()
