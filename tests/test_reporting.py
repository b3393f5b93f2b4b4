"""One question, one answer: by real NATS, whatever is asked and whatever is stored."""

from __future__ import annotations

import gc
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import orjson
import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.reporting import Reporting, status_gate
from relay.tracking.facts import Fact
from relay.tracking.groups import group_token
from relay.tracking.legacy import REMEMBERED_ARRAYS
from relay.tracking.log import fact_publication
from relay.tracking.pages import PIECE_MAILS
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.conftest import require
from tests.support.groups import make_index_bucket, put_array, put_records, record_of, send_mails, store
from tests.support.lfx import OPTIONAL, written, written_record
from tests.support.nats_server import BINARY, NatsServer
from tests.support.scripted_jetstream import LaggingStream

MAX_PAYLOAD = 1_048_576
LFX_ANALYTICS = ("group_id", "total_sent", "delivered", "opened", "unique_opened", "failed")
OUR_COUNTS = ("clicked", "unique_clicked", "bounced", "complained", "delayed", "rejected")


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server of this file's own: group ids of every kind are used."""
    require(BINARY.exists(), "nats-server")
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture
def reporting(jetstream: JetStream) -> Reporting:
    """Reporting on this file's server."""
    assert ensure_storage(jetstream, StorageConfig()) == ""
    make_index_bucket(jetstream)
    return Reporting(jetstream, lambda: MAX_PAYLOAD)


def status(reporting: Reporting, seconds: float = 20, **question: Any) -> Any:
    """The answer to a status question."""
    return orjson.loads(reporting.status(orjson.dumps(question), time.monotonic() + seconds))


def analytics(reporting: Reporting, group_id: str) -> Any:
    """The answer to an analytics question."""
    return orjson.loads(reporting.analytics(orjson.dumps({"group_id": group_id}), time.monotonic() + 20))


def paged(reporting: Reporting, group_id: str, limit: int) -> list[list[str]]:
    """The email_ids of every page."""
    pages: list[list[str]] = []
    cursor: dict[str, str] = {}
    while True:
        page = status(reporting, group_id=group_id, limit=limit, **cursor)
        assert set(page) == {"records", "cursor"}, page
        pages.append([record["email_id"] for record in page["records"]])
        if page["cursor"] is None:
            return pages
        cursor = {"cursor": page["cursor"]}


def counts(**given: int) -> dict[str, int]:
    """The figures of an analytics answer, zero where nothing is given."""
    return dict.fromkeys((*LFX_ANALYTICS[1:], *OUR_COUNTS), 0) | given


# -- questions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "limit", ["0", "1001", "-1", "1.0", "1e2", '"10"', "true", "[]", "{}", "1" * 5000, "99999999999", "-0"]
)
def test_a_limit_that_is_none_says_so(reporting: Reporting, limit: str) -> None:
    payload = b'{"group_id":"nobody","limit":%s}' % limit.encode()
    assert orjson.loads(reporting.status(payload, time.monotonic() + 5)) == {"error": contract.INVALID_LIMIT}


@pytest.mark.parametrize(
    "payload",
    [
        b'{"group_id":"limits","limit":2}',
        b'{"group_id":"limits","LIMIT":2}',
        b'{"group_id":"limits","limit":0,"limit":2}',
        b'{"group_id":"limits","limit":2,"limit":null}',
        b'{"group_id":"limits","\\u006cimit":2}',
        b'{"group_id":"limits","other":{"limit":0},"Limit":2,"cursor":null}',
        b'{"GROUP_ID":"limits","limit":2,"cursor":""}',
    ],
)
def test_a_limit_is_read_as_callers_may_write_it(jetstream: JetStream, reporting: Reporting, payload: bytes) -> None:
    if "error" in status(reporting, group_id="limits", limit=1):
        send_mails(jetstream, "limits", 3)
    answer = orjson.loads(reporting.status(payload, time.monotonic() + 5))
    assert len(answer["records"]) == 2
    assert answer["cursor"]


