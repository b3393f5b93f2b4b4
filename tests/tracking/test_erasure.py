"""Personal data out of a record: what goes, what stays, and that nothing comes back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tracking.erasure import erasable, erased, without_personal_data
from relay.tracking.facts import facts_of
from relay.tracking.record import last_event_at
from tests.support.groups import record_of
from tests.support.lfx import OPTIONAL, check_record, written_record

AT = "2026-01-01T00:00:00.000Z"
LATER = "2026-02-01T00:00:00.000Z"


def erased_record(record: dict[str, Any], at: str = AT) -> dict[str, Any]:
    """The record after an erasure."""
    value = erased(orjson.dumps(record), at)
    assert value is not None
    found: dict[str, Any] = orjson.loads(value)
    return found


RICH: dict[str, Any] = {
    **orjson.loads(record_of("id-1", "spring")),
    "remote_id": "0100018f-abc-000000",
    "delivered": True,
    "delivered_at": "2025-01-15T10:30:02Z",
    "opened": True,
    "open_count": 2,
    "opened_at_list": [
        {"event_id": "e1", "opened_at": "2025-01-15T11:00:00Z", "ip_address": "192.0.2.7", "user_agent": "Mail/1.0"},
        {"event_id": "e2", "opened_at": "2025-01-15T12:00:00Z"},
    ],
    "last_opened_at": "2025-01-15T12:00:00Z",
    "click_count": 3,
    "clicks": [{"event_id": "e3", "clicked_at": "2025-01-15T12:01:00Z", "link": "https://example.com/?who=user"}],
    "folded": {"e1": "2025-01-15T11:00:01Z", "user@example.com": "2025-01-15T11:00:01Z"},
    "bounce": {"diagnostic": "550 user@example.com unknown", "event_id": "e4"},
    "event_ids": ["e1", "e2", "user@example.com"],
    "note": "called user@example.com",
}


def test_what_goes_and_what_stays() -> None:
    found = erased_record(RICH)
    text = orjson.dumps(found).decode()
    for personal in ("user@", "example.com", "192.0.2.7", "Mail/1.0", "Hello", "550"):
        assert personal not in text
    assert (found["to"], found["subject"], found["erased_at"]) == ("", "", AT)
    assert found["opened_at_list"] == [
        {"event_id": "e1", "opened_at": "2025-01-15T11:00:00Z"},
        {"event_id": "e2", "opened_at": "2025-01-15T12:00:00Z"},
    ]
    assert found["folded"] == {"e1": "2025-01-15T11:00:01Z"}
    assert (found["remote_id"], found["group_id"]) == ("0100018f-abc-000000", "spring")
    assert facts_of(found) == facts_of(RICH), "the counts stay"
    assert last_event_at(found) == last_event_at(RICH)
    assert erasable(RICH) == ["to", "subject", "opened_at_list", "clicks", "folded", "bounce", "event_ids", "note"]


def test_once_more_changes_nothing_and_the_first_time_stays() -> None:
    value = erased(orjson.dumps(RICH), AT)
    assert value is not None
    assert erased(value, LATER) == value


def test_what_came_back_goes_again() -> None:
    found = erased_record(RICH)
    assert erased_record(found | {"to": "user@example.com"}, LATER) == found


def test_what_an_event_adds_after_the_erasure_is_counted_without_its_person() -> None:
    found = erased_record(RICH)
    new_open = {"event_id": "e9", "opened_at": "2026-03-01T00:00:00Z", "user_agent": "Mail/2.0"}
    folded = found | {"open_count": 3, "opened_at_list": [*found["opened_at_list"], new_open]}
    kept = without_personal_data(folded)
    assert kept["open_count"] == 3
    assert kept["opened_at_list"][-1] == {"event_id": "e9", "opened_at": "2026-03-01T00:00:00Z"}
    assert kept["erased_at"] == AT


def test_it_is_still_a_record_for_lfx() -> None:
    value = erased(written_record("id-1", "spring", OPTIONAL), AT)
    assert value is not None
    record = orjson.loads(value)
    del record["erased_at"]  # a field of ours, which Go ignores
    assert check_record(orjson.dumps(record))["to"] == ""


def test_a_record_as_deep_as_records_may_be() -> None:
    value = b'{"note":' + b'{"a":' * 245 + b'"user@example.com"' + b"}" * 246
    found = erased(value, AT)
    assert found is not None
    assert b"user" not in found


@pytest.mark.parametrize("value", [b"", b"null", b"[]", b"{"])
def test_what_is_no_record(value: bytes) -> None:
    assert erased(value, AT) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.just("user@example.com") | st.just("192.0.2.7 Mail/1.0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["to", "subject", "note", "x_id", "ids", "any_at", "outcomes"]), JSON))
def test_no_address_survives_at_any_depth(record: dict[str, Any]) -> None:
    found = erased_record(record)
    text = orjson.dumps(found).decode()
    assert "@example.com" not in text
    assert "Mail/1.0" not in text
    assert erased_record(found) == found
