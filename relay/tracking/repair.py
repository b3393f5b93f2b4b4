"""Log and records brought together again: facts that the records say are missing, facts that they say never were.

A mail's record is written before its facts are, but for ``sent``, and each by itself, so a crash, or an
acknowledgement that was lost, may leave the log short of a fact or with one twice. The records are right: what the
log lacks is appended, with the deduplication id that the worker itself would use, and what it has too much is deleted
(``comparison`` says what that is). A fact whose mail has no record (any more), or one of another group, is counted
and kept: records may have expired.

**While mails are sent and events come.** The log is read first, to its end of that moment, then the records, which
are ahead of their facts. Of every mail that seems wrong the record is read again from the leader; it is left alone
when it was written less than ``min_age_seconds`` ago, and so is a fact logged since then. Right before anything is
appended the log is read on to its new end: what has just been logged, by whomever, is not missing. Before it is
deleted a fact is read once more. To do it all again changes nothing.

**Cost.** Log and bucket are gone through once each, however large; a group's facts alone where it is about a group,
but the whole bucket, since only a record says which group it belongs to. Memory is bounded: at most about
``FACTS_AT_ONCE`` facts or mails are held, the others wait in a ``Spill``, by part, as some 200 bytes each.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import orjson

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import NO_MESSAGE_FOUND, SEQUENCE_NOT_FOUND, JetStream, Stored
from relay.bus.kv import Bucket
from relay.bus.stored import leader_msg
from relay.errors import BusRefused
from relay.tracking import folding
from relay.tracking.comparison import Difference, Missing, compare, compared_part
from relay.tracking.facts import COUNTED
from relay.tracking.feed import LoggedFact, facts, logged_fact, sequence_at, subject_filter
from relay.tracking.groups import SHARED_TOKEN, group_token, mail_token
from relay.tracking.log import fact_publication
from relay.tracking.record import is_email_id, parse_record, parse_time, rfc3339
from relay.tracking.spill import Spill
from relay.tracking.storage import patiently

FACTS_AT_ONCE = 150_000
"""Some 80 MB."""
MIN_AGE_SECONDS = 180
"""Longer than the log knows a repeated fact, and than a record in doubt is tried to be settled."""
EXAMPLES = 10
UPDATE_SECONDS = 10.0

_STREAM = f"KV_{contract.RECIPIENTS_BUCKET}"
_PREFIX = f"$KV.{contract.RECIPIENTS_BUCKET}."


class Report:
    """What was found, or what was done about it."""

    def __init__(self) -> None:
        self.records = 0
        """Records of the group, or of all."""
        self.facts = 0
        self.missing: Counter[str] = Counter()
        self.surplus: Counter[str] = Counter()
        self.undeleted: Counter[str] = Counter()
        """Surplus facts that NATS did not let go."""
        self.why_undeleted = ""
        self.left_alone = 0
        """Mails that seem wrong and were changed too recently."""
        self.ownerless = 0
        """Facts whose mail has no record in the group."""
        self.repeated = 0
        """Facts that the log took for repeated ones, since it had them a moment ago: it takes them again later."""
        self.examples: list[str] = []
        """Of what is missing and surplus, the first few."""

    @property
    def is_known(self) -> bool:
        """Whether there is such a group at all."""
        return bool(self.records or self.facts)

    @property
    def is_well(self) -> bool:
        """Whether nothing is missing and nothing surplus."""
        return not (self.missing or self.surplus or self.undeleted)

    def note_missing(self, email_id: str, missing: Missing) -> None:
        """A fact is missing, or was appended."""
        self.missing[missing.fact.value] += 1
        self._give_example(f"missing {missing.fact.value} {email_id}")

    def note_surplus(self, email_id: str, surplus: LoggedFact) -> None:
        """A fact is surplus, or was deleted."""
        self.surplus[surplus.fact] += 1
        self._give_example(f"surplus {surplus.fact} {email_id}")

    def _give_example(self, example: str) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


Act = Callable[[str, str, Difference], None]
"""What is done about a mail's facts: its email_id, its group's token, the difference; it reports what it did."""


class Scope(NamedTuple):
    """What is looked at: a group (its id), or everything (None)."""

    group_id: str | None

    @property
    def needle(self) -> bytes:
        """What every record of the group holds, as written by anyone; b'' where that cannot be said."""
        is_plain = self.group_id is not None and group_token(self.group_id) == self.group_id
        return self.group_id.encode() if self.group_id is not None and is_plain else b""

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether the record belongs to it."""
        return self.group_id is None or record.get("group_id") == self.group_id