@pytest.mark.parametrize(
    "payload", [b'{"group_id":"g","limit":2', b'{"group_id":"g","cursor":5}', b"[]", b"", b"limit"]
)
def test_a_broken_question_is_an_invalid_payload(reporting: Reporting, payload: bytes) -> None:
    answer = orjson.loads(reporting.status(payload, time.monotonic() + 5))
    assert answer == {"error": contract.INVALID_REQUEST_PAYLOAD}


def test_a_cursor_is_good_for_its_own_group_only(jetstream: JetStream, reporting: Reporting) -> None:
    send_mails(jetstream, "cursor-1", 3)
    send_mails(jetstream, "cursor-2", 3)
    cursor = status(reporting, group_id="cursor-1", limit=1)["cursor"]
    assert len(status(reporting, group_id="cursor-1", cursor=cursor)["records"]) == 2
    foreign = status(reporting, group_id="cursor-2", cursor=cursor)
    assert foreign == {"error": contract.CURSOR_OF_ANOTHER_GROUP}
    for forged in (cursor[:-1], cursor + "A", cursor[::-1], "1", "ü", "x" * 100_000):
        assert status(reporting, group_id="cursor-1", cursor=forged) == {"error": contract.INVALID_CURSOR}


# -- a group's records -------------------------------------------------------------------------------------------------
def test_a_group_that_fits_is_the_contracts_array(jetstream: JetStream, reporting: Reporting) -> None:
    email_ids = send_mails(jetstream, "fits", 150)
    assert [record["email_id"] for record in status(reporting, group_id="fits")] == email_ids


@pytest.mark.parametrize("count", [1, 5, 90, 250])
def test_the_array_is_given_to_the_last_byte_that_fits(jetstream: JetStream, count: int) -> None:
    assert ensure_storage(jetstream, StorageConfig()) == ""
    group_id = f"last-byte-{count}"
    send_mails(jetstream, group_id, count)
    whole = Reporting(jetstream, lambda: MAX_PAYLOAD).status(orjson.dumps({"group_id": group_id}), time.monotonic() + 9)
    for room, is_given in ((len(whole), True), (len(whole) - 1, False)):
        answer = Reporting(jetstream, lambda room=room: room).status(  # type: ignore[misc]
            orjson.dumps({"group_id": group_id}), time.monotonic() + 9
        )
        assert (answer == whole) is is_given
        assert is_given or orjson.loads(answer) == {"error": contract.RESPONSE_TOO_LARGE}


def test_a_group_far_too_large_is_said_to_be_without_reading_it(jetstream: JetStream, reporting: Reporting) -> None:
    # Given more facts than there is room for records, and not one record
    facts = [
        fact_publication("far-too-large", Fact.SENT, str(uuid.uuid4()), "2025-01-15T10:30:00Z") for _ in range(7000)
    ]
    store(jetstream, facts)
    # Then the answer takes no reading: with what is read it would be an empty array
    begun = time.monotonic()
    assert status(reporting, group_id="far-too-large") == {"error": contract.RESPONSE_TOO_LARGE}
    assert time.monotonic() - begun < 0.2
    assert paged(reporting, "far-too-large", 1000) == [[]] * 7


@pytest.mark.parametrize("limit", [1, 3, 99, 100, 101, 250, 1000])
def test_pages_give_every_record_once(jetstream: JetStream, reporting: Reporting, limit: int) -> None:
    group_id = f"paged-{limit}"
    email_ids = send_mails(jetstream, group_id, 3 * min(limit, 100) + 1)
    pages = paged(reporting, group_id, limit)
    assert [email_id for page in pages for email_id in page] == email_ids
    assert all(len(page) == limit for page in pages[:-1])


