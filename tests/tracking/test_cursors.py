"""Cursors: each names its place in its group and its log, and nothing else passes for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import contract
from relay.errors import SubmissionRejected
from relay.tracking.cursors import CURSOR_CHARACTERS, Place, decode_cursor, encode_cursor

PLACES = st.builds(Place, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))


@given(st.text(max_size=100), PLACES)
def test_a_cursor_names_its_place(group_id: str, place: Place) -> None:
    cursor = encode_cursor(group_id, place)
    assert decode_cursor(group_id, cursor) == place
    assert cursor.replace("-", "a").replace("_", "a").isalnum()


@given(st.text(max_size=10), st.text(max_size=10), PLACES)
def test_a_cursor_of_another_group_is_refused(one: str, other: str, place: Place) -> None:
    if one != other:
        with pytest.raises(SubmissionRejected, match=contract.CURSOR_OF_ANOTHER_GROUP):
            decode_cursor(other, encode_cursor(one, place))


@given(PLACES, st.integers(0, CURSOR_CHARACTERS - 1), st.characters())
def test_a_changed_cursor_is_refused(place: Place, at: int, character: str) -> None:
    cursor = encode_cursor("g", place)
    changed = cursor[:at] + character + cursor[at + 1 :]
    if changed.replace("+", "-").replace("/", "_") != cursor:
        with pytest.raises(SubmissionRejected, match=contract.INVALID_CURSOR):
            decode_cursor("g", changed)


@given(st.text())
def test_anything_else_is_refused(cursor: str) -> None:
    with pytest.raises(SubmissionRejected, match=contract.INVALID_CURSOR):
        decode_cursor("g", cursor)


@given(PLACES, st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_cursor_of_another_log_is_refused(place: Place, one: str, other: str) -> None:
    cursor = encode_cursor("g", place, one)
    assert decode_cursor("g", cursor, one) == decode_cursor("g", cursor) == place
    assert decode_cursor("g", encode_cursor("g", place), one) == place, "nobody said of which log it is"
    if one != other:
        with pytest.raises(SubmissionRejected, match=contract.INVALID_CURSOR):
            decode_cursor("g", cursor, other)
