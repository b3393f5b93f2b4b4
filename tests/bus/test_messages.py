"""Subjects, header fields and where replies may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.bus.messages import MAX_SUBJECT_BYTES, FixedHeaders, ReplyRule, header_block, is_plain_subject

OWN_INBOX = "_INBOX.own"


def test_header_fields_as_they_travel() -> None:
    assert header_block({"A": "1", "B": "ü"}) == "NATS/1.0\r\nA: 1\r\nB: ü\r\n\r\n".encode()


@pytest.mark.parametrize("line_end", ["\r", "\n", "\r\n", "\n\r"])
@pytest.mark.parametrize("at", ["{}x", "x{}", "x{}x"])
def test_a_line_end_is_refused_in_a_name_and_in_a_value(line_end: str, at: str) -> None:
    text = at.format(line_end)
    for headers in ({text: "1"}, {"A": text}, {"A": "1", "B": text, "C": "2"}):
        with pytest.raises(ValueError, match="line end"):
            header_block(headers)
        with pytest.raises(ValueError, match="line end"):
            FixedHeaders(headers)


def test_fixed_header_fields_are_the_same_fields() -> None:
    fixed = FixedHeaders({"A": "1"})
    assert fixed == {"A": "1"}
    assert {**fixed, "B": "2"} == {"A": "1", "B": "2"}
    assert fixed.block == header_block({"A": "1"})


@given(
    st.lists(st.sampled_from(["_INBOX", "_R_", "a.b", "a*", "", "a.", "."]), max_size=3, unique=True),
    st.sampled_from(["_INBOX.", "_INBOX.own", "_INBOX.own.", "_R_", "a.b.", "a*.", ".", "_INBOXES.", "a+b."]),
    st.text(st.sampled_from("ab.*> \t\r\nü\x00\x7f\ud800"), max_size=6) | st.sampled_from(["x" * 3993, "ü" * 1997]),
)
def test_a_reply_may_go_to_plain_subjects_under_the_prefixes(prefixes: list[str], begin: str, end: str) -> None:
    nats_subject = begin + end
    assert ReplyRule(tuple(prefixes), OWN_INBOX).allows(nats_subject) == (
        nats_subject.startswith(tuple(f"{prefix}." for prefix in prefixes))
        and not nats_subject.startswith(OWN_INBOX)
        and is_plain_subject(nats_subject)
    )


@pytest.mark.parametrize(("length", "is_allowed"), [(MAX_SUBJECT_BYTES, True), (MAX_SUBJECT_BYTES + 1, False)])
def test_a_reply_subject_has_a_length(length: int, is_allowed: bool) -> None:
    assert ReplyRule(("a",), OWN_INBOX).allows("a.".ljust(length, "x")) == is_allowed