def test_pages_give_every_record_once_while_mails_are_sent(jetstream: JetStream, reporting: Reporting) -> None:
    before = send_mails(jetstream, "meanwhile", 300)
    is_listed = gevent.event.Event()
    sent_meanwhile: list[str] = []

    def send() -> None:
        while not is_listed.is_set():
            sent_meanwhile.extend(send_mails(jetstream, "meanwhile", 3))

    sending = gevent.spawn(send)
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None and len(seen) < 400:  # the group grows as long as it is listed
        page = status(reporting, group_id="meanwhile", limit=20, cursor=cursor)
        seen += [record["email_id"] for record in page["records"]]
        cursor = page["cursor"]
    is_listed.set()
    sending.get(timeout=10)
    assert seen[:300] == before
    assert seen == (before + sent_meanwhile)[: len(seen)], "each once, in the order in which they were sent"


def test_a_page_is_cut_by_bytes_as_well(jetstream: JetStream) -> None:
    assert ensure_storage(jetstream, StorageConfig()) == ""
    email_ids = send_mails(jetstream, "bytes", 40, subject_header="x" * 1000)
    room = 5000
    reporting = Reporting(jetstream, lambda: room)
    seen: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(40):
        question = orjson.dumps({"group_id": "bytes", "limit": 30, **cursor})
        answer = reporting.status(question, time.monotonic() + 9)
        assert len(answer) <= room
        page = orjson.loads(answer)
        seen += [record["email_id"] for record in page["records"]]
        if page["cursor"] is None:
            break
        assert len(page["records"]) == 4, "as many as fit"
        cursor = {"cursor": page["cursor"]}
    assert seen == email_ids


def test_a_record_larger_than_a_page_is_no_dead_end(jetstream: JetStream) -> None:
    assert ensure_storage(jetstream, StorageConfig()) == ""
    email_ids = send_mails(jetstream, "larger", 3)
    opens = [{"event_id": "x" * 36, "opened_at": "2025-01-15T11:05:33Z"}] * 500
    put_records(
        jetstream, {email_ids[1]: written_record(email_ids[1], "larger", ["opened_at_list"], opened_at_list=opens)}
    )
    reporting = Reporting(jetstream, lambda: 2000)
    assert [email_id for page in paged(reporting, "larger", 100) for email_id in page] == email_ids
    cursor = status(reporting, group_id="larger", limit=1)["cursor"]
    question = orjson.dumps({"group_id": "larger", "limit": 1, "cursor": cursor})
    answer = reporting.status(question, time.monotonic() + 9)
    assert len(answer) <= 2000
    assert orjson.loads(answer)["records"][0]["truncated"] is True
    alone = status(reporting, email_id=email_ids[1])
    assert alone["truncated"] is True
    assert (alone["email_id"], alone["open_count"]) == (email_ids[1], 2)
    assert "opened_at_list" not in alone


def test_a_mail_without_group_is_its_own_group(jetstream: JetStream, reporting: Reporting) -> None:
    email_id, in_doubt = str(uuid.uuid4()), str(uuid.uuid4())
    put_records(
        jetstream,
        {
            email_id: written_record(email_id, email_id, OPTIONAL),
            in_doubt: orjson.dumps(orjson.loads(record_of(in_doubt, in_doubt)) | {"outcome": "in_doubt"}),
        },
    )
    record = status(reporting, email_id=email_id)
    assert status(reporting, group_id=email_id) == [record]
    assert status(reporting, group_id=email_id, limit=5) == {"records": [record], "cursor": None}
    assert analytics(reporting, email_id) == {
        "group_id": email_id,
        **counts(total_sent=1, delivered=1, opened=2, unique_opened=1, failed=1),
        "first_sent_at": "2025-01-15T10:30:00.123456789Z",
        "last_event_at": "2025-01-15T14:22:10Z",
    }
    assert analytics(reporting, in_doubt) == {"group_id": in_doubt, **counts()}, "not sent as far as is known"


@pytest.mark.parametrize(
    ("event", "counted"),
    [
        ({"delivered": True}, {"delivered": 1}),
        ({"opened": True, "open_count": 2}, {"opened": 2, "unique_opened": 1}),
        ({"bounced_at": "2025-01-15T10:31:00Z", "failed": True}, {"bounced": 1, "failed": 1}),
    ],
)
def test_a_mail_in_doubt_of_which_there_are_events_was_sent(
    jetstream: JetStream, reporting: Reporting, event: dict[str, Any], counted: dict[str, int]
) -> None:
    email_id = str(uuid.uuid4())
    record = orjson.loads(record_of(email_id, email_id)) | {"outcome": "in_doubt"} | event
    put_records(jetstream, {email_id: orjson.dumps(record)})
    answer = analytics(reporting, email_id)
    assert {name: answer[name] for name in counts()} == counts(total_sent=1, **counted)
    assert answer["first_sent_at"] == record["sent_at"]


