"""Back-pressure: what is taken and what is refused, on a clock of the test's own."""

from __future__ import annotations

from relay.submission.admission import Admission


def fill(admission: Admission, count: int, now: float = 0.0, patience_seconds: float = 30.0) -> int:
    """Offers ``count`` requests of 10 bytes; how many were taken."""
    return sum(admission.take(now, 10, patience_seconds) for _ in range(count))


def serve(admission: Admission, per_second: float, start: float, seconds: float) -> float:
    """Finishes requests at a steady rate; the time afterwards."""
    count = int(per_second * seconds)
    for number in range(count):
        admission.finish(start + (number + 1) / per_second, 10)
    return start + seconds


def test_a_burst_is_taken_up_to_the_limit() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    assert fill(admission, 6000) == 5000
    assert admission.backlog == 5000
    assert admission.backlog_bytes == 50_000


def test_the_limit_in_bytes() -> None:
    assert fill(Admission(limit=5000, limit_bytes=95, busy_above=20), 20) == 9


def test_what_would_wait_too_long_is_refused() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    fill(admission, 1000)
    now = serve(admission, per_second=10, start=0, seconds=5)  # 950 left at 10/s: 95 s
    assert not admission.take(now, 10, patience_seconds=30)
    assert admission.take(now, 10, patience_seconds=200)


def test_what_can_be_served_in_time_is_taken() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    fill(admission, 4000)
    now = serve(admission, per_second=400, start=0, seconds=2)
    assert 7 < admission.predicted_wait_seconds(now) < 9
    assert admission.take(now, 10, patience_seconds=30)


def test_a_stalled_smarthost_refuses_newcomers() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    fill(admission, 100)
    assert admission.take(0.9, 10, 30), "nothing is known in the first second"
    assert admission.take(2.0, 10, 30), "a smarthost may take seconds for each mail"
    assert not admission.take(16.0, 10, 30)


def test_a_quiet_time_says_nothing_about_capacity() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    for number in range(100):  # one a second, each at once
        admission.take(number, 10, 30)
        admission.finish(number + 0.01, 10)
    assert fill(admission, 5000, now=100.0) == 5000


def test_what_is_finished_makes_room() -> None:
    admission = Admission(limit=2, limit_bytes=1000, busy_above=20)
    assert fill(admission, 3) == 2
    admission.finish(1.0, 10)
    assert fill(admission, 2, now=1.0) == 1


def give_up(admission: Admission, now: float) -> None:
    """One whose turn never came."""
    admission.waited_in_vain()
    admission.finish(now, 10)


def test_who_gave_up_waiting_makes_no_room() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    fill(admission, 1000)
    now = serve(admission, per_second=10, start=0, seconds=5)
    for _ in range(900):
        give_up(admission, now)
    assert fill(admission, 1000, now, patience_seconds=5) <= 1, "50 are left, and 10 a second are served"


def test_while_nobody_is_served_the_wait_is_taken_to_grow() -> None:
    admission = Admission(limit=5000, limit_bytes=64_000_000, busy_above=20)
    fill(admission, 1000)
    for number in range(200):
        give_up(admission, number / 10)
    assert admission.predicted_wait_seconds(20.0) == 40.0
