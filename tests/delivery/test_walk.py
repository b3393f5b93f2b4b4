"""A random walk over the whole of delivery: many callers, a bad server, and at the end every mail is accounted for."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest

from relay.delivery.config import Timeouts
from relay.delivery.outcome import Outcome, State
from relay.delivery.smarthost import Smarthost
from relay.delivery.trouble import LocalFailure
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import (
    Action,
    ScriptedSmtp,
    drop,
    eventually,
    garbage,
    half,
    say,
    say_and_drop,
    stall,
    wait,
)

SENDER = "sender@example.org"
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
CALLERS = 200
MAILS_EACH = 4
KILLED = 40
POOL_SIZE = 12
PAUSE_SECONDS = 0.3
LIMIT = 0.15
MARGIN = 2.0
SEEDS = range(4)
TROUBLE = (0.01, 0.1, 0.03)
"""How often something is not as it should be."""
THROTTLED_AT = (150, 300)
"""Mails after which one is refused for being too fast."""

GOODBYE = say_and_drop("421 4.3.2 closing")
CROWDED = say_and_drop("421 4.7.0 Too many concurrent SMTP connections")
BUSY = say("451 4.3.0 later")
THROTTLED = say("454 Throttling failure: Maximum sending rate exceeded")
OPENING = [(8, wait(0.01)), (2, wait(0.05)), (2, drop()), (2, GOODBYE), (1, CROWDED)]
COMMAND = [(4, wait(0.01)), (1, wait(0.05)), (1, drop()), (1, stall()), (1, half()), (1, GOODBYE), (1, garbage())]
DOT = [
    (10, wait(0.02)),
    (5, wait(0.1)),
    (2, wait(2 * LIMIT)),
    (2, drop()),
    (1, stall()),
    # Taken, but the answer does not arrive.
    (2, half()),
    (1, Action(b"250 2.0.0 O", "drop")),
    (2, GOODBYE),
    (2, BUSY),
    (2, say("454 4.7.0 Temporary service failure")),
    (2, say("550 5.7.1 no")),
]


def moods(chance: random.Random, trouble: float, actions: list[tuple[int, Action]]) -> Callable[[], Action | None]:
    """Ask for one of ``actions``, by their weights, in ``trouble`` of all cases."""
    weights, choices = zip(*actions, strict=True)
    return lambda: chance.choices(choices, weights)[0] if chance.random() < trouble else None


class Walk:
    """What the callers did and got; a mail's id is in its forward-path."""

    def __init__(self, smarthost: Smarthost, chance: random.Random) -> None:
        self.smarthost = smarthost
        self.chance = chance
        self.begun: set[str] = set()
        self.inside: set[int] = set()
        """Callers that wait for an answer."""
        self.told: dict[str, Outcome] = {}
        self.settled: dict[str, list[Outcome]] = {}
        self.overdue: list[float] = []

    def call(self, number: int) -> None:
        for turn in range(MAILS_EACH):
            gevent.sleep(self.chance.random() * PAUSE_SECONDS)
            path = f"mail{number}.{turn}@example.com"
            self.begun.add(path)
            self.inside.add(number)
            deadline = soon(self.chance.choice((0.01, 0.1, 0.3, 1.0, 3.0)))
            [self.told[path]] = self.smarthost.relay(SENDER, (path,), CONTENT, deadline, partial(self.settle, path))
            self.inside.discard(number)
            self.overdue.append(time.monotonic() - deadline)

    def settle(self, path: str, outcomes: list[Outcome]) -> None:
        self.settled.setdefault(path, []).extend(outcomes)

    def last_of(self, path: str) -> Outcome:
        """What is known of the mail in the end."""
        return (self.settled.get(path) or [self.told[path]])[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_mail_is_accounted_for(seed: int, certificate: tuple[Path, Path]) -> None:
    chance = random.Random(seed)
    trouble = TROUBLE[seed % len(TROUBLE)]
    script: dict[str, Any] = {phase: moods(chance, trouble, OPENING) for phase in ("banner", "ehlo", "noop")}
    script |= {phase: moods(chance, trouble, COMMAND) for phase in ("mail", "rcpt", "data", "rset", "quit")}
    mails, throttled_at = itertools.count(), THROTTLED_AT if seed % 2 else ()
    dots = moods(chance, 3 * trouble, DOT)
    script["dot"] = lambda: THROTTLED if next(mails) in throttled_at else dots() or wait(0.02)
    tls: dict[str, Any] = {"tls": "starttls", "ca_file": str(certificate[0])} if seed % 3 == 1 else {}
    limits = dict.fromkeys(Timeouts.__dataclass_fields__, LIMIT) | {"dot_seconds": 3 * LIMIT}
    with ScriptedSmtp(
        script,
        extensions=("PIPELINING", "ENHANCEDSTATUSCODES")[seed % 2 :],
        tls="starttls" if tls else "",
        certificate=certificate,
    ) as server:
        smarthost = Smarthost(
            config_for(server, pool_size=POOL_SIZE, max_messages=20, idle_seconds=0.1, **limits, **tls)
        )
        walk = Walk(smarthost, chance)
        callers = [gevent.spawn(walk.call, number) for number in range(CALLERS)]
        for _ in range(KILLED):
            gevent.sleep(2 * PAUSE_SECONDS * chance.random() / KILLED * 2)
            number = chance.choice(sorted(walk.inside) or range(CALLERS))
            walk.inside.discard(number)
            callers[number].kill(block=False)
        gevent.sleep(PAUSE_SECONDS * chance.random())
        smarthost.close(soon(chance.choice((0.0, 0.2, 1.0))))
        gevent.joinall(callers, timeout=5.0)
        smarthost.wait_settled(5.0)
        figures = smarthost.figures()
        eventually(lambda: not any(each.is_established for each in server.open))

    print(Counter(outcome.state.value for outcome in walk.told.values()), figures)  # Shown when the walk fails.
    assert all(caller.dead for caller in callers)
    assert not any(caller.exception for caller in callers)
    # Who was not killed was told about every mail, in time.
    unknown = walk.begun - walk.told.keys()
    assert len(unknown) <= KILLED
    assert len(walk.begun) > CALLERS
    assert max(walk.overdue) < MARGIN
    # Once told "not yet" the end is told later, once; and never otherwise.
    not_yet = {path for path, outcome in walk.told.items() if outcome.detail == LocalFailure.NO_REPLY_YET.value}
    assert walk.settled.keys() - unknown == not_yet
    assert all(len(outcomes) == 1 for outcomes in walk.settled.values())

    accepted = Counter(mail.forward_paths[0] for mail in server.mails if mail.is_accepted)
    ends = {path: walk.last_of(path).state for path in walk.told}
    relayed = {path for path, state in ends.items() if state is State.RELAYED}
    in_doubt = {path for path, state in ends.items() if state is State.IN_DOUBT}
    assert max(accepted.values()) == 1
    assert relayed <= accepted.keys()
    # Each was told of its own acceptance.
    answers = {mail.forward_paths[0]: mail.answer.decode() for mail in server.mails}
    assert all(answers[path].endswith(f" {walk.last_of(path).remote_id}\r\n") for path in relayed)
    assert accepted.keys() - relayed <= in_doubt | unknown
    # Without an answer to its dot a mail is not sent again, whatever comes.
    unanswered = Counter(mail.forward_paths[0] for mail in server.mails if not mail.answer or mail.is_accepted)
    assert max(unanswered.values()) == 1
    assert relayed

    assert 1 < server.peak_connections <= POOL_SIZE
    names = ("idle", "busy", "dialling", "waiting", "awaiting_dot", "rate_waiting")
    assert {name: figures[name] for name in names} == dict.fromkeys(names, 0)