def test_records_that_others_wrote_are_no_bug_of_ours(jetstream: JetStream, reporting: Reporting) -> None:
    # Given records that JSON allows and that cannot be written again, or summed up
    deep, counted, whole = (str(uuid.uuid4()) for _ in range(3))
    head = record_of(deep, deep)[:-1]
    put_records(jetstream, {deep: head + b',"x":' + b"[" * 300 + b"]" * 300 + b"}"})
    huge = {"open_count": 2**64 - 1, "click_count": 2**64 - 1}
    put_records(jetstream, {counted: orjson.dumps(orjson.loads(record_of(counted, "huge")) | huge)})
    put_records(jetstream, {whole: record_of(whole, whole)[:-1] + b',"x":' + b"[" * 240 + b"]" * 240 + b"}"})
    put_array(jetstream, "huge", written([counted, counted, deep]))
    # Then the first is a broken one, and figures stay numbers
    assert status(reporting, email_id=deep) == {"error": contract.INTERNAL_ERROR}
    assert status(reporting, group_id=deep) == {"error": contract.NOT_FOUND}
    assert [record["email_id"] for record in status(reporting, group_id="huge")] == [counted]
    assert analytics(reporting, "huge")["opened"] == 2**32
    # And one that is deep but can be written is given as it is, by itself and in a list
    assert status(reporting, group_id=whole) == [status(reporting, email_id=whole)]
    assert status(reporting, group_id=whole, limit=1)["records"] == [status(reporting, email_id=whole)]


# -- analytics ---------------------------------------------------------------------------------------------------------
def test_analytics_count_every_kind_of_fact(jetstream: JetStream, reporting: Reporting) -> None:
    # Given a group in which everything has happened
    stated = {
        Fact.SENT: 7, Fact.DELIVERED: 6, Fact.OPENED: 3, Fact.OPEN: 9, Fact.CLICKED: 2, Fact.CLICK: 5, Fact.FAILED: 2,
        Fact.BOUNCED: 1, Fact.COMPLAINED: 1, Fact.DELAYED: 4, Fact.REJECTED: 1, Fact.UNSUBSCRIBED: 1,
    }  # fmt: skip
    number = itertools.count()
    store(
        jetstream,
        [
            fact_publication("kinds", fact, str(uuid.uuid4()), f"2025-01-15T10:30:{next(number):02}Z")
            for fact, count in stated.items()
            for _ in range(count)
        ],
    )
    # Then lfx's fields come first, each with lfx's meaning
    answer = analytics(reporting, "kinds")
    assert tuple(answer)[: len(LFX_ANALYTICS)] == LFX_ANALYTICS
    assert answer == {
        "group_id": "kinds",
        "total_sent": 7,
        "delivered": 6,
        "opened": 9,
        "unique_opened": 3,
        "failed": 2,
        "clicked": 5,
        "unique_clicked": 2,
        "bounced": 1,
        "complained": 1,
        "delayed": 4,
        "rejected": 1,
        "first_sent_at": "2025-01-15T10:30:00Z",
        "last_event_at": f"2025-01-15T10:30:{sum(stated.values()) - 1:02}Z",
    }


def test_before_the_first_event_there_is_no_time_of_one(jetstream: JetStream, reporting: Reporting) -> None:
    send_mails(jetstream, "no-events", 2)
    answer = analytics(reporting, "no-events")
    assert answer == {"group_id": "no-events", **counts(total_sent=2), "first_sent_at": "2025-01-15T10:30:00.000Z"}


