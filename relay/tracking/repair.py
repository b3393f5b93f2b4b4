"""Log and records brought together again: facts that the records say are missing, facts that they say never were.

A mail's record is written before its facts are, but for ``sent``, and each by itself, so a crash, or an
acknowledgement that was lost, may leave the log short of a fact or with one twice. The records are right: what the
log lacks is appended, with the deduplication id that the worker itself would use, and what it has too much is deleted.

- A mail whose record says ``in_doubt`` may have a ``sent`` fact or not: nobody knows.
- A fact whose mail has no record (any more), or one of another group, is counted and kept: records may have expired.
- Opens and clicks: so many as the record counts. Those whose event ids the record lists are told apart; those that
  it only counts (its lists are bounded) get ids of our own, ``unlisted-<n>``, when the log lacks them.

**While mails are sent and events come.** The log is read first, to its end of that moment, then the records, which
are ahead of their facts. Of every mail that seems wrong the record is read again from the leader; it is left alone
when it was written less than ``min_age_seconds`` ago, and so is a fact logged since then. Before it is deleted a fact
is read once more. To do it all again changes nothing.

Memory is bounded: facts are held, for ``FACTS_AT_ONCE`` at a time; a larger log is gone through several times, each
time for a part of the mails.
"""

from __future__ import annotations

import itertools
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from relay import contract
from relay.bus.client import Publication
from relay.bus.jetstream import NO_MESSAGE_FOUND, SEQUENCE_NOT_FOUND, JetStream, Stored
from relay.bus.stored import StoredMsg, leader_msg
from relay.errors import BusRefused
from relay.tracking.feed import LoggedFact, facts, logged_fact, sequence_at, subject_filter
from relay.tracking.groups import SHARED_TOKEN, group_token
from relay.tracking.log import Fact, fact_publication, facts_of
from relay.tracking.record import earliest, is_email_id, parse_record, parse_time
from relay.tracking.storage import patiently

FACTS_AT_ONCE = 150_000
"""Some 80 MB."""
MIN_AGE_SECONDS = 180
"""Longer than the log knows a repeated fact, and than a record in doubt is tried to be settled."""
EXAMPLES = 10
MOST_UNLISTED = 10_000
"""Opens or clicks of one mail that only its record's number speaks for: more is a broken number, and left as it is."""

COUNTED = frozenset({Fact.OPEN, Fact.CLICK})
"""Facts that a mail may have any number of; of the others one."""
TIME_FIELDS = {
    Fact.SENT: "sent_at",
    Fact.DELIVERED: "delivered_at",
    Fact.OPENED: "last_opened_at",
    Fact.OPEN: "last_opened_at",
    Fact.CLICKED: "last_clicked_at",
    Fact.CLICK: "last_clicked_at",
    Fact.FAILED: "failed_at",
    Fact.BOUNCED: "bounced_at",
    Fact.COMPLAINED: "complained_at",
    Fact.DELAYED: "delayed_at",
    Fact.REJECTED: "rejected_at",
    Fact.UNSUBSCRIBED: "unsubscribed_at",
}

_DONE: list[LoggedFact] = []
"""Stands for the facts of a mail that was looked at."""
_EVENT_ID = re.compile(r"[\x21-\x7e]{1,256}")
_STREAM = f"KV_{contract.RECIPIENTS_BUCKET}"
_PREFIX = f"$KV.{contract.RECIPIENTS_BUCKET}."


class Missing(NamedTuple):
    """A fact that the log lacks."""

    fact: Fact
    at: str
    event_id: str


class Difference(NamedTuple):
    """What is wrong with the facts of one mail."""

    missing: list[Missing]
    surplus: list[LoggedFact]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)


class Report:
    """What was found, or what was done about it."""

    def __init__(self) -> None:
        self.records = 0
        """Records of the group, or of all."""
        self.facts = 0
        self.missing: Counter[str] = Counter()
        self.surplus: Counter[str] = Counter()
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
        return not self.missing and not self.surplus

    def note(self, email_id: str, difference: Difference) -> None:
        """Counts what is wrong with a mail's facts."""
        self.missing.update(each.fact.value for each in difference.missing)
        self.surplus.update(each.fact for each in difference.surplus)
        found = [f"missing {each.fact.value} {email_id}" for each in difference.missing]
        found += [f"surplus {each.fact} {email_id}" for each in difference.surplus]
        self.examples += found[: EXAMPLES - len(self.examples)]


Act = Callable[[str, str, Difference], Difference]
"""What is done about a mail's facts: its email_id, its group's token, the difference; what was done of it."""


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


def token_of(email_id: str, record: Mapping[str, Any]) -> str:
    """Under which token the facts of a mail are logged; '' when its record does not say."""
    group_id = record.get("group_id")
    if not isinstance(group_id, str):
        return ""
    return SHARED_TOKEN if group_id == email_id else group_token(group_id)


