"""This host's clock beside another's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay.ops.doctor.clock import Watch, epoch

NOW = 1_800_000_000.0


def ticking(*times: float) -> Callable[[], float]:
    """A clock that shows these one after the other."""
    left = list(times)
    return lambda: left.pop(0)


@pytest.mark.parametrize(
    ("theirs", "level", "said"),
    [
        (NOW, "ok", "agrees with NATS's"),
        (NOW + 1.9 + 0.5, "ok", "agrees"),
        (NOW - 1.9, "ok", "agrees"),
        (NOW + 3.5, "warning", "3 s behind NATS's"),
        (NOW - 3, "warning", "3 s ahead of NATS's"),
        (NOW - 61, "failed", "61 s ahead of NATS's"),
        (NOW + 3600.5, "failed", "60 min behind NATS's"),
        (NOW + 86400.5, "failed", "24 h behind NATS's"),
    ],
)
def test_a_difference(theirs: float, level: str, said: str) -> None:
    """The answer was half a second under way."""
    finding = Watch(ticking(NOW, NOW + 0.5)).compare(theirs, "NATS")
    assert (finding.what, finding.level) == ("clock", level)
    assert said in finding.detail
    assert ("NTP" in finding.remedy) == (level != "ok")


def test_a_slow_answer_is_no_difference() -> None:
    assert Watch(ticking(NOW, NOW + 30)).compare(NOW + 15, "NATS").ok


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T08:00:00.123456789Z", NOW + 0.123456),
        ("Fri, 15 Jan 2027 08:00:00 GMT", NOW + 0.5),
        ("", None),
        ("yesterday", None),
    ],
)
def test_times_as_they_are_written(text: str, at: float | None) -> None:
    found = epoch(text)
    assert found == at if at is None else found == pytest.approx(at, abs=1e-5)