def test_analytics_never_pass_the_whole_while_mails_are_sent_and_events_come(
    jetstream: JetStream, reporting: Reporting
) -> None:
    is_over = gevent.event.Event()

    def live(group_id: str) -> None:
        while not is_over.is_set():
            email_id = str(uuid.uuid4())
            at = "2025-01-15T10:30:00Z"
            facts = (Fact.SENT, Fact.DELIVERED, Fact.OPENED)
            store(jetstream, [fact_publication(group_token(group_id), fact, email_id, at) for fact in facts])

    lives = [gevent.spawn(live, "in-motion") for _ in range(3)]
    totals = []
    for _ in range(100):
        answer = analytics(reporting, "in-motion")
        if "error" not in answer:
            assert answer["total_sent"] >= answer["delivered"] >= answer["unique_opened"]
            totals.append(answer["total_sent"])
    is_over.set()
    gevent.joinall(lives, timeout=10, raise_error=True)
    assert totals == sorted(totals)
    assert totals[-1] > totals[0], "things did happen"


NASTY = ["🚀", "a.b", "*", ">", "a.>", "-", "=", "==", " ", "\n", "x", "x" * 10_000, "\ufffd", "a\\b", '"', "$KV.x"]


@pytest.mark.parametrize("group_id", NASTY, ids=[str(number) for number in range(len(NASTY))])
def test_a_nasty_group_id_is_answered_with_its_own_mails(
    jetstream: JetStream, reporting: Reporting, group_id: str
) -> None:
    email_ids = send_mails(jetstream, group_id, 2)
    found = [record["email_id"] for record in status(reporting, group_id=group_id)]
    assert found == email_ids
    assert [each for page in paged(reporting, group_id, 1) for each in page] == found
    answer = analytics(reporting, group_id)
    assert (answer["group_id"], answer["total_sent"]) == (group_id, 2)


@pytest.mark.parametrize(
    ("written_as", "as_lfx"), [("\\ud800", "\ufffd"), ("\\udfff!", "\ufffd!"), ("\\ud83d\\u0041", "\ufffdA")]
)
def test_lone_surrogates_are_read_as_lfx_reads_them(
    jetstream: JetStream, reporting: Reporting, written_as: str, as_lfx: str
) -> None:
    (email_id,) = send_mails(jetstream, f"surrogate {as_lfx}", 1)
    payload = b'{"group_id":"surrogate %s"}' % written_as.encode()
    (record,) = orjson.loads(reporting.status(payload, time.monotonic() + 5))
    assert record["email_id"] == email_id


# -- lfx's groups ------------------------------------------------------------------------------------------------------
def test_a_group_of_lfx_is_answered_from_its_records(jetstream: JetStream, reporting: Reporting) -> None:
    # Given an array with records in every combination of optional fields, and one id whose record is gone
    combinations = [chosen for size in range(5) for chosen in itertools.combinations(OPTIONAL, size)]
    values = {f"lfx-{number}": written_record(f"lfx-{number}", "lfx", each) for number, each in enumerate(combinations)}
    put_records(jetstream, values)
    put_array(jetstream, "lfx", written([*values, "lfx-gone"]))
    # When it is asked for
    records = status(reporting, group_id="lfx")
    # Then each record is given as it is, and the figures are lfx's
    assert records == [orjson.loads(value) for value in values.values()]
    answer = analytics(reporting, "lfx")
    assert answer == {
        "group_id": "lfx",
        **counts(total_sent=17, delivered=8, opened=16, unique_opened=8, failed=8),
        "first_sent_at": "2025-01-15T10:30:00.123456789Z",
        "last_event_at": "2025-01-15T14:22:10Z",
    }