# -- one mail ---------------------------------------------------------------------------------------------------------
def compare(record: Mapping[str, Any], logged: list[LoggedFact]) -> Difference:
    """What the log lacks of a mail and what it has too much. ``logged``: its facts under its group's token."""
    counts = facts_of(record)
    difference = Difference([], [])
    by_fact: dict[str, list[LoggedFact]] = defaultdict(list)
    for each in sorted(logged):
        by_fact[each.fact].append(each)
    for fact in Fact:
        have = by_fact[fact.value]
        stated = int(counts.get(fact, 0))
        least, most = _sent(record) if fact is Fact.SENT else (stated, stated)
        if fact in COUNTED:
            # A record that says nothing of them, as after lfx's poller rewrote it, is no reason to delete any.
            count = stated if _speaks_of(record, fact) else max(stated, len(have))
            _compare_counted(record, fact, count, have, difference)
        else:
            if not stated and fact is not Fact.SENT and not _speaks_of(record, fact):
                most = 1
            difference.surplus.extend(have[most:])
            if len(have) < least:
                difference.missing.append(Missing(fact, _time_of(record, fact), ""))
    return difference


def _speaks_of(record: Mapping[str, Any], fact: Fact) -> bool:
    """Whether the record itself says that there was none, or how many. A field that is missing, or of another type,
    says nothing: the log may be the only one that knows."""
    match fact:
        case Fact.DELIVERED | Fact.FAILED | Fact.OPENED:
            return isinstance(record.get(fact.value), bool)
        case Fact.OPEN:
            number = record.get("open_count")
            return (isinstance(number, int) and not isinstance(number, bool)) or (
                number is None and isinstance(record.get("opened_at_list"), list)
            )
        case Fact.CLICK | Fact.CLICKED:
            number = record.get("click_count")
            return isinstance(number, int) and not isinstance(number, bool)
        case _:
            return False


def _sent(record: Mapping[str, Any]) -> tuple[int, int]:
    """How many ``sent`` facts there must and may be."""
    outcome = record.get("outcome")
    if outcome and not isinstance(outcome, str):
        return 0, 1
    if not outcome:
        return 1, 1
    return 0, int(outcome not in {"failed", "deferred"})


def _compare_counted(
    record: Mapping[str, Any], fact: Fact, count: int, have: list[LoggedFact], difference: Difference
) -> None:
    seen: set[str] = set()
    single: list[LoggedFact] = []
    for each in have:
        if each.event_id and each.event_id in seen:
            difference.surplus.append(each)
        else:
            seen.add(each.event_id)
            single.append(each)
    listed = dict(list(_listed(record, fact))[:count])
    if len(single) > count:
        unlisted = [each for each in single if each.event_id not in listed]
        difference.surplus.extend(unlisted[len(unlisted) - (len(single) - count) :])
    room = max(0, count - len(single))
    lacking = [Missing(fact, at, event_id) for event_id, at in listed.items() if event_id not in seen][:room]
    if 0 < room - len(lacking) <= MOST_UNLISTED:
        own_ids = islice(_own_ids(seen), room - len(lacking))
        lacking += [Missing(fact, _time_of(record, fact), own_id) for own_id in own_ids]
    difference.missing.extend(lacking)


def _listed(record: Mapping[str, Any], fact: Fact) -> Iterator[tuple[str, str]]:
    """The events of a kind that the record tells apart: id and time."""
    opens = record.get("opened_at_list") if fact is Fact.OPEN else None
    for each in opens if isinstance(opens, list) else ():
        event_id = each.get("event_id") if isinstance(each, dict) else None
        if isinstance(event_id, str) and _EVENT_ID.fullmatch(event_id):
            yield event_id, earliest(each.get("opened_at")) or _time_of(record, fact)


def _own_ids(taken: set[str]) -> Iterator[str]:
    """Ids for events that the record only counts, none of them taken."""
    for number in itertools.count(1):
        if (own_id := f"unlisted-{number}") not in taken:
            yield own_id


def _time_of(record: Mapping[str, Any], fact: Fact) -> str:
    """When it happened, as far as the record says; else when the mail was sent."""
    if fact is Fact.OPENED:
        opens = record.get("opened_at_list")
        times = [each.get("opened_at") for each in opens if isinstance(each, dict)] if isinstance(opens, list) else []
        if first := earliest(*times):
            return first
    return earliest(record.get(TIME_FIELDS[fact])) or earliest(record.get("sent_at"))


# -- a group, or all --------------------------------------------------------------------------------------------------
def _tell_nobody(_count: int) -> None:
    pass


