"""The record: lfx's fields, names and omissions, then our own."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.submission.request import MAX_GROUP_ID_BYTES
from relay.tracking.record import (
    DEEPEST,
    MAX_TEXT_BYTES,
    RecipientOutcome,
    abridged_record,
    earliest,
    is_email_id,
    last_event_at,
    latest,
    new_record,
    parse_record,
    parse_time,
    rfc3339,
    settled_record,
)
from tests.support.lfx import OPTIONAL, RFC3339, check_record, written_record


def record(**changed: Any) -> dict[str, Any]:
    """A new record, parsed."""
    given: dict[str, Any] = {
        "email_id": "id-1",
        "group_id": "g",
        "to": "user@example.com",
        "subject_header": "Hello",
        "sent_at": "2025-01-15T10:30:00.000Z",
    }
    parsed = parse_record(new_record(**(given | changed)))
    assert parsed is not None
    return parsed


def test_a_new_record_has_what_lfx_writes_and_nothing_else() -> None:
    assert record() == {
        "email_id": "id-1",
        "group_id": "g",
        "to": "user@example.com",
        "subject": "Hello",
        "sent_at": "2025-01-15T10:30:00.000Z",
        "delivered": False,
        "opened": False,
        "open_count": 0,
        "failed": False,
    }


def test_our_own_fields_are_there_when_set() -> None:
    own = record(outcome="in_doubt", remote_id="0100-ses")
    assert own["outcome"] == "in_doubt"
    assert own["remote_id"] == "0100-ses"


@pytest.mark.parametrize("text", ["x" * 1_000_000, "ü" * 500_000, "🚀" * 300_000])
def test_long_texts_are_cut_at_a_character(text: str) -> None:
    subject = record(subject_header=text)["subject"]
    assert text.startswith(subject)
    assert MAX_TEXT_BYTES - 4 < len(subject.encode()) <= MAX_TEXT_BYTES


def test_a_text_within_the_bound_is_kept() -> None:
    assert record(subject_header="ü" * 2048)["subject"] == "ü" * 2048


@pytest.mark.parametrize(
    ("epoch_seconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1736937000.5, "2025-01-15T10:30:00.500Z"),
        (1736937000, "2025-01-15T10:30:00.000Z"),
    ],
)
def test_times_are_rfc_3339_in_utc(epoch_seconds: float, text: str) -> None:
    assert rfc3339(epoch_seconds) == text


@settings(max_examples=1000)
@given(
    st.floats(min_value=-(2**31), max_value=2**33)
    | st.integers(0, 2**42).map(lambda milliseconds: milliseconds / 1000)
    | st.integers(0, 2**51).map(lambda microseconds: microseconds / 1_000_000)
    | st.integers(0, 2**31).map(lambda second: math.nextafter(second, 0))
)
def test_times_are_those_that_datetime_writes(epoch_seconds: float) -> None:
    written = datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds")
    assert rfc3339(epoch_seconds) == written.replace("+00:00", "Z")


@pytest.mark.parametrize("text", ["a", "550e8400-e29b-41d4-a716-446655440000", "_", "x" * 64])
def test_what_is_an_email_id(text: str) -> None:
    assert is_email_id(text)


@pytest.mark.parametrize("text", ["", ">", "*", "a.b", "x" * 65, "a\n", "ü", "a b", "x" * 5000])
def test_what_is_none(text: str) -> None:
    assert not is_email_id(text)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"1", b"null", b"\xff"])
def test_what_is_no_record(value: bytes) -> None:
    assert parse_record(value) is None


def test_what_is_read_can_be_written_again() -> None:
    for levels in range(1, 400):
        for begin, end in ((b"[", b"]"), (b'{"y":', b"}")):
            inner = begin * levels + (b"0" if end == b"}" else b"") + end * levels
            nested = parse_record(b'{"outcome":"in_doubt","x":' + inner + b"}")
            assert (nested is not None) == (levels < DEEPEST), levels
            if nested is not None:
                assert settled_record(nested, outcome="failed", remote_id="")
                assert orjson.dumps([[nested]])
    wide = b'{"x":[' + b",".join([b"[]"] * 1000) + b"]}"
    assert parse_record(wide) == orjson.loads(wide), "wide is not deep"


def test_the_longest_record_of_an_accepted_mail_fits_into_a_bucket_of_lfx() -> None:
    for character in ("\x01", "🚀", '"', "\n\x02"):
        group_id = character * 10_000
        while len(orjson.dumps(group_id)) > MAX_GROUP_ID_BYTES:
            group_id = group_id[:-100]
        longest = {"to": character * 10_000, "subject_header": character * 10_000, "group_id": group_id}
        value = new_record(email_id="x" * 36, sent_at=rfc3339(0), outcome="in_doubt", remote_id="x" * 100, **longest)
        assert len(value) < 64 * 1024


@pytest.mark.parametrize(
    "optional",
    [chosen for size in range(len(OPTIONAL) + 1) for chosen in itertools.combinations(OPTIONAL, size)],
    ids=lambda chosen: "+".join(chosen) or "none",
)
def test_a_record_as_lfx_writes_it_is_read(optional: tuple[str, ...]) -> None:
    value = written_record("e", "g", optional)
    assert b"<" not in value, "as Go escapes it"
    read = parse_record(value)
    assert read == orjson.loads(value)
    assert {name for name in OPTIONAL if name in read} == set(optional)
    assert check_record(value) == read, "the strict reader takes what lfx writes"


@pytest.mark.parametrize("own", [{}, {"outcome": "in_doubt"}, {"remote_id": "0100-ses"}], ids=str)
def test_a_record_of_ours_decodes_with_lfx_types(own: dict[str, str]) -> None:
    given_ = {"email_id": "e", "group_id": "Grüße 🚀 <&>", "to": "user@example.com", "subject_header": "s"}
    value = new_record(**given_, sent_at=rfc3339(1736937000.5), **own)
    assert check_record(value)["group_id"] == "Grüße 🚀 <&>"
    record_ = parse_record(value)
    assert record_ is not None
    for outcome in ("", "failed", "deferred"):
        check_record(settled_record(record_, outcome=outcome, remote_id="x"))


@given(st.text(), st.text(), st.floats(min_value=0, max_value=2**32))
def test_any_record_of_ours_decodes_with_lfx_types(group_id: str, text: str, at: float) -> None:
    group_id = group_id.encode("utf-8", "replace").decode()
    text = text.encode("utf-8", "replace").decode()
    value = new_record(email_id="e", group_id=group_id, to=text, subject_header=text, sent_at=rfc3339(at))
    assert check_record(value)["group_id"] == group_id


@pytest.mark.parametrize(
    "broken",
    [
        {"sent_at": "2025-01-15T10:30:00"},
        {"sent_at": "2025-01-15 10:30:00Z"},
        {"delivered": 1},
        {"open_count": 1.0},
        {"opened_at_list": []},
        {"delivered_at": None},
        {"unknown": 1},
        {"outcome": ""},
    ],
    ids=str,
)
def test_the_strict_reader_is_strict(broken: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_record(orjson.dumps(record() | broken))


@pytest.mark.parametrize(
    "text",
    ["2025-01-15T10:30:00Z", "2025-01-15T10:30:00.123456789Z", "2025-01-15T11:30:00+01:00", "2025-01-15T10:30:00.5Z"],
)
def test_what_is_a_time(text: str) -> None:
    assert RFC3339.fullmatch(text)
    assert parse_time(text) is not None


@pytest.mark.parametrize("value", ["", "yesterday", "2025-01-15T10:30:00", None, 5, ["2025-01-15T10:30:00Z"], True])
def test_what_is_none_of_the_times(value: object) -> None:
    assert parse_time(value) is None


def test_times_compare_as_times_and_not_as_texts() -> None:
    times = ["2025-01-15T10:30:00.5Z", "2025-01-15T10:30:00Z", "2025-01-15T11:30:00.25+01:00", "", None, "soon"]
    assert earliest(*times) == "2025-01-15T10:30:00Z"
    assert latest(*times) == "2025-01-15T10:30:00.5Z"
    assert earliest("", None) == latest() == ""


def test_the_latest_event_of_a_record() -> None:
    value = parse_record(written_record("e", "g", OPTIONAL))
    assert value is not None
    assert last_event_at(value) == "2025-01-15T14:22:10Z"
    assert last_event_at(record()) == ""


def recipients(*outcomes: str) -> list[RecipientOutcome]:
    """One for each."""
    return [RecipientOutcome(f"r{number}@example.com", outcome, None, "") for number, outcome in enumerate(outcomes)]


MERGED = [
    (["in_doubt", "deferred"], ["relayed", "deferred"], ["relayed", "deferred"], ""),
    (["relayed", "deferred"], ["in_doubt", "relayed"], ["relayed", "relayed"], ""),
    (["relayed", "deferred"], ["deferred", "failed"], ["relayed", "failed"], ""),
    (["in_doubt", "relayed"], ["deferred", ""], ["deferred", "relayed"], ""),
    (["in_doubt", "deferred"], ["deferred", ""], ["deferred", "deferred"], "deferred"),
    (["in_doubt", "failed"], ["failed", "deferred"], ["failed", "failed"], "failed"),
    (["in_doubt", "in_doubt"], ["failed", ""], ["failed", "in_doubt"], "in_doubt"),
]


@pytest.mark.parametrize(("before", "later", "expected", "outcome"), MERGED)
def test_what_was_final_of_a_recipient_stays(
    before: list[str], later: list[str], expected: list[str], outcome: str
) -> None:
    noted = record(outcome="" if "relayed" in before else before[0], recipients=recipients(*before))
    said = "" if "relayed" in later else later[0]
    for _ in range(2):  # the same again changes nothing
        noted = orjson.loads(settled_record(noted, outcome=said, remote_id="", recipients=recipients(*later)))
        assert [each["outcome"] for each in noted["recipients"]] == expected
        assert [each["address"] for each in noted["recipients"]] == ["r0@example.com", "r1@example.com"]
        assert noted.get("outcome", "") == outcome


def test_recipients_come_into_a_record_that_has_none() -> None:
    noted = record(outcome="in_doubt")
    settled = orjson.loads(settled_record(noted, outcome="", remote_id="", recipients=recipients("relayed", "failed")))
    assert [each["outcome"] for each in settled["recipients"]] == ["relayed", "failed"]
    assert "outcome" not in settled


@pytest.mark.parametrize("room_bytes", [100, 300, 1000, 60_000])
def test_an_abridged_record_fits_and_says_which_mail_it_is(room_bytes: int) -> None:
    opens = [{"event_id": "x" * 36, "opened_at": "2025-01-15T11:05:33Z"}] * 1000
    value = written_record("e" * 36, "g", OPTIONAL, opened_at_list=opens)
    shorter = abridged_record(value, room_bytes)
    assert len(shorter) <= room_bytes
    read = orjson.loads(shorter)
    assert (read["email_id"], read["truncated"]) == ("e" * 36, True)
    assert "opened_at_list" not in read
    if room_bytes >= 1000:
        assert read.keys() | {"opened_at_list"} == orjson.loads(value).keys() | {"truncated"}, "nothing else is lost"