def test_a_group_of_both_has_one_answer(jetstream: JetStream, reporting: Reporting) -> None:
    ours = send_mails(jetstream, "of-both", 130)
    values = {f"theirs-{number}": written_record(f"theirs-{number}", "of-both", OPTIONAL) for number in range(30)}
    put_records(jetstream, values)
    put_array(jetstream, "of-both", written([*values, *ours[:10], ">", "*"]))
    expected = [*values, *ours]
    assert [record["email_id"] for record in status(reporting, group_id="of-both")] == expected
    for limit in (1, 7, 40, 1000):
        assert [each for page in paged(reporting, "of-both", limit) for each in page] == expected
    answer = analytics(reporting, "of-both")
    assert {name: answer[name] for name in counts()} == counts(
        total_sent=160, delivered=30, opened=60, unique_opened=30, failed=30
    )
    assert answer["first_sent_at"] == "2025-01-15T10:30:00.000Z"


def test_an_empty_array_is_a_group_without_mails(jetstream: JetStream, reporting: Reporting) -> None:
    put_array(jetstream, "empty", b"[]")
    assert status(reporting, group_id="empty") == []
    assert status(reporting, group_id="empty", limit=10) == {"records": [], "cursor": None}
    assert analytics(reporting, "empty") == {"group_id": "empty", **counts()}


@pytest.mark.parametrize("broken", [b"", b"{", b'{"a":1}', b"\xff"])
def test_a_broken_array_is_no_error_for_mails_that_are_known(
    jetstream: JetStream, reporting: Reporting, broken: bytes
) -> None:
    group_id = f"broken-array-{broken.hex()}"
    put_array(jetstream, group_id, broken)
    assert status(reporting, group_id=group_id) == {"error": contract.NOT_FOUND}
    email_ids = send_mails(jetstream, group_id, 2)
    assert [record["email_id"] for record in status(reporting, group_id=group_id)] == email_ids
    assert analytics(reporting, group_id)["total_sent"] == 2


# -- many questions at once --------------------------------------------------------------------------------------------
def test_many_groups_of_large_records_are_read_without_a_hang_up(
    nats_server: NatsServer, jetstream: JetStream, reporting: Reporting
) -> None:
    # Given 100 mails with records of 60 KB, and more questions at once than the server keeps answers for (64 MiB)
    email_ids = send_mails(jetstream, "fat", 100)
    put_records(
        jetstream,
        {each: record_of(each, "fat")[:-1] + b',"pad":"' + b"x" * 60_000 + b'"}' for each in email_ids},
    )
    # When all are asked
    asked = [gevent.spawn(status, reporting, group_id="fat") for _ in range(30)]
    asked += [gevent.spawn(status, reporting, email_id=email_ids[0]) for _ in range(1500)]
    gevent.joinall(asked, timeout=30, raise_error=True)
    # Then each is answered, and the server never hung up
    assert all(each.value == {"error": contract.RESPONSE_TOO_LARGE} for each in asked[:30])
    assert all(each.value["email_id"] == email_ids[0] for each in asked[30:])


def test_large_questions_that_wait_for_their_turn_hold_no_array(jetstream: JetStream, reporting: Reporting) -> None:
    # Given more groups of lfx's than arrays are remembered, each with an array that can be told from the others
    group_ids = [f"waiting-{number}" for number in range(3 * REMEMBERED_ARRAYS)]
    first = {group_id: f"first-of-{group_id}" for group_id in group_ids}
    for group_id in group_ids:
        put_array(jetstream, group_id, written([first[group_id], *(f"gone-{n}" for n in range(2 * PIECE_MAILS))]))
    # When all wait while another one has the turn
    traffic = reporting._reader.traffic
    with traffic.turn(time.monotonic() + 20):
        asked = [gevent.spawn(analytics, reporting, group_id) for group_id in group_ids]
        with gevent.Timeout(10):
            while traffic.waiting < len(asked):
                gevent.sleep(0.01)
        lists = [each for each in gc.get_objects() if type(each) is list and len(each) > PIECE_MAILS]
        held = [each for each in lists if isinstance(each[0], str) and each[0] in first.values()]
        assert len(held) <= REMEMBERED_ARRAYS
    # Then each is answered in its turn
    gevent.joinall(asked, timeout=20, raise_error=True)
    assert [each.value["total_sent"] for each in asked] == [2 * PIECE_MAILS + 1] * len(asked)


