"""A group as rows: any size, each mail once, nothing that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Callable

import gevent
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.errors import BusRefused, BusUnavailable
from relay.tracking import export as export_module
from relay.tracking.export import COLUMNS, FORMATS, csv_cell, csv_line, json_line, rows
from relay.tracking.facts import Fact
from relay.tracking.log import fact_publication
from relay.tracking.pages import GroupReader, Place, decode_cursor, encode_cursor
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import SENT_AT, make_index_bucket, put_array, put_records, record_of, send_mails, store
from tests.support.lfx import written, written_record
from tests.support.nats_server import NatsServer

JSONL = FORMATS["jsonl"]

NewBus = Callable[[str], Bus]


@pytest.fixture
def reader(jetstream: JetStream) -> GroupReader:
    """Of the shared server."""
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return GroupReader(jetstream)


def exported(reader: GroupReader, group_id: str, place: Place | None = None) -> list[str]:
    """The email_ids that an export gives."""
    lines = b"".join(each.lines for each in rows(reader, group_id, JSONL, place))
    return [orjson.loads(line)["email_id"] for line in lines.splitlines()]


@pytest.mark.parametrize("count", [1, 100, 101, 1234])
def test_every_mail_once_in_order(jetstream: JetStream, reader: GroupReader, count: int) -> None:
    group_id = str(uuid.uuid4())
    email_ids = send_mails(jetstream, group_id, count)
    assert exported(reader, group_id) == email_ids


def test_from_any_piece_on(jetstream: JetStream, reader: GroupReader) -> None:
    group_id = str(uuid.uuid4())
    email_ids = send_mails(jetstream, group_id, 450)
    done = 0
    for each in rows(reader, group_id, JSONL):
        done += each.written
        if each.next_place is not None:
            made_at = reader.look(group_id).log_made_at
            place = decode_cursor(group_id, encode_cursor(group_id, each.next_place, made_at), made_at)
            assert exported(reader, group_id, place) == email_ids[done:]
    assert done == 450


def test_a_mail_that_was_logged_twice_comes_once(jetstream: JetStream, reader: GroupReader) -> None:
    group_id = str(uuid.uuid4())
    email_ids = send_mails(jetstream, group_id, 250)
    doubles = [fact_publication(group_id, Fact.SENT, email_id, SENT_AT, "again") for email_id in email_ids[:150]]
    store(jetstream, doubles)
    assert exported(reader, group_id) == email_ids


def test_what_is_remembered_is_bounded(
    jetstream: JetStream, reader: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "REMEMBERED", 200)
    group_id = str(uuid.uuid4())
    email_ids = send_mails(jetstream, group_id, 500)
    store(jetstream, [fact_publication(group_id, Fact.SENT, email_ids[-1], SENT_AT, "again")])
    store(jetstream, [fact_publication(group_id, Fact.SENT, email_ids[0], SENT_AT, "again")])
    assert exported(reader, group_id) == [*email_ids, email_ids[0]], "the near double is noticed, the far one is not"


def test_mails_without_a_record_are_counted(jetstream: JetStream, reader: GroupReader) -> None:
    group_id = str(uuid.uuid4())
    email_ids = send_mails(jetstream, group_id, 5)
    put_records(jetstream, {email_ids[1]: b"broken", email_ids[3]: b""})
    found = list(rows(reader, group_id, JSONL))
    assert (sum(each.written for each in found), sum(each.covered for each in found)) == (3, 5)


@pytest.mark.usefixtures("index_bucket")
def test_lfxs_mails_and_ours(jetstream: JetStream, reader: GroupReader) -> None:
    group_id = str(uuid.uuid4())
    theirs = [str(uuid.uuid4()) for _ in range(130)]
    put_records(jetstream, {email_id: written_record(email_id, group_id) for email_id in theirs})
    put_array(jetstream, group_id, written(theirs))
    ours = send_mails(jetstream, group_id, 120)
    assert exported(reader, group_id) == theirs + ours


def test_a_mail_without_a_group(jetstream: JetStream, reader: GroupReader) -> None:
    email_id = str(uuid.uuid4())
    put_records(jetstream, {email_id: record_of(email_id, email_id)})
    assert exported(reader, email_id) == [email_id]


@pytest.mark.parametrize("group_id", ["no-such-group", "*", ">", "-", ""])
def test_no_such_group(reader: GroupReader, group_id: str) -> None:
    assert list(rows(reader, group_id, JSONL)) == []


def test_it_outlasts_a_restart_and_gives_up_in_time(
    new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url), timeout_seconds=0.5)
    assert ensure_storage(jetstream, StorageConfig()) == ""
    make_index_bucket(jetstream)
    email_ids = send_mails(jetstream, "restart", 500)
    reading = rows(GroupReader(jetstream), "restart", JSONL)
    lines = next(reading).lines
    # When NATS is away for a moment
    server.stop()
    second = gevent.spawn(next, reading)
    gevent.sleep(0.3)
    server.start()
    # Then nothing is missing and nothing twice
    lines += second.get(timeout=20).lines + b"".join(each.lines for each in reading)
    assert [orjson.loads(line)["email_id"] for line in lines.splitlines()] == email_ids
    # And when it stays away, it is said
    monkeypatch.setattr(export_module, "PATIENCE_SECONDS", 0.5)
    reading = rows(GroupReader(jetstream), "restart", JSONL)
    next(reading)
    server.stop()
    with pytest.raises(BusUnavailable), gevent.Timeout(10):
        list(reading)


def test_a_log_that_is_made_anew_on_the_way(new_nats_server: Callable[..., NatsServer], new_bus: NewBus) -> None:
    # Given an export on its way
    jetstream = JetStream(new_bus(new_nats_server().url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    email_ids = send_mails(jetstream, "spring", 250)
    reading = rows(GroupReader(jetstream), "spring", JSONL)
    next(reading)
    # When the log is lost and made again, as far as there is a repair for it
    jetstream.api(f"STREAM.DELETE.{contract.LOG_STREAM}")
    assert ensure_storage(jetstream, StorageConfig()) == ""
    store(jetstream, [fact_publication("spring", Fact.SENT, email_id, SENT_AT) for email_id in reversed(email_ids)])
    # Then it is not said to be complete
    with pytest.raises(BusRefused, match="the log was made anew"):
        list(reading)


# -- CSV --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("user@example.com", "user@example.com"),
        ('=HYPERLINK("http://example.org")', '\'=HYPERLINK("http://example.org")'),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1+1", "'  =1+1"),
        ("\t=1+1", "'\ufffd=1+1"),
        ("\r\n=1+1", "'\ufffd\ufffd=1+1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("\u00a0=1", "'\u00a0=1"),
        ("two\r\nlines", "two\ufffd\ufffdlines"),
        ("a;=1+1", "a;'=1+1"),
        ("a; \u200b=1;b;-2", "a;' \u200b=1;b;'-2"),
        ('a;""=1', 'a;\'""=1'),
        ("a|@b", "a|'@b"),
        ('"=1', "'\"=1"),
        ("\ufeff=1", "'\ufeff=1"),
        ("\u200b\u2060\u00ad=1", "'\u200b\u2060\u00ad=1"),
        ("\u3000\u3164\u2800+1", "'\u3000\u3164\u2800+1"),
        ("\ufe66\ufe62", "'\ufe66\ufe62"),
        ("\u22121", "'\u22121"),
        ("\u207a1", "'\u207a1"),
        ("\x00\x00=1", "'\ufffd\ufffd=1"),
        ("Sale, -50 % (a=b); c", "Sale, -50 % (a=b); c"),
        (";", ";"),
        ("(-1)", "(-1)"),
        ("2025-01-15T10:30:00Z", "2025-01-15T10:30:00Z"),
        ("Grüße, «Zoë» 🚀", "Grüße, «Zoë» 🚀"),
        (None, ""),
        (True, "true"),
        (False, "false"),
        (-3, "-3"),
        (["=1", 2], '["=1",2]'),
        ({}, "{}"),
    ],
)
def test_cells(value: object, cell: str) -> None:
    assert csv_cell(value) == cell


UNSEEN = '\ufeff\u200b\u00a0\u3164 \t\r\n\0"'
HOSTILE = st.lists(st.sampled_from([*"=+-@;|", *UNSEEN, ",", "'", "a", "1", "\uff1d"]) | st.characters()).map("".join)


@pytest.mark.parametrize("separator", [",", ";", "|"])
@given(text=HOSTILE, more=HOSTILE)
@example(text="x;=1", more="x|=1")
def test_no_cell_is_a_formula_and_every_record_is_one_line(separator: str, text: str, more: str) -> None:
    line = csv_line({"email_id": "id", "group_id": more, "subject": text, "to": f'"{text}', "outcome": text}).decode()
    assert line.count("\n") == 1
    assert len(line.splitlines()) == 1
    (cells,) = csv.reader(io.StringIO(line), delimiter=separator, strict=separator == ",")
    assert separator != "," or len(cells) == len(COLUMNS)
    for cell in cells:
        assert not cell.lstrip(UNSEEN).startswith(("=", "+", "-", "@", "\uff1d", "\uff0b", "\u2212")), cells


def test_the_header_names_the_columns() -> None:
    (header,) = csv.reader(io.StringIO(FORMATS["csv"].header.decode()))
    assert tuple(header) == COLUMNS
    assert FORMATS["jsonl"].header == b""


def test_a_json_line_is_the_record() -> None:
    record = orjson.loads(record_of("id", "group", "two\nlines"))
    assert orjson.loads(json_line(record)) == record
    assert json_line(record).count(b"\n") == 1


def test_every_field_that_lfx_and_we_write_has_a_column() -> None:
    fields = set(orjson.loads(written_record("id", "group", ["delivered_at", "last_opened_at", "failed_at"])))
    assert fields - {"opened_at_list"} <= set(COLUMNS)
    assert contract.STATUS_FIELDS[0] == COLUMNS[0]
