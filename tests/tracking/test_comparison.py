"""One mail's facts held against its record."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tracking.comparison import compare, compared_part
from relay.tracking.facts import Fact
from relay.tracking.feed import LoggedFact
from tests.support.groups import SENT_AT, record_of

AT = "2025-01-15T11:00:00Z"


def fact(kind: str, event_id: str = "", sequence: int = 0) -> LoggedFact:
    """A fact of the mail ``m``."""
    return LoggedFact(sequence, "g", kind, "m", AT, event_id)


def opens(*event_ids: str) -> list[dict[str, str]]:
    """A record's list of opens."""
    return [{"event_id": event_id, "opened_at": f"2025-01-15T12:00:0{n}Z"} for n, event_id in enumerate(event_ids)]


SENT = fact("sent", sequence=1)
CASES: list[tuple[str, dict[str, Any], list[LoggedFact], list[str], list[int]]] = [
    ("all is well", {}, [SENT], [], []),
    ("sent is missing", {}, [], ["sent"], []),
    ("sent twice", {}, [SENT, fact("sent", sequence=2)], [], [2]),
    ("in doubt", {"outcome": "in_doubt"}, [], [], []),
    ("in doubt and logged", {"outcome": "in_doubt"}, [SENT], [], []),
    ("in doubt and logged twice", {"outcome": "in_doubt"}, [SENT, fact("sent", sequence=2)], [], [2]),
    ("failed after all", {"outcome": "failed"}, [SENT], [], [1]),
    ("an outcome of a later version", {"outcome": "parked"}, [SENT], [], []),
    ("delivered is missing", {"delivered": True}, [SENT], ["delivered"], []),
    ("delivered never was", {}, [SENT, fact("delivered", sequence=2)], [], [2]),
    (
        "an open is missing",
        {"opened": True, "open_count": 2, "opened_at_list": opens("a", "b")},
        [SENT, fact("opened", sequence=2), fact("open", "a", 3)],
        ["open/b"],
        [],
    ),
    (
        "an open twice",
        {"opened": True, "open_count": 1, "opened_at_list": opens("a")},
        [SENT, fact("opened", sequence=2), fact("open", "a", 3), fact("open", "a", 4)],
        [],
        [4],
    ),
    (
        "an open that is not in the list",
        {"opened": True, "open_count": 1, "opened_at_list": opens("a")},
        [SENT, fact("opened", sequence=2), fact("open", "x", 3), fact("open", "a", 4)],
        [],
        [3],
    ),
    (
        "opens that the list forgot, all there",
        {"opened": True, "open_count": 3, "opened_at_list": opens("c")},
        [SENT, fact("opened", sequence=2), fact("open", "a", 3), fact("open", "b", 4), fact("open", "c", 5)],
        [],
        [],
    ),
    (
        "opens that the list forgot, none there",
        {"opened": True, "open_count": 3, "opened_at_list": opens("c")},
        [SENT, fact("opened", sequence=2)],
        ["open/c", "open/unlisted-1", "open/unlisted-2"],
        [],
    ),
    (
        "an id of our own is taken",
        {"opened": True, "open_count": 2},
        [SENT, fact("opened", sequence=2), fact("open", "unlisted-1", 3)],
        ["open/unlisted-2"],
        [],
    ),
    (
        "clicks",
        {"click_count": 2},
        [SENT, fact("click", "a", 2), fact("click", "b", 3), fact("click", "c", 4)],
        ["clicked"],
        [4],
    ),
    (
        "a click is missing",
        {"click_count": 3, "clicks": [{"event_id": "a", "clicked_at": AT, "link": "https://example.com/"}]},
        [SENT, fact("clicked", sequence=2)],
        ["click/a", "click/unlisted-1", "click/unlisted-2"],
        [],
    ),
    ("bounced", {"failed": True, "bounced_at": AT}, [SENT], ["failed", "bounced"], []),
    ("more opens than there can be", {"opened": True, "open_count": 2**40}, [SENT], ["opened"], []),
    ("a kind that is none", {}, [SENT, fact("strange", sequence=2)], [], []),
    ("a list that is none", {"open_count": 1, "opened_at_list": 7}, [SENT], ["opened", "open/unlisted-1"], []),
    (
        "an event id that is none",
        {"open_count": 1, "opened_at_list": opens("a\n")},
        [SENT],
        ["opened", "open/unlisted-1"],
        [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("_name", "changed", "logged", "missing", "surplus"), CASES, ids=[case[0] for case in CASES])
def test_one_mail(
    _name: str, changed: dict[str, Any], logged: list[LoggedFact], missing: list[str], surplus: list[int]
) -> None:
    record = orjson.loads(record_of("m", "g")) | changed
    difference = compare(record, logged)
    found = [each.fact.value + (f"/{each.event_id}" if each.event_id else "") for each in difference.missing]
    assert sorted(found) == sorted(missing)
    assert sorted(each.sequence for each in difference.surplus) == surplus
    assert all(each.at for each in difference.missing)


def test_facts_get_the_times_of_their_events() -> None:
    record = orjson.loads(record_of("m", "g")) | {
        "delivered": True,
        "delivered_at": AT,
        "open_count": 2,
        "opened_at_list": opens("a", "b"),
        "last_opened_at": "2025-01-15T12:00:01Z",
        "click_count": 1,
        "clicks": [{"event_id": "c", "clicked_at": "2025-01-15T12:00:02Z"}],
        "last_clicked_at": "2025-01-15T12:00:09Z",
        "failed": True,
    }
    at = {(each.fact, each.event_id): each.at for each in compare(record, []).missing}
    assert at == {
        (Fact.SENT, ""): SENT_AT,
        (Fact.DELIVERED, ""): AT,
        (Fact.OPENED, ""): "2025-01-15T12:00:00Z",
        (Fact.OPEN, "a"): "2025-01-15T12:00:00Z",
        (Fact.OPEN, "b"): "2025-01-15T12:00:01Z",
        (Fact.CLICKED, ""): "2025-01-15T12:00:02Z",
        (Fact.CLICK, "c"): "2025-01-15T12:00:02Z",
        (Fact.FAILED, ""): SENT_AT,
    }


VALUES = st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(["in_doubt", "failed", AT, "odd"])
EVENT = st.just({"event_id": "a", "opened_at": AT, "clicked_at": SENT_AT, "user_agent": "Mail/1.0"})
LISTS = st.dictionaries(st.sampled_from(["opened_at_list", "clicks"]), st.lists(EVENT | VALUES, max_size=3))
NAMES = st.sampled_from(["outcome", "delivered", "opened", "open_count", "click_count", "failed", "bounced_at", "to"])
FACTS = st.builds(fact, st.sampled_from([each.value for each in Fact]), st.sampled_from(["", "a", "b"]))


@given(st.dictionaries(NAMES, VALUES), LISTS, st.lists(FACTS, max_size=4))
def test_what_is_kept_of_a_record_compares_as_the_record(
    changed: dict[str, Any], lists: dict[str, list[Any]], logged: list[LoggedFact]
) -> None:
    record = orjson.loads(record_of("m", "g")) | changed | lists
    logged = [each._replace(sequence=number) for number, each in enumerate(logged)]
    part = compared_part(record)
    assert compare(part, logged) == compare(record, logged)
    assert b"user@example.com" not in orjson.dumps(part)
    assert b"Mail/1.0" not in orjson.dumps(part)
