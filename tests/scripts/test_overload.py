"""The drill ``overload``: what it calls flat, what it calls the 99th of a hundred, and that its sink takes its time."""

from __future__ import annotations

import math
import smtplib
import time

import pytest

from relay import contract
from scripts.drills.overload import GROWTH_MB, Memory, quantile
from scripts.drills.sink import RunningSink

WAIT_SECONDS = 0.2


def test_memory_that_only_wavers_is_flat() -> None:
    memory = Memory([40.0] * 20 + [60.0, 60.5] * 40)
    assert memory.is_flat(GROWTH_MB)
    assert abs(memory.slope_mb_per_hour) < 30


@pytest.mark.parametrize("mb_a_second", [0.1, 1.0])
def test_memory_that_grows_all_the_time_is_not_flat(mb_a_second: float) -> None:
    memory = Memory([60.0 + mb_a_second * at for at in range(600)])
    assert memory.fifth(5) - memory.fifth(2) > GROWTH_MB
    assert not memory.is_flat(GROWTH_MB)
    assert memory.slope_mb_per_hour == pytest.approx(mb_a_second * 3600)


def test_growth_in_the_first_fifth_does_not_count() -> None:
    assert Memory([float(at) for at in range(20)] + [60.0] * 80).is_flat(GROWTH_MB)


def test_a_quantile_is_one_of_the_values() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [quantile(hundred, share) for share in (0.5, 0.99, 1)] == [51, 100, 100]
    assert math.isnan(quantile([], 0.99))


def test_the_sink_takes_its_time_over_each_mail_and_counts_it() -> None:
    with RunningSink.started(WAIT_SECONDS) as sink:
        with smtplib.SMTP("127.0.0.1", sink.port, timeout=10) as client:
            for number in range(2):
                mail = f"{contract.TRACKING_HEADER}: group/mail-{number}\r\n\r\n" + "A line of text.\r\n" * 20_000
                begun = time.monotonic()
                client.sendmail("a@example.com", ["b@example.com"], mail)
                assert time.monotonic() - begun >= WAIT_SECONDS
        assert sink.stop() == {"mail-0": 1, "mail-1": 1}
