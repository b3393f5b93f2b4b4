"""The circuit: one probe at a time, ever less often, up to the cap."""

from __future__ import annotations

from relay.delivery.circuit import FIRST_DELAY_SECONDS, Circuit, CircuitState
from relay.delivery.trouble import Probe


def opened(cap_seconds: float = 2.0) -> Circuit:
    circuit = Circuit()
    circuit.open("refused", Probe.NOOP, 100.0, cap_seconds)
    return circuit


def test_it_starts_closed_and_says_why_it_opened() -> None:
    assert repr(Circuit()) == "closed"
    circuit = opened()
    assert (circuit.is_closed, circuit.reason, circuit.since) == (False, "refused", 100.0)
    assert repr(circuit) == "open (noop): refused"


def test_one_probe_at_a_time_and_not_before_its_time() -> None:
    circuit = opened()
    assert not circuit.begin_probe(100.0)
    assert circuit.seconds_to_probe(100.0) == FIRST_DELAY_SECONDS
    assert circuit.begin_probe(100.0 + FIRST_DELAY_SECONDS)
    assert circuit.state is CircuitState.HALF_OPEN
    assert not circuit.begin_probe(200.0)


def test_failed_probes_are_ever_further_apart_up_to_the_cap() -> None:
    circuit = opened(cap_seconds=2.0)
    now, delays = 100.0, []
    for _ in range(6):
        delays.append(circuit.seconds_to_probe(now))
        now += delays[-1]
        assert circuit.begin_probe(now)
        circuit.probe_failed("still", now)
    assert delays == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert circuit.reason == "still"


def test_a_void_probe_changes_nothing() -> None:
    circuit = opened()
    circuit.begin_probe(101.0)
    circuit.probe_void(101.0)
    assert circuit.seconds_to_probe(101.0) == FIRST_DELAY_SECONDS
    circuit.close()
    circuit.probe_void(102.0)
    assert circuit.is_closed


def test_stragglers_neither_open_it_twice_nor_put_the_probe_off() -> None:
    circuit = opened()
    circuit.open("other", Probe.MAIL, 100.1, 30.0)
    circuit.probe_failed("straggler", 100.1)
    assert (circuit.reason, circuit.probe) == ("refused", Probe.NOOP)
    assert circuit.begin_probe(100.0 + FIRST_DELAY_SECONDS)


def test_closing_forgets_the_past() -> None:
    circuit = opened()
    for now in (101.0, 103.0, 106.0):
        circuit.begin_probe(now)
        circuit.probe_failed("still", now)
    circuit.close()
    assert (circuit.is_closed, circuit.reason, circuit.since) == (True, "", None)
    circuit.open("again", Probe.MAIL, 200.0, 30.0)
    assert circuit.seconds_to_probe(200.0) == FIRST_DELAY_SECONDS