class Repair:
    """Looks at a group (its id), or at everything (None), and mends it.

    Both methods tell ``on_progress`` how many messages were read more, of ``total``. All wait for a NATS that is away
    and raise ``BusUnavailable`` when it stays away, ``BusRefused``.
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
        self._scope = Scope(group_id)
        self._min_age_seconds = min_age_seconds
        self._on_progress: Callable[[int], None] = _tell_nobody
        logged = patiently(partial(jetstream.stream_info, contract.LOG_STREAM))
        self._end = logged.last_sequence
        self._kept_seconds = int(logged.config.get("max_age") or 0) / 1_000_000_000
        """How long the log keeps a fact; 0: for ever."""
        self._is_alone = group_id is not None and self._is_mail_without_group(group_id)
        """The group is one mail that was sent without a group."""
        count = self._count_facts()
        self._parts = 1 if self._is_alone else -(-count // facts_at_once) or 1
        records = 1 if self._is_alone else patiently(partial(jetstream.stream_info, _STREAM)).messages
        self.total = self._parts * (count + records)
        """How many messages there are to be read, about."""

    def look(self, on_progress: Callable[[int], None] = _tell_nobody) -> Report:
        """What is missing and what is surplus; changes nothing."""
        self._on_progress = on_progress
        return self._walk(lambda _email_id, _token, difference: difference)

    def mend(self, on_progress: Callable[[int], None] = _tell_nobody) -> Report:
        """Appends what is missing, deletes what is surplus; the report says what."""
        self._on_progress = on_progress
        return self._walk(self._apply)

    def _is_mail_without_group(self, group_id: str) -> bool:
        if not is_email_id(group_id) or self._counts(group_token(group_id)):
            return False
        found = patiently(partial(self._read_again, group_id))
        record = parse_record(found[0]) if found is not None else None
        return record is not None and record.get("group_id") == group_id

    def _count_facts(self) -> int:
        if self._scope.group_id is None:
            return patiently(partial(self._jetstream.stream_info, contract.LOG_STREAM)).messages
        return self._counts(SHARED_TOKEN if self._is_alone else group_token(self._scope.group_id))

    def _counts(self, token: str) -> int:
        counts = patiently(partial(self._jetstream.count_by_subject, contract.LOG_STREAM, subject_filter(token)))
        return sum(counts.values())

    def _walk(self, act: Act) -> Report:
        report = Report()
        now = time.time()
        young_from = sequence_at(self._jetstream, now - self._min_age_seconds)
        for part in range(self._parts):
            logged = self._logged(part, report)
            for msg in self._records():
                email_id = msg.nats_subject.removeprefix(_PREFIX)
                if not is_email_id(email_id) or zlib.crc32(email_id.encode()) % self._parts != part:
                    continue
                own = logged.get(email_id, [])
                record = self._record(msg.payload)
                if record is None or own is _DONE:
                    continue
                report.records += 1
                token = token_of(email_id, record)
                report.ownerless += sum(each.token != token for each in own)
                if own:
                    logged[email_id] = _DONE
                if token and compare(record, [each for each in own if each.token == token]):
                    self._examine(email_id, own, now, young_from, report, act)
            report.ownerless += sum(map(len, logged.values()))
        return report

    def _logged(self, part: int, report: Report) -> dict[str, list[LoggedFact]]:
        """The facts of this part's mails, by mail."""
        logged: dict[str, list[LoggedFact]] = defaultdict(list)
        group_id = self._scope.group_id
        token = "" if group_id is None else SHARED_TOKEN if self._is_alone else group_token(group_id)
        for page in facts(self._jetstream, subject_filter(token), 1, self._end):
            self._on_progress(len(page))
            for each in page:
                if self._is_alone and each.email_id != group_id:
                    continue
                if zlib.crc32(each.email_id.encode("utf-8", "replace")) % self._parts == part:
                    logged[each.email_id].append(each)
                    report.facts += 1
        return logged

    def _records(self) -> Iterator[StoredMsg]:
        """The bucket's messages; one that is changed meanwhile may come twice."""
        keys = self._scope.group_id if self._is_alone else ">"
        sequence: int | None = 1
        while sequence is not None:
            page = patiently(partial(self._jetstream.page, _STREAM, f"{_PREFIX}{keys}", sequence))
            self._on_progress(len(page.msgs))
            yield from (msg for msg in page.msgs if not msg.is_deleted)
            sequence = page.next_sequence

    def _record(self, value: bytes) -> dict[str, Any] | None:
        if self._scope.needle not in value:
            return None
        record = parse_record(value)
        return record if record is not None and self._scope.has(record) else None

    def _examine(
        self,
        email_id: str,
        logged: list[LoggedFact],
        now: float,
        young_from: int,
        report: Report,
        act: Act,
    ) -> None:
        """Looks again, at what the leader has now."""
        found = patiently(partial(self._read_again, email_id))
        if found is None:
            return
        value, written_at = found
        record = self._record(value)
        if record is None:
            return
        if written_at > now - self._min_age_seconds:
            report.left_alone += 1
            return
        token = token_of(email_id, record)
        missing, surplus = compare(record, [each for each in logged if each.token == token])
        missing = [each for each in missing if not self._has_expired(record, each)]
        difference = Difference(missing, [each for each in surplus if each.sequence < young_from])
        if difference:
            done = act(email_id, token, difference)
            report.note(email_id, done)
            report.repeated += len(difference.missing) - len(done.missing)

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

    # -- mend ----------------------------------------------------------------------------------
    def _apply(self, email_id: str, token: str, difference: Difference) -> Difference:
        appended = []
        for lacking in difference.missing:
            publication = fact_publication(token, lacking.fact, email_id, lacking.at, lacking.event_id)
            if self._append(publication):
                appended.append(lacking)
        for each in difference.surplus:
            patiently(partial(self._delete, each))
        return Difference(appended, difference.surplus)

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