def test_what_waits_for_a_turn_does_not_turn_small_questions_away() -> None:
    # Given a worker in which 60 questions have been in hand for twenty seconds, and hardly one was answered
    gate = status_gate(5000, 64 * 1024 * 1024)
    assert all(gate.take(now=100 + number / 10, size_bytes=100, patience_seconds=30) for number in range(60))
    for second in range(106, 120, 7):
        gate.finish(second, 100)
    # Then the next is taken all the same
    assert gate.take(now=120, size_bytes=100, patience_seconds=30)


# -- a log made anew ---------------------------------------------------------------------------------------------------
def test_a_cursor_from_before_the_log_was_made_anew_is_refused(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    reporting = Reporting(jetstream, lambda: MAX_PAYLOAD)
    assert ensure_storage(jetstream, StorageConfig()) == ""
    send_mails(jetstream, "anew", 5)
    cursor = status(reporting, group_id="anew", limit=3)["cursor"]
    assert len(status(reporting, group_id="anew", cursor=cursor)["records"]) == 2
    jetstream.api(f"STREAM.DELETE.{contract.LOG_STREAM}")
    assert ensure_storage(jetstream, StorageConfig()) == ""
    email_ids = send_mails(jetstream, "anew", 2)
    assert status(reporting, group_id="anew", cursor=cursor) == {"error": contract.INVALID_CURSOR}
    assert [each for page in paged(reporting, "anew", 1) for each in page] == email_ids


# -- when NATS does not answer -----------------------------------------------------------------------------------------
def test_without_jetstream_it_is_an_internal_error(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], caplog: pytest.LogCaptureFixture
) -> None:
    reporting = Reporting(JetStream(new_bus(new_nats_server(jetstream=False).url)), lambda: MAX_PAYLOAD)
    for question in ({"email_id": "x"}, {"group_id": "g"}, {"group_id": "g", "limit": 5}):
        assert status(reporting, **question) == {"error": contract.INTERNAL_ERROR}
    assert analytics(reporting, "g") == {"error": contract.INTERNAL_ERROR}
    assert caplog.text.count("a question could not be answered") == 1, "once a minute"


def test_not_found_is_said_only_when_the_leader_says_so(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    bus = new_bus(new_nats_server(jetstream=False).url)
    stream = LaggingStream(bus, f"KV_{contract.RECIPIENTS_BUCKET}", [], 0)
    assert status(Reporting(JetStream(bus), lambda: MAX_PAYLOAD), email_id="x") == {"error": contract.NOT_FOUND}
    assert stream.asked_leader == 1


def test_without_direct_get_every_answer_is_the_same(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]
) -> None:
    # Given bucket and log as somebody made them before us, without allow_direct
    jetstream = JetStream(new_bus(new_nats_server().url))
    streams = {
        f"KV_{contract.RECIPIENTS_BUCKET}": f"$KV.{contract.RECIPIENTS_BUCKET}.>",
        contract.LOG_STREAM: f"{contract.LOG_PREFIX}.*.*",
    }
    for name, nats_subject in streams.items():
        config = {"name": name, "subjects": [nats_subject], "storage": "memory"}
        if name.startswith("KV_"):
            config["max_msgs_per_subject"] = 1  # type: ignore[assignment]
        jetstream.api(f"STREAM.CREATE.{name}", config)
    reporting = Reporting(jetstream, lambda: MAX_PAYLOAD)
    email_ids = send_mails(jetstream, "no-direct", 120)
    store(jetstream, [fact_publication("no-direct", Fact.DELIVERED, email_ids[0], "2025-01-15T10:31:00Z")])
    assert status(reporting, email_id=email_ids[5])["email_id"] == email_ids[5]
    assert [record["email_id"] for record in status(reporting, group_id="no-direct")] == email_ids
    assert [each for page in paged(reporting, "no-direct", 50) for each in page] == email_ids
    assert analytics(reporting, "no-direct") == {
        "group_id": "no-direct",
        **counts(total_sent=120, delivered=1),
        "first_sent_at": "2025-01-15T10:30:00.000Z",
        "last_event_at": "2025-01-15T10:31:00Z",
    }