def _part_of(email_id: str, parts: int) -> int:
    return zlib.crc32(email_id.encode("utf-8", "replace")) % parts


def _tell_nobody(_count: int) -> None:
    pass


class Source(NamedTuple):
    """Where in the log facts are: under a group's token ('': everybody's), of one mail or ('') of all."""

    token: str
    only_of: str


class LoggedFacts:
    """The facts of the log by mail, one part of the mails at a time, kept as new as they are asked to be.

    Waits for a NATS that is away; raises ``BusUnavailable`` when it stays away, ``BusRefused``, and ``OSError``.
    """

    def __init__(self, jetstream: JetStream, sources: list[Source], parts: int) -> None:
        self._jetstream = jetstream
        self._sources = sources
        self._parts = parts
        self._waiting = Spill(parts)
        self._next_sequence = 1
        self._part = -1
        self._by_mail: dict[str, list[LoggedFact]] = {}
        self._done: set[str] = set()

    def __enter__(self) -> LoggedFacts:
        self._waiting.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._waiting.__exit__(*error)

    def read_on(self, on_progress: Callable[[int], None] = _tell_nobody) -> int:
        """Reads on to the log's end of this moment; how many facts there were. Two questions when there are none."""
        end = patiently(partial(self._jetstream.last_sequence, contract.LOG_STREAM))
        if end < self._next_sequence:
            return 0
        count = 0
        for source in self._sources:
            for page in facts(self._jetstream, subject_filter(source.token), self._next_sequence, end):
                on_progress(len(page))
                wanted = [each for each in page if source.only_of in {"", each.email_id}]
                count += len(wanted)
                for each in wanted:
                    self._put(each)
        self._next_sequence = end + 1
        return count

    def open(self, part: int) -> None:
        """Goes on to the next part: its facts, by mail."""
        self._part = part
        self._done = set()
        self._by_mail = defaultdict(list)
        for line in self._waiting.take(part):
            fact = LoggedFact(*orjson.loads(line))
            self._by_mail[fact.email_id].append(fact)

    def of(self, email_id: str) -> list[LoggedFact]:
        """A mail's facts, in no order, whatever their token."""
        return self._by_mail.get(email_id, [])

    def is_done(self, email_id: str) -> bool:
        """Whether the mail was done with before."""
        return email_id in self._done

    def finish(self, email_id: str) -> None:
        """The mail is done with: its facts are forgotten, also those to come."""
        self._done.add(email_id)
        self._by_mail.pop(email_id, None)

    @property
    def left(self) -> int:
        """Facts of the part that nobody was done with."""
        return sum(map(len, self._by_mail.values()))

    def _put(self, fact: LoggedFact) -> None:
        part = _part_of(fact.email_id, self._parts)
        if part > self._part:
            self._waiting.add(part, orjson.dumps(tuple(fact)))
        elif part == self._part and fact.email_id not in self._done:
            self._by_mail[fact.email_id].append(fact)


