"""Silence told from slowness, by a clock of our own."""

from __future__ import annotations

from relay.delivery.silence import FORGOTTEN_SECONDS, Silence

MANY = 100


def test_three_mails_in_doubt_and_no_answer_for_20_seconds() -> None:
    heard = Silence()
    heard.answered_at = 99.0
    for dot_at in (100.0, 101.0):
        heard.doubt(dot_at, 110.0)
    assert heard.seconds(MANY, 125.0) == 0.0
    heard.doubt(102.0, 112.0)
    assert heard.seconds(MANY, 119.9) == 0.0
    assert heard.seconds(MANY, 120.0) == 20.0
    assert heard.seconds(MANY, 125.0) == 25.0


def test_the_first_of_them_is_the_first_that_was_sent() -> None:
    heard = Silence()
    # An impatient caller's time is over before that of one who came earlier.
    heard.doubt(110.0, 111.0)
    heard.doubt(100.0, 130.0)
    heard.doubt(112.0, 130.0)
    assert heard.seconds(MANY, 131.0) == 31.0


def test_an_answer_ends_it_and_those_sent_before_count_no_more() -> None:
    heard = Silence()
    for _ in range(3):
        heard.doubt(100.0, 125.0)
    heard.answered_at = 126.0
    assert heard.seconds(MANY, 130.0) == 0.0
    for _ in range(5):
        heard.doubt(125.9, 150.0)
    assert heard.seconds(MANY, 150.0) == 0.0
    # Three new ones are needed.
    heard.doubt(127.0, 150.0)
    heard.doubt(127.0, 150.0)
    heard.doubt(125.9, 150.0)
    assert heard.seconds(MANY, 150.0) == 0.0
    heard.doubt(128.0, 150.0)
    assert heard.seconds(MANY, 150.0) == 23.0


def test_what_was_long_ago_proves_nothing() -> None:
    heard = Silence()
    for _ in range(2):
        heard.doubt(100.0, 101.0)
    heard.doubt(7200.0, 7201.0)
    assert heard.seconds(MANY, 7230.0) == 0.0
    for _ in range(2):
        heard.doubt(7202.0, 7203.0)
    assert heard.seconds(MANY, 7230.0) == 30.0
    assert heard.seconds(MANY, 7203.0 + FORGOTTEN_SECONDS + 1) == 0.0


def test_who_was_away_begins_anew() -> None:
    heard = Silence()
    for _ in range(3):
        heard.doubt(100.0, 125.0)
    heard.forget_doubts()
    assert heard.seconds(MANY, 126.0) == 0.0
    heard.doubt(127.0, 128.0)
    heard.doubt(127.0, 128.0)
    heard.doubt(127.0, 128.0)
    assert heard.seconds(MANY, 128.0) == 0.0


def test_every_connection_waits() -> None:
    heard = Silence()
    heard.waits("a", 100.0)
    heard.waits("b", 105.0)
    assert heard.seconds(2, 124.0) == 0.0
    assert heard.seconds(2, 125.0) == 20.0
    assert heard.seconds(3, 125.0) == 0.0
    heard.waits_no_more("a")
    assert heard.seconds(2, 126.0) == 0.0
    heard.waits_no_more("a")  # nothing more
