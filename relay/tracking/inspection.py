"""Every bucket and stream as it is, lfx's index too: their limits, and what these cost or lose.

What exists is used as it is, whoever made it. So an operator has to be told what an old bucket lacks, what that
costs, and the command of the ``nats`` tool that changes it. Asks one question a stream and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from relay import contract
from relay.bus.jetstream import DENIED, STREAM_NOT_FOUND, JetStream
from relay.errors import BusRefused
from relay.tracking.storage import DAY_SECONDS, DUPLICATE_WINDOW_SECONDS, MADE_BY, NANOSECONDS, StorageConfig

RECORDS_SUBJECT = f"$KV.{contract.RECIPIENTS_BUCKET}.>"
FACTS_SUBJECT = f"{contract.LOG_PREFIX}.*.*"

FULL_SHARE = 0.9
"""Of a limit on bytes or messages, from which on it counts as reached."""
LEAST_RECORD_BYTES = 64 * 1024
"""What lfx's chart allows a record. Relay keeps a record's lists under 60 KiB, but a group id may be long."""
LEAST_FACT_BYTES = 2048
LEAST_CLAIM_BYTES = 64 * 1024
"""A claim of 100 recipients, each with what the smarthost said of it."""


class Store(NamedTuple):
    """One stream, as its leader sees it."""

    name: str
    """Of the bucket, or of the stream where it is none."""
    stream: str
    config: Mapping[str, Any] | None
    """None: there is no such stream."""
    created: str
    messages: int
    size_bytes: int
    offline: list[str]
    """The servers of its replicas that do not answer."""

    @property
    def made_by(self) -> str:
        """Who made it, as far as can be told."""
        if self.config is None:
            return ""
        told = (self.config.get("metadata") or {}).get(MADE_BY)
        if told:
            return str(told)
        is_as_in_chart = self.number("max_msg_size") == LFX_VALUE_BYTES.get(self.stream)
        return "lfx's chart, it seems" if is_as_in_chart else "unknown"

    def number(self, limit: str) -> int:
        """A limit of the configuration, 0 when there is none."""
        return max(0, int((self.config or {}).get(limit) or 0))

    @property
    def ttl_seconds(self) -> int:
        """How long messages are kept, 0: for ever."""
        return self.number("max_age") // NANOSECONDS


RECORDS = f"KV_{contract.RECIPIENTS_BUCKET}"
FACTS = contract.LOG_STREAM
INDEX = f"KV_{contract.GROUP_INDEX_BUCKET}"
REQUESTS = f"KV_{contract.REQUESTS_BUCKET}"
LFX_VALUE_BYTES = {RECORDS: 64 * 1024, INDEX: 1024 * 1024}


class Remark(NamedTuple):
    """Something that a stream lacks."""

    store: str
    """Its name."""
    loses: bool
    """Whether tracking loses data by it, or request ids are forgotten; else it only costs something."""
    text: str
    command: str
    """What mends it, '' when it has to be made anew."""


class Condition(NamedTuple):
    """What was found."""

    stores: list[Store]
    remarks: list[Remark]

    @property
    def loses(self) -> bool:
        """Whether anything makes tracking lose data, or request ids be forgotten early."""
        return any(remark.loses for remark in self.remarks)


def inspect(jetstream: JetStream, expected: StorageConfig) -> Condition:
    """The streams, and what is wrong with them beside what ``expected`` asks for.

    Raises ``BusUnavailable`` and ``BusRefused`` (no JetStream, no permission).
    """
    records = _look(jetstream, RECORDS, contract.RECIPIENTS_BUCKET)
    facts = _look(jetstream, FACTS, contract.LOG_STREAM)
    index = _look_if_allowed(jetstream, INDEX, contract.GROUP_INDEX_BUCKET)
    remarks: list[Remark] = []
    for store in (records, facts):
        remarks += _remarks(store, Beside(expected, facts))
    requests = _look(jetstream, REQUESTS, contract.REQUESTS_BUCKET)
    if requests.config is not None:  # else the first send worker makes it
        remarks += _remarks(requests, Beside(expected, facts))
    parked = _look_if_allowed(jetstream, contract.PARKED_STREAM, contract.PARKED_STREAM)
    return Condition([records, facts, index, requests, parked], remarks)


def _look(jetstream: JetStream, stream: str, name: str) -> Store:
    try:
        answer = jetstream.api(f"STREAM.INFO.{stream}")
    except BusRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        return Store(name, stream, None, "", 0, 0, [])
    replicas = (answer.get("cluster") or {}).get("replicas") or []
    return Store(
        name,
        stream,
        answer["config"],
        str(answer["created"]),
        int(answer["state"]["messages"]),
        int(answer["state"]["bytes"]),
        [str(each.get("name")) for each in replicas if each.get("offline")],
    )


def _look_if_allowed(jetstream: JetStream, stream: str, name: str) -> Store:
    """A stream that not every relay needs, so that its user may lack the permission to ask: as if there were none."""
    try:
        return _look(jetstream, stream, name)
    except BusRefused as error:
        if error.code != DENIED:
            raise
        return Store(name, stream, None, "", 0, 0, [])


class Beside(NamedTuple):
    """What a stream is compared with."""

    expected: StorageConfig
    facts: Store


class Rule(NamedTuple):
    """One thing that may be wrong with a stream."""

    of: tuple[str, ...]
    is_broken: Callable[[Store, Beside], bool]
    loses: bool
    text: Callable[[Store, Beside], str]
    flags: Callable[[Store, Beside], str]
    """Of ``nats stream edit``; '' when that cannot change it."""


def _remarks(store: Store, beside: Beside) -> Iterator[Remark]:
    if store.config is None:
        yield Remark(store.name, False, "is not there yet: the first worker makes it", "")
        return
    for rule in RULES:
        if store.stream in rule.of and rule.is_broken(store, beside):
            flags = rule.flags(store, beside)
            command = f"nats stream edit {store.stream} {flags} --force" if flags else ""
            yield Remark(store.name, rule.loses, rule.text(store, beside), command)


def _always(text: str) -> Callable[[Store, Beside], str]:
    return lambda _store, _beside: text


def _is(name: str, value: object) -> Callable[[Store, Beside], bool]:
    return lambda store, _beside: (store.config or {}).get(name) == value


def _is_set(name: str) -> Callable[[Store, Beside], bool]:
    return lambda store, _beside: bool((store.config or {}).get(name))


def _is_nearly_full(limit: str, figure: Callable[[Store], int]) -> Callable[[Store, Beside], bool]:
    return lambda store, _beside: 0 < store.number(limit) * FULL_SHARE <= figure(store)


def _has_room(limit: str, figure: Callable[[Store], int]) -> Callable[[Store, Beside], bool]:
    return lambda store, _beside: store.number(limit) * FULL_SHARE > figure(store)


def _when_full(store: Store) -> str:
    if (store.config or {}).get("discard") == "new":
        return "no mail is tracked any more" if store.stream == RECORDS else "no fact is logged any more"
    return "the oldest go"


def _limit_text(limit: str, figure: Callable[[Store], int], unit: str) -> Callable[[Store, Beside], str]:
    def text(store: Store, _beside: Beside) -> str:
        most, share = store.number(limit), figure(store) / store.number(limit)
        return f"holds {most:,} {unit} at most and is {share:.0%} full; when it is, {_when_full(store)}"

    return text


def _takes(store: Store, _beside: Beside) -> bool:
    wanted = _subject(store)
    return any(covers(each, wanted) for each in (store.config or {}).get("subjects") or [])


def _subject(store: Store) -> str:
    return RECORDS_SUBJECT if store.stream == RECORDS else FACTS_SUBJECT


def covers(pattern: str, wanted: str) -> bool:
    """Whether every subject that ``wanted`` matches is matched by ``pattern``."""
    have, want = pattern.split("."), wanted.split(".")
    for place, token in enumerate(have):
        if token == ">":
            return len(want) > place
        if place >= len(want) or want[place] == ">" or token not in {"*", want[place]}:
            return False
    return len(have) == len(want)


def _days(seconds: int) -> str:
    return f"{-(-seconds // DAY_SECONDS)}d" if seconds else "0s"


def duration(seconds: int) -> str:
    """``30d``, ``36h``, ``90s``; the largest unit that fits exactly."""
    for unit, length in (("d", DAY_SECONDS), ("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


BOTH = (RECORDS, FACTS)
ALL = (RECORDS, FACTS, REQUESTS)


def _messages(store: Store) -> int:
    return store.messages


def _bytes(store: Store) -> int:
    return store.size_bytes


RULES = (
    Rule(BOTH, _is_set("sealed"), True, _always("is sealed: nothing can be written to it"), _always("")),
    Rule(BOTH, _is_set("mirror"), True, _always("is a mirror: nothing can be written to it"), _always("--no-mirror")),
    Rule(
        BOTH,
        _is_set("no_ack"),
        True,
        _always("acknowledges nothing, so nothing is tracked"),
        _always("--ack"),
    ),
    Rule(
        BOTH,
        lambda store, beside: not _takes(store, beside) and not (store.config or {}).get("mirror"),
        True,
        lambda store, _: f"does not take all of {_subject(store)}: what it does not take is not tracked",
        lambda store, _: f"--subjects='{_subject(store)}'",
    ),
    Rule(
        BOTH,
        _is("retention", "workqueue"),
        True,
        _always("drops what a consumer has read (work queue)"),
        _always(""),
    ),
    Rule(
        BOTH,
        _is("retention", "interest"),
        True,
        _always("drops what its consumers have read, or everything without one"),
        _always("--retention=limits"),
    ),
    Rule(
        BOTH,
        lambda store, beside: _is("storage", "memory")(store, beside) and beside.expected.storage != "memory",
        True,
        _always("is kept in memory: gone when its servers restart; back it up and make it anew with file storage"),
        _always(""),
    ),
    Rule(
        (RECORDS,),
        _is_set("discard_new_per_subject"),
        True,
        _always("refuses every change of a record: mails stay as they were when they were sent"),
        _always("--no-discard-per-subject"),
    ),
    Rule(
        (RECORDS,),
        lambda store, _: store.number("max_msgs_per_subject") != 1,
        False,
        _always("keeps old values of each record: they take disk and memory, and hold what `relayctl erase` erases"),
        _always("--max-msgs-per-subject=1"),
    ),
    Rule(
        (FACTS,),
        lambda store, _: store.number("max_msgs_per_subject") > 0,
        True,
        lambda store, _: f"keeps {store.number('max_msgs_per_subject'):,} facts of a kind and group: counts end there",
        _always("--max-msgs-per-subject=-1"),
    ),
    Rule(
        BOTH,
        _is_nearly_full("max_bytes", _bytes),
        True,
        _limit_text("max_bytes", _bytes, "bytes"),
        _always("--max-bytes=-1"),
    ),
    Rule(
        BOTH,
        _has_room("max_bytes", _bytes),
        False,
        _limit_text("max_bytes", _bytes, "bytes"),
        _always("--max-bytes=-1"),
    ),
    Rule(
        BOTH,
        _is_nearly_full("max_msgs", _messages),
        True,
        _limit_text("max_msgs", _messages, "messages"),
        _always("--max-msgs=-1"),
    ),
    Rule(
        BOTH,
        _has_room("max_msgs", _messages),
        False,
        _limit_text("max_msgs", _messages, "messages"),
        _always("--max-msgs=-1"),
    ),
    Rule(
        (RECORDS,),
        lambda store, _: 0 < store.number("max_msg_size") < LEAST_RECORD_BYTES,
        True,
        lambda store, _: f"takes records of {store.number('max_msg_size'):,} bytes: larger ones are not stored",
        _always("--max-msg-size=-1"),
    ),
    Rule(
        (RECORDS,),
        lambda store, _: LEAST_RECORD_BYTES <= store.number("max_msg_size") < 2 * LEAST_RECORD_BYTES,
        False,
        _always("takes records of 64 KiB: one with a very long group id and very many opens may not fit"),
        _always("--max-msg-size=-1"),
    ),
    Rule(
        (FACTS,),
        lambda store, _: 0 < store.number("max_msg_size") < LEAST_FACT_BYTES,
        True,
        lambda store, _: f"takes facts of {store.number('max_msg_size'):,} bytes: larger ones are not logged",
        _always("--max-msg-size=-1"),
    ),
    Rule(
        (FACTS,),
        lambda store, _: store.number("duplicate_window") < DUPLICATE_WINDOW_SECONDS * NANOSECONDS,
        True,
        lambda store, _: (
            f"knows a repeated fact for {duration(store.number('duplicate_window') // NANOSECONDS)} only:"
            " one that is repeated later counts twice"
        ),
        _always(f"--dupe-window={DUPLICATE_WINDOW_SECONDS // 60}m"),
    ),
    Rule(
        (RECORDS,),
        lambda store, beside: bool(store.ttl_seconds) and not 0 < beside.facts.ttl_seconds <= store.ttl_seconds,
        True,
        lambda store, _: f"drops records after {duration(store.ttl_seconds)}, before their facts: counted, not found",
        lambda _, beside: f"--max-age={_days(beside.facts.ttl_seconds + DAY_SECONDS * bool(beside.facts.ttl_seconds))}",
    ),
    Rule(
        BOTH,
        lambda store, _: not (store.config or {}).get("allow_direct"),
        False,
        lambda store, _: (
            "allows no direct get: " + ("records are" if store.stream == RECORDS else "a page of mails is") + " read"
            " one by one, by the leader alone: large groups take many times as long"
        ),
        _always("--allow-direct"),
    ),
    Rule(
        (FACTS,),
        _is_set("deny_delete"),
        False,
        _always("forbids deletion: `relayctl repair` can add what is missing, not take out what is surplus"),
        _always(""),
    ),
    Rule(
        BOTH,
        lambda store, beside: store.number("num_replicas") < beside.expected.replicas,
        False,
        lambda store, beside: (
            f"has {store.number('num_replicas')} of {beside.expected.replicas} replicas (TRACKING_REPLICAS): tracking"
            " stops while too many of their servers are down, and a lost disk loses it"
        ),
        lambda _, beside: f"--replicas={beside.expected.replicas}",
    ),
    Rule(
        ALL,
        lambda store, _: bool(store.offline),
        False,
        lambda store, _: f"has replicas that do not answer: {', '.join(store.offline)}; start these servers",
        _always(""),
    ),
    Rule(
        ALL,
        _is("persist_mode", "async"),
        False,
        _always("acknowledges before it has written: a crash of the server loses the newest"),
        _always(""),
    ),
    Rule(
        (REQUESTS,),
        lambda store, beside: _is("storage", "memory")(store, beside) and beside.expected.storage != "memory",
        True,
        _always(
            "is kept in memory: request ids are forgotten when its servers restart, and a repetition is sent again"
        ),
        _always(""),
    ),
    Rule(
        (REQUESTS,),
        lambda store, _: (
            (store.number("max_bytes") > 0 or store.number("max_msgs") > 0)
            and (store.config or {}).get("discard") != "new"
        ),
        True,
        _always("forgets the oldest request ids when it is full: a repetition is sent again"),
        _always("--discard=new"),
    ),
    Rule(
        (REQUESTS,),
        lambda store, _: 0 < store.number("max_msg_size") < LEAST_CLAIM_BYTES,
        False,
        lambda store, _: (
            f"takes claims of {store.number('max_msg_size'):,} bytes: a request to many recipients may not fit, and is"
            " deferred"
        ),
        _always("--max-msg-size=-1"),
    ),
    Rule(
        (REQUESTS,),
        lambda store, beside: store.number("num_replicas") < beside.expected.replicas,
        False,
        lambda store, beside: (
            f"has {store.number('num_replicas')} of {beside.expected.replicas} replicas (TRACKING_REPLICAS): no request"
            " id is taken while too many of their servers are down, and a lost disk forgets all"
        ),
        lambda _, beside: f"--replicas={beside.expected.replicas}",
    ),
)