class Repair:
    """Looks at a group (its id), or at everything (None), and mends it.

    An email_id means the mail that was sent without a group, whose record names it as its own group. Where callers
    sent other mails with that id as their group, it means all of them.

    Both methods tell ``on_progress`` how many messages were read more, of ``total``. All wait for a NATS that is away
    and raise ``BusUnavailable`` when it stays away, ``BusRefused``, and ``OSError`` when there is no room for a
    ``Spill``; ``report`` is what was done by then. That NATS lets nothing be deleted is reported, not raised.
    """

    def __init__(
        self,
        jetstream: JetStream,
        group_id: str | None,
        *,
        min_age_seconds: float = MIN_AGE_SECONDS,
        facts_at_once: int = FACTS_AT_ONCE,
    ) -> None:
        self._jetstream = jetstream
        self._bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        self._scope = Scope(group_id)
        self._min_age_seconds = min_age_seconds
        self._on_progress: Callable[[int], None] = _tell_nobody
        self.report = Report()
        logged = patiently(partial(jetstream.stream_info, contract.LOG_STREAM))
        self._kept_seconds = int(logged.config.get("max_age") or 0) / 1_000_000_000
        """How long the log keeps a fact; 0: for ever."""
        self.has_mail_without_group = group_id is not None and self._is_mail_without_group(group_id)
        """The group id is the id of a mail that was sent without a group."""
        self.is_alone = self.has_mail_without_group and not self._counts(group_token(group_id or ""))
        """And that mail is all: no group of that id has facts."""
        self._sources = self._where()
        count = logged.messages if group_id is None else sum(self._counts(each.token) for each in self._sources)
        records = 1 if self.is_alone else patiently(partial(jetstream.stream_info, _STREAM)).messages
        self._parts = 1 if self.is_alone else -(-max(count, records) // facts_at_once) or 1
        self.total = count + records
        """How many messages there are to be read, about."""

    def look(self, on_progress: Callable[[int], None] = _tell_nobody) -> Report:
        """What is missing and what is surplus; changes nothing."""
        self._on_progress = on_progress
        return self._walk(self._note)

    def mend(self, on_progress: Callable[[int], None] = _tell_nobody) -> Report:
        """Appends what is missing, deletes what is surplus; the report says what."""
        self._on_progress = on_progress
        return self._walk(self._mend)

    def _is_mail_without_group(self, group_id: str) -> bool:
        if not is_email_id(group_id):
            return False
        found = patiently(partial(self._read_again, group_id))
        record = parse_record(found[0]) if found is not None else None
        return record is not None and record.get("group_id") == group_id

    def _where(self) -> list[Source]:
        group_id = self._scope.group_id
        if group_id is None:
            return [Source("", "")]
        own = [Source(SHARED_TOKEN, group_id)] if self.has_mail_without_group else []
        return own if self.is_alone else [Source(group_token(group_id), ""), *own]

    def _counts(self, token: str) -> int:
        counts = patiently(partial(self._jetstream.count_by_subject, contract.LOG_STREAM, subject_filter(token)))
        return sum(counts.values())

    # -- look ----------------------------------------------------------------------------------
    def _walk(self, act: Act) -> Report:
        self.report = report = Report()
        now = time.time()
        young_from = sequence_at(self._jetstream, now - self._min_age_seconds)
        with LoggedFacts(self._jetstream, self._sources, self._parts) as logged, Spill(self._parts) as records:
            report.facts = logged.read_on(self._on_progress)
            for email_id, record in self._records():
                records.add(_part_of(email_id, self._parts), orjson.dumps([email_id, compared_part(record)]))
            for part in range(self._parts):
                logged.open(part)
                for line in records.take(part):
                    email_id, record = orjson.loads(line)
                    if logged.is_done(email_id):  # it was changed while they were read, and came twice
                        continue
                    report.records += 1
                    token = mail_token(email_id, record.get("group_id"))
                    own = logged.of(email_id)
                    report.ownerless += sum(each.token != token for each in own)
                    if token and compare(record, [each for each in own if each.token == token]):
                        self._examine(email_id, logged, now, young_from, act)
                    logged.finish(email_id)
                report.ownerless += logged.left
        return report

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The records in the bucket, by mail; one that is changed meanwhile may come twice."""
        keys = self._scope.group_id if self.is_alone else ">"
        sequence: int | None = 1
        while sequence is not None:
            page = patiently(partial(self._jetstream.page, _STREAM, f"{_PREFIX}{keys}", sequence))
            self._on_progress(len(page.msgs))
            for msg in page.msgs:
                email_id = msg.nats_subject.removeprefix(_PREFIX)
                record = self._record(msg.payload) if is_email_id(email_id) and not msg.is_deleted else None
                if record is not None:
                    yield email_id, record
            sequence = page.next_sequence

    def _record(self, value: bytes) -> dict[str, Any] | None:
        if self._scope.needle not in value:
            return None
        record = parse_record(value)
        return record if record is not None and self._scope.has(record) else None

    def _examine(self, email_id: str, logged: LoggedFacts, now: float, young_from: int, act: Act) -> None:
        """Looks again, at what the leader has now, and at what has been logged since."""
        found = patiently(partial(self._read_again, email_id))
        if found is None:
            return
        value, written_at = found
        record = self._record(value)
        if record is None:
            return
        if written_at > now - self._min_age_seconds:
            self.report.left_alone += 1
            return
        token = mail_token(email_id, record.get("group_id"))
        logged.read_on()
        missing, surplus = compare(record, [each for each in logged.of(email_id) if each.token == token])
        missing = [each for each in missing if not self._has_expired(record, each)]
        difference = Difference(missing, [each for each in surplus if each.sequence < young_from])
        if difference:
            act(email_id, token, difference)

    def _has_expired(self, record: Mapping[str, Any], missing: Missing) -> bool:
        """Whether the log would no longer have the fact: records live longer, and put back it would outlive its record.

        Without a time of its own, as the opens that only a number speaks for, a fact is as old as the mail.
        """
        if not self._kept_seconds:
            return False
        at = parse_time(record.get("sent_at") if missing.fact in COUNTED else missing.at or record.get("sent_at"))
        return at is not None and at.timestamp() < time.time() - self._kept_seconds

    def _read_again(self, email_id: str) -> tuple[bytes, float] | None:
        """A record and when it was written, from the leader."""
        try:
            answer = self._jetstream.api(f"STREAM.MSG.GET.{_STREAM}", {"last_by_subj": f"{_PREFIX}{email_id}"})
        except BusRefused as error:
            if error.code == NO_MESSAGE_FOUND:
                return None
            raise
        found = leader_msg(answer)
        written_at = parse_time(answer["message"]["time"])
        if found.is_deleted or written_at is None:
            return None
        return found.payload, written_at.timestamp()

    def _note(self, email_id: str, _token: str, difference: Difference) -> None:
        for lacking in difference.missing:
            self.report.note_missing(email_id, lacking)
        for each in difference.surplus:
            self.report.note_surplus(email_id, each)

    # -- mend ----------------------------------------------------------------------------------
    def _mend(self, email_id: str, token: str, difference: Difference) -> None:
        if difference.missing:
            self._tell_record(email_id, difference.missing)
        for lacking in difference.missing:
            publication = fact_publication(token, lacking.fact, email_id, lacking.at, lacking.event_id)
            if self._append(publication):
                self.report.note_missing(email_id, lacking)
            else:
                self.report.repeated += 1
        for each in difference.surplus:
            self._take_out(email_id, each)

    def _tell_record(self, email_id: str, missing: list[Missing]) -> None:
        """Has the record say since when a fact stands in the log, so that an event that comes again finds it there."""
        now = rfc3339(time.time())

        def change(value: bytes | None) -> bytes | None:
            record = parse_record(value) if value is not None else None
            if record is None:
                return None
            told = record
            for each in missing:
                event_id = each.event_id or folding.stated_by(record, each.fact)
                if folding.stated_at(record, event_id, each.fact) is not None:
                    told = folding.with_stated_at(told, event_id, each.fact, now)
            return value if told is record else folding.stored_value(told)

        update = partial(self._bucket.update, email_id, change)
        patiently(lambda: update(deadline=time.monotonic() + UPDATE_SECONDS))

    def _take_out(self, email_id: str, fact: LoggedFact) -> None:
        """Deletes it; what NATS refuses once (the log denies deletion, or this user may not) is not asked again."""
        if not self.report.why_undeleted:
            try:
                patiently(partial(self._delete, fact))
                self.report.note_surplus(email_id, fact)
                return
            except BusRefused as error:
                self.report.why_undeleted = str(error)
        self.report.undeleted[fact.fact] += 1

    def _append(self, publication: Publication) -> bool:
        """Whether it is in the log by that, and was not before as far as the log remembers."""
        tries = 0

        def publish() -> bool:
            nonlocal tries
            tries += 1
            (answer,) = self._jetstream.store([publication])
            if not isinstance(answer, Stored):
                raise answer
            return not answer.is_duplicate or tries > 1  # of an earlier try, whose acknowledgement was lost

        return patiently(publish)

    def _delete(self, fact: LoggedFact) -> None:
        """Unless something else stands there by now: a log may have been made anew."""
        try:
            answer = self._jetstream.api(f"STREAM.MSG.GET.{contract.LOG_STREAM}", {"seq": fact.sequence})
        except BusRefused as error:
            if error.code in {NO_MESSAGE_FOUND, SEQUENCE_NOT_FOUND}:
                return
            raise
        if logged_fact(leader_msg(answer)) == fact:
            self._jetstream.delete_msg(contract.LOG_STREAM, fact.sequence)
