"""The whole examination: every party asked side by side, each answer as it comes, an end in any case."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import gevent

from relay.ops.doctor.advice import known_names, settings_advice
from relay.ops.doctor.amazon import events, ses
from relay.ops.doctor.bus import NOTHING_RUNS, Programs, nats
from relay.ops.doctor.finding import Finding, failed
from relay.ops.doctor.host import room, this_host
from relay.ops.doctor.smtp import smarthost
from relay.settings import Settings

PATIENCE_SECONDS = 16.0
"""For all parties together; each has bounds of its own within it."""


LOOK_SECONDS = 0.05
"""How often a thread is looked at."""


class Chapter(NamedTuple):
    """What one party answered."""

    title: str
    findings: list[Finding]


class _Party:
    """One who is asked; what it has said is kept, also when it never ends."""

    def __init__(self, title: str, ask: Callable[[], Iterable[Finding]]) -> None:
        self.title = title
        self._ask = ask
        self.findings: list[Finding] = []
        self.is_over = False

    def listen(self) -> None:
        """Takes the answers until there are no more. Never raises."""
        try:
            for finding in self._ask():
                self.findings.append(finding)
        except Exception as error:  # noqa: BLE001 - one party's surprise must not cost the others' answers
            problem = f"asking broke off: {type(error).__name__}: {error}"
            remedy = "what was found before holds; if it happens again, report it"
            self.findings.append(failed(self.title, problem, remedy))
        self.is_over = True


def examine(
    settings: Settings, running: Programs = NOTHING_RUNS, pids: Mapping[str, int] | None = None
) -> Iterator[Chapter]:
    """The chapters, in a fixed order, each when its party has ended. Takes 20 s at most, whoever is dead."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    asked: list[tuple[_Party, Callable[[float], object]]] = []
    for title, ask in (
        ("NATS", lambda: nats(settings, may_make=False, running=running)),
        ("Smarthost", lambda: smarthost(settings, is_thorough=True)),
    ):
        party = _Party(title, ask)
        asked.append((party, gevent.spawn(party.listen).join))
    # boto3 blocks: a thread of its own, which the process does not wait for at its end as it would for gevent's.
    party = _Party("Amazon", lambda: _amazon(settings))
    asked.append((party, _in_a_thread(party.listen)))
    yield Chapter("This host", [*_host(settings, pids or {})])
    for party, wait in asked:
        wait(max(0.0, deadline - time.monotonic()))
        findings = list(party.findings)
        if not party.is_over:
            detail = f"no more answers within {PATIENCE_SECONDS:g} s"
            findings.append(
                failed(
                    party.title,
                    detail,
                    "something on the way accepts connections and hangs: the service, a proxy, a firewall",
                )
            )
        if findings:
            yield Chapter(party.title, findings)


def _host(settings: Settings, pids: Mapping[str, int]) -> Iterator[Finding]:
    party = _Party("This host", lambda: _host_questions(settings, pids))
    party.listen()
    yield from party.findings


def _host_questions(settings: Settings, pids: Mapping[str, int]) -> Iterator[Finding]:
    yield known_names()
    yield from settings_advice(settings)
    yield from this_host(settings)
    yield from room(settings, pids)


def _amazon(settings: Settings) -> Iterator[Finding]:
    yield from ses(settings)
    if settings.ses_eventing_enabled:
        yield from events(settings)


def _in_a_thread(listen: Callable[[], None]) -> Callable[[float], object]:
    """Runs it in a thread; what waits for its end, so many seconds at most."""
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()

    def wait(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while thread.is_alive() and time.monotonic() < deadline:
            gevent.sleep(LOOK_SECONDS)  # the others go on

    return wait
