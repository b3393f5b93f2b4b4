"""Group ids as subject tokens: legal, short, and no two share one; and in the tracking header, and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tracking.groups import (
    MAX_TOKEN_LENGTH,
    SHARED_TOKEN,
    group_of,
    group_token,
    read_tracking_id,
    tracking_id,
)

LEGAL = re.compile(r"[A-Za-z0-9_/=-]{1,128}")


@pytest.mark.parametrize("group_id", ["a", "invite-batch-abc123", "a/b", "_x", "/", "9" * 128])
def test_a_plain_id_is_its_own_token(group_id: str) -> None:
    assert group_token(group_id) == group_id


NOT_PLAIN = ["-", "-a", "=", "=LQ", "a.b", "*", ">", "a b", "", "a@b", "ü", "🚀", "\n", "9" * 129, "🚀" * 10_000]


@pytest.mark.parametrize("group_id", NOT_PLAIN)
def test_anything_else_is_encoded(group_id: str) -> None:
    token = group_token(group_id)
    assert token.startswith("=")
    assert token != SHARED_TOKEN
    assert LEGAL.fullmatch(token)


@given(st.text(max_size=300))
def test_a_token_is_always_legal(group_id: str) -> None:
    token = group_token(group_id)
    assert LEGAL.fullmatch(token)
    assert len(token) <= MAX_TOKEN_LENGTH


ANY_TEXT = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=st.characters(categories=["Cs", "L"]), max_size=20),  # lone surrogates too
    st.text(alphabet="aLQ/_-=.*> ", max_size=6),
    st.text(alphabet="a-", min_size=125, max_size=131),
)


@given(ANY_TEXT, ANY_TEXT)
def test_no_two_ids_share_a_token(one: str, other: str) -> None:
    assert (group_token(one) == group_token(other)) == (one == other)


@given(st.lists(st.text(alphabet="=-aQLw7", max_size=4), unique=True, max_size=200))
def test_no_ids_of_many_share_a_token(group_ids: list[str]) -> None:
    assert len({group_token(group_id) for group_id in group_ids}) == len(group_ids)


@given(ANY_TEXT)
def test_a_token_reaches_no_other_subject(group_id: str) -> None:
    token = group_token(group_id)
    assert not set(token) & set(".*> \t\r\n")
    assert token != SHARED_TOKEN


def test_a_long_id_does_not_share_the_token_of_what_is_shown_of_it() -> None:
    long = "x" * 10_000
    assert group_token(long) != group_token(group_token(long))


@given(st.text(alphabet="=-_/aLQ", min_size=1, max_size=5))
def test_no_id_can_pass_for_an_encoded_one(group_id: str) -> None:
    assert group_token(group_token(group_id)) == group_id or group_token(group_id) != group_token(group_token(group_id))


@pytest.mark.parametrize(
    ("group_id", "group"),
    [
        ("a/b", "a/b"),
        ("a b@c", "a b@c"),
        ("x" * 256, "x" * 256),
        ("ü", "=w7w"),
        ("a\r\nBcc: x", "=YQ0KQmNjOiB4"),
        ("=w7w", "=PXc3dw"),  # no token, though it looks like one
        (" a", "=IGE"),  # whoever reads a header strips it
    ],
)
def test_the_tracking_header(group_id: str, group: str) -> None:
    assert tracking_id(group_id, "id-1") == f"{group}/id-1"
    assert tracking_id("x" * 257, "id-1").startswith("==")


@given(st.text(max_size=200))
def test_a_token_tells_its_group_or_nothing(group_id: str) -> None:
    token = group_token(group_id)
    assert group_of(token) in ({None} if token.startswith("==") else {group_id})


@pytest.mark.parametrize("token", [SHARED_TOKEN, "a b", "=YQ", "=!", "=", "==abc", "=/w", "a.b", "=YQ==="])
def test_what_is_no_groups_token(token: str) -> None:
    assert group_of(token) is None or group_token(str(group_of(token))) == token


def test_half_a_surrogate_pair_is_no_group_that_could_be_shown() -> None:
    assert group_of(group_token("\ud800")) is None


@given(ANY_TEXT | st.text(alphabet="=aQLw7/ -", max_size=8), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_the_tracking_header_gives_back_what_was_put_in(group_id: str, email_id: str) -> None:
    value = tracking_id(group_id, email_id)
    is_told = not value.startswith("==") and not re.search("[\ud800-\udfff]", group_id)
    assert read_tracking_id(value) == (group_id if is_told else "", email_id)


@given(st.text(max_size=300))
def test_any_tracking_header_can_be_read(value: str) -> None:
    group_id, email_id = read_tracking_id(value)
    assert "/" not in email_id
    assert email_id in value
    assert len(group_id) <= 998
