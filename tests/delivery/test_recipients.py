"""Many recipients: who was accepted gets the content, and who was one too many gets it in another transaction."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from gevent import socket

from relay.delivery.channel import Channel
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import Outcome, SaidBy, State
from relay.delivery.reply import Extensions
from relay.delivery.session import MAX_GROUP_BYTES, Session
from relay.delivery.smarthost import MAX_ATTEMPTS, Smarthost
from relay.delivery.wire import rcpt_command
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
PATHS = tuple(f"user{number}@example.com" for number in range(100))
PIPELINING = pytest.mark.parametrize("extensions", [("PIPELINING",), ()], ids=["pipelined", "stepwise"])
TOO_MANY = "452 4.5.3 Too many recipients"
THROTTLED = "454 Throttling failure: Maximum sending rate exceeded"
QUOTA = "454 Throttling failure: Daily message quota exceeded"


class Limit:
    """The script of a server that takes ``most`` recipients in a transaction; for one connection at a time."""

    def __init__(self, most: int, reply: str = TOO_MANY, **others: Any) -> None:
        self.most = most
        self.reply = say(reply)
        self.count = 0
        self.script: dict[str, Any] = {"mail": self.begin, "rcpt": self.next, **others}

    def begin(self) -> None:
        self.count = 0

    def next(self) -> Action | None:
        self.count += 1
        return self.reply if self.count > self.most else None


class Book:
    """A ``commit`` that notes what it is asked; the answers are used up, then it says yes."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.asked: list[list[int]] = []

    def __call__(self, places: Sequence[int]) -> bool:
        self.asked.append(list(places))
        return self.answers.pop(0) if self.answers else True


@contextmanager
def smarthost_for(server: ScriptedSmtp, **config: Any) -> Iterator[Smarthost]:
    smarthost = Smarthost(config_for(server, **config), default_sender=SENDER)
    try:
        yield smarthost
    finally:
        smarthost.close(soon(1.0))


def relay(smarthost: Smarthost, count: int = 5, seconds: float = 5.0, **options: Any) -> list[Outcome]:
    return smarthost.relay(SENDER, PATHS[:count], CONTENT, soon(seconds), **options)


def states(outcomes: list[Outcome]) -> list[State]:
    return [outcome.state for outcome in outcomes]


@PIPELINING
@pytest.mark.parametrize(
    "reply",
    [
        TOO_MANY,
        "452 Too many recipients",
        # What RFC 821 called it, and a server that mixes up the classes.
        "552 Too many recipients",
        "552 5.5.3 Too many",
        "452 5.5.3 Too many",
        "550 5.5.3 Too many",
        "452",
    ],
)
def test_the_rest_goes_into_other_transactions_on_the_same_connection(reply: str, extensions: tuple[str, ...]) -> None:
    book = Book()
    with ScriptedSmtp(Limit(2, reply).script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, commit=book)
        figures = smarthost.figures()
    assert [(outcome.state, outcome.remote_id, outcome.attempt) for outcome in outcomes] == [
        (State.RELAYED, remote_id, 1) for remote_id in ("Q1", "Q1", "Q2", "Q2", "Q3")
    ]
    assert [mail.forward_paths for mail in server.mails] == [PATHS[0:2], PATHS[2:4], PATHS[4:5]]
    assert {mail.content for mail in server.mails} == {CONTENT}
    assert book.asked == [[0, 1], [2, 3], [4]]
    assert (len(server.connections), figures["retried"], figures["idle"], figures["busy"]) == (1, 0, 1, 0)


@PIPELINING
@pytest.mark.parametrize(
    ("reply", "state"),
    [
        ("452 4.2.2 mailbox full", State.DEFERRED),
        ("452 4.3.1 no room", State.DEFERRED),
        ("450 4.2.1 busy", State.DEFERRED),
        ("552 5.2.2 mailbox full", State.FAILED),
        ("552 mailbox full", State.FAILED),
        ("550 too many recipients", State.FAILED),
    ],
)
def test_what_concerns_one_recipient_is_its_outcome(reply: str, state: State, extensions: tuple[str, ...]) -> None:
    with ScriptedSmtp(Limit(2, reply).script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3)
    assert states(outcomes) == [State.RELAYED, State.RELAYED, state]
    assert outcomes[2].reply_code == int(reply[:3])
    assert len(server.mails) == 1


@PIPELINING
def test_a_server_that_accepts_nobody_is_not_asked_again(extensions: tuple[str, ...]) -> None:
    with ScriptedSmtp(Limit(0).script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3)
    assert [(outcome.state, outcome.reply_code) for outcome in outcomes] == [(State.DEFERRED, 452)] * 3
    assert sum(command.startswith("MAIL") for command in server.commands) == 1


@PIPELINING
def test_one_too_many_before_anybody_was_accepted_is_refused(extensions: tuple[str, ...]) -> None:
    with ScriptedSmtp({"rcpt": [say(TOO_MANY)]}, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3)
    assert states(outcomes) == [State.DEFERRED, State.RELAYED, State.RELAYED]
    assert len(server.mails) == 1


@PIPELINING
def test_one_recipient_a_transaction(extensions: tuple[str, ...]) -> None:
    with ScriptedSmtp(Limit(1).script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 20)
    assert states(outcomes) == [State.RELAYED] * 20
    assert [mail.forward_paths for mail in server.mails] == [(path,) for path in PATHS[:20]]
    assert len(server.connections) == 1


def test_a_server_that_closes_after_each_mail_is_asked_as_often_as_it_takes() -> None:
    limit = Limit(1)
    seen: set[int] = set()

    def begin() -> Action | None:
        """Refuse the second MAIL of each connection."""
        limit.begin()
        number = len(server.connections)
        if number in seen:
            return say_and_drop("421 4.7.0 one message a connection")
        seen.add(number)
        return None

    with ScriptedSmtp(limit.script | {"mail": begin}) as server, smarthost_for(server, pool_size=2) as smarthost:
        outcomes = relay(smarthost, 10)
        assert smarthost.figures()["retried"] == 0
    assert states(outcomes) == [State.RELAYED] * 10
    assert len(server.mails) == len(server.connections) == 10


def test_the_rest_goes_before_others_who_wait_for_the_connection() -> None:
    with ScriptedSmtp(Limit(1, dot=wait(0.02)).script) as server, smarthost_for(server, pool_size=1) as smarthost:
        first = gevent.spawn(relay, smarthost, 4)
        eventually(lambda: smarthost.figures()["busy"] == 1)
        others = [gevent.spawn(smarthost.relay, SENDER, ("other@example.com",), CONTENT, soon()) for _ in range(3)]
        gevent.joinall([first, *others], timeout=5.0)
        assert states(first.value) == [State.RELAYED] * 4
    assert [mail.forward_paths for mail in server.mails] == [
        *((path,) for path in PATHS[:4]),
        *[("other@example.com",)] * 3,
    ]


@PIPELINING
@pytest.mark.parametrize(
    ("phase", "action", "state"),
    [
        ("dot", say("554 5.7.1 no"), State.FAILED),
        ("dot", say("451 4.3.0 later"), State.DEFERRED),
        ("data", say("554 5.7.1 no"), State.FAILED),
        ("dot", drop(), State.IN_DOUBT),
        ("dot", say("250 2.0.0 Ok\n250 2.0.0 surprise"), State.RELAYED),
        ("dot", say_and_drop("421 4.3.2 closing"), State.DEFERRED),
    ],
)
def test_the_rest_is_served_whatever_becomes_of_the_first(
    phase: str, action: Action, state: State, extensions: tuple[str, ...]
) -> None:
    others: dict[str, Any] = {phase: [action]}
    script = Limit(2, **others).script
    with ScriptedSmtp(script, extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost)
    assert states(outcomes) == [state, state, State.RELAYED, State.RELAYED, State.RELAYED]
    assert {outcome.attempt for outcome in outcomes} == {1}
    assert [mail.forward_paths for mail in server.mails][-2:] == [PATHS[2:4], PATHS[4:5]]


@PIPELINING
def test_a_connection_lost_before_the_content_takes_everyone_to_another(extensions: tuple[str, ...]) -> None:
    with (
        ScriptedSmtp(Limit(2, data=[drop()]).script, extensions=extensions) as server,
        smarthost_for(server) as smarthost,
    ):
        outcomes = relay(smarthost)
    assert states(outcomes) == [State.RELAYED] * 5
    assert {outcome.attempt for outcome in outcomes} == {2}
    assert [mail.forward_paths for mail in server.mails] == [PATHS[0:2], PATHS[2:4], PATHS[4:5]]
    assert len(server.connections) == 2


def test_connections_that_are_always_lost_are_not_tried_for_ever() -> None:
    with ScriptedSmtp(Limit(2, data=drop()).script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost)
    assert states(outcomes) == [State.DEFERRED] * 5
    # After the attempts for the first two there is one for each of the others.
    assert len(server.connections) == MAX_ATTEMPTS + 2


@PIPELINING
@pytest.mark.parametrize("phase", ["data", "dot"])
def test_a_slow_server_is_not_asked_for_the_rest(phase: str, extensions: tuple[str, ...]) -> None:
    limit: dict[str, Any] = {f"{phase}_seconds": 0.1}
    stalled: dict[str, Any] = {phase: stall()}
    script = Limit(2, **stalled).script
    with ScriptedSmtp(script, extensions=extensions) as server, smarthost_for(server, **limit) as smarthost:
        outcomes = relay(smarthost, 3)
    first = State.DEFERRED if phase == "data" else State.IN_DOUBT
    assert states(outcomes) == [first, first, State.DEFERRED]
    assert not any(outcome.is_late for outcome in outcomes)
    assert sum(command.startswith("MAIL") for command in server.commands) == 1


def test_a_no_of_the_caller_holds_for_the_rest_too() -> None:
    book = Book(True, False)
    with ScriptedSmtp(Limit(2).script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, commit=book)
        assert smarthost.figures()["busy"] == 0
    assert states(outcomes) == [State.RELAYED] * 2 + [State.DEFERRED] * 3
    assert [(outcome.said_by, outcome.reply_code) for outcome in outcomes[2:]] == [
        (SaidBy.LOCAL, None),
        (SaidBy.LOCAL, None),
        (SaidBy.PEER, 452),
    ]
    assert book.asked == [[0, 1], [2, 3]]
    assert len(server.mails) == 1


def test_the_rest_is_late_when_the_first_waits_for_its_reply_until_the_deadline() -> None:
    settled: list[list[Outcome]] = []
    with ScriptedSmtp(Limit(2, dot=wait(0.4)).script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3, 0.2, on_settled=settled.append)
        eventually(lambda: bool(settled))
        assert smarthost.figures()["busy"] == 0
    assert states(outcomes) == [State.IN_DOUBT, State.IN_DOUBT, State.DEFERRED]
    assert [outcome.is_late for outcome in outcomes] == [False, False, True]
    assert outcomes[2].reply_code == 452
    assert states(settled[0]) == [State.RELAYED, State.RELAYED, State.DEFERRED]
    assert len(server.mails) == 1


def test_no_transaction_is_begun_for_the_rest_that_would_end_in_doubt() -> None:
    limit = Limit(1, dot=wait(0.1))
    with ScriptedSmtp({"dot": wait(0.1)}) as server, smarthost_for(server, pool_size=10) as smarthost:
        gevent.joinall([gevent.spawn(relay, smarthost, 1) for _ in range(40)], timeout=5.0)
        server.change(limit.script)
        outcomes = relay(smarthost, 20, 0.65)
        assert smarthost.figures()["busy"] == 0
    count = Counter(outcome.state for outcome in outcomes)
    assert 1 <= count[State.RELAYED] <= 6
    assert count[State.RELAYED] + count[State.DEFERRED] == 20
    assert {(outcome.reply_code, outcome.is_late) for outcome in outcomes if outcome.retryable} == {(452, True)}


def test_the_rest_waits_for_no_second_turn_at_the_sending_rate() -> None:
    script = Limit(20).script
    with ScriptedSmtp(script) as server, smarthost_for(server, max_recipients_per_second=40.0) as smarthost:
        started_at = time.monotonic()
        assert states(relay(smarthost, 40)) == [State.RELAYED] * 40
        assert time.monotonic() - started_at < 0.8
        # But all of them count: the next mail waits until so many may have been sent.
        assert states(relay(smarthost, 1)) == [State.RELAYED]
        assert 0.8 < time.monotonic() - started_at < 2.0
    assert len(server.mails) == 3


def test_who_was_throttled_and_who_was_one_too_many_go_together() -> None:
    script = {"rcpt": [Action(), say(THROTTLED), say(TOO_MANY)]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3)
    assert [(outcome.state, outcome.attempt) for outcome in outcomes] == [
        (State.RELAYED, 1),
        (State.RELAYED, 2),
        (State.RELAYED, 2),
    ]
    assert [mail.forward_paths for mail in server.mails] == [PATHS[:1], PATHS[1:3]]


def test_who_was_throttled_too_late_does_not_keep_the_rest() -> None:
    script = {"rcpt": [Action(), say(THROTTLED), say(TOO_MANY)]}
    with ScriptedSmtp(script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3, 0.6)
    assert states(outcomes) == [State.RELAYED, State.DEFERRED, State.RELAYED]
    assert (outcomes[1].reply_code, outcomes[1].is_late, outcomes[2].is_late) == (454, True, False)
    assert [mail.forward_paths for mail in server.mails] == [PATHS[:1], PATHS[2:3]]


def test_the_rest_is_deferred_when_the_circuit_opens() -> None:
    with ScriptedSmtp(Limit(2, dot=[say(QUOTA)]).script) as server, smarthost_for(server) as smarthost:
        outcomes = relay(smarthost, 3)
        figures = smarthost.figures()
    assert [(outcome.state, outcome.reply_code) for outcome in outcomes] == [
        (State.DEFERRED, 454),
        (State.DEFERRED, 454),
        (State.DEFERRED, 452),
    ]
    assert (figures["circuit"], figures["busy"]) == ("open", 0)
    assert len(server.mails) == 1


def test_a_caller_that_is_killed_while_it_logs_keeps_no_connection() -> None:
    class Killing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gevent.getcurrent().kill(block=False)
            gevent.sleep(0)

    handler = Killing()
    with ScriptedSmtp(Limit(2, dot=[say(QUOTA)]).script) as server, smarthost_for(server) as smarthost:
        logging.getLogger("relay.delivery").addHandler(handler)
        try:
            caller = gevent.spawn(relay, smarthost, 3)
            caller.join(5.0)
        finally:
            logging.getLogger("relay.delivery").removeHandler(handler)
        assert isinstance(caller.value, gevent.GreenletExit)
        assert (smarthost.figures()["circuit"], smarthost.figures()["busy"]) == ("open", 0)


@PIPELINING
def test_who_needs_smtputf8_alone_does_not_spoil_it_for_others(extensions: tuple[str, ...]) -> None:
    book = Book()
    paths = (PATHS[0], "jürgen@example.com", PATHS[1])
    with ScriptedSmtp(extensions=extensions) as server, smarthost_for(server) as smarthost:
        outcomes = smarthost.relay(SENDER, paths, CONTENT, soon(), commit=book)
        [alone] = smarthost.relay(SENDER, paths[1:2], CONTENT, soon())
    assert states(outcomes) == [State.RELAYED, State.FAILED, State.RELAYED]
    assert "5.6.7" in outcomes[1].detail
    assert alone == outcomes[1]
    assert book.asked == [[0, 2]]
    assert [mail.forward_paths for mail in server.mails] == [PATHS[:2]]
    assert server.commands[1] == f"MAIL FROM:<{SENDER}>"


@pytest.mark.parametrize("length", [20, 254])
def test_a_hundred_are_pipelined_when_the_group_is_small_enough(length: int) -> None:
    ours, theirs = socket.socketpair()
    config = SmarthostConfig(hosts=(Host("127.0.0.1", 25),))
    session = Session(Channel(ours, "127.0.0.1"), Extensions(pipelining=True), config, SENDER)
    paths = tuple(f"{number:0{length - 12}}@example.com" for number in range(100))
    transacting = gevent.spawn(session.transact, SENDER, paths, CONTENT, soon())
    lines = theirs.makefile("rb")
    is_pipelined = sum(len(rcpt_command(path)) for path in paths) < MAX_GROUP_BYTES - 100
    commands = []
    # Nothing is said before all of them have come, or after each.
    for _ in range(102):
        commands.append(lines.readline())
        if not is_pipelined:
            theirs.sendall(b"354 go on\r\n" if commands[-1] == b"DATA\r\n" else b"250 Ok\r\n")
    if is_pipelined:
        theirs.sendall(b"250 Ok\r\n" * 101 + b"354 go on\r\n")
    assert commands == [f"MAIL FROM:<{SENDER}>\r\n".encode(), *map(rcpt_command, paths), b"DATA\r\n"]
    assert is_pipelined == (length == 20)
    while lines.readline() != b".\r\n":
        pass
    theirs.sendall(b"250 Ok\r\n")
    assert states(transacting.get(timeout=5.0)) == [State.RELAYED] * 100
    assert session.is_reusable
    session.close()
    theirs.close()


TROUBLES = [
    (3, say("550 5.1.1 unknown")),
    (3, say("450 4.2.1 busy")),
    (1, drop()),
    (1, half()),
    (1, garbage()),
    (1, say_and_drop("421 4.3.2 closing")),
    (1, stall()),
]
CONTENT_TROUBLES = [(2, say("451 4.3.0 later")), (2, say("554 5.7.1 no")), (2, drop()), (1, half()), (1, wait(0.3))]


@pytest.mark.parametrize("seed", range(4))
@PIPELINING
def test_nobody_gets_it_twice_or_without_a_yes(seed: int, extensions: tuple[str, ...]) -> None:
    """Mails to many through a bad server, with a caller that does not always say yes."""
    chance = random.Random(seed)
    limit = Limit(3)

    def troubled(troubles: list[tuple[int, Action]], share: float) -> Action | None:
        weights, actions = zip(*troubles, strict=True)
        return chance.choices(actions, weights)[0] if chance.random() < share else None

    def begin() -> Action | None:
        limit.begin()
        return troubled(TROUBLES, 0.03)

    script: dict[str, Any] = {
        "mail": begin,
        "rcpt": lambda: troubled(TROUBLES, 0.04) or limit.next(),
        "data": lambda: troubled(TROUBLES, 0.05),
        "dot": lambda: troubled(CONTENT_TROUBLES, 0.2),
    }
    limits = dict.fromkeys(("mail_seconds", "rcpt_seconds", "data_seconds", "rset_seconds", "dot_seconds"), 0.1)
    told: dict[str, Outcome] = {}
    yes: Counter[str] = Counter()
    begun: Counter[tuple[str, ...]] = Counter()
    with (
        ScriptedSmtp(script, extensions=extensions) as server,
        smarthost_for(server, pool_size=1, **limits) as smarthost,
    ):
        for turn in range(40):
            paths = tuple(f"user{turn}.{number}@example.com" for number in range(chance.randint(1, 12)))

            def commit(places: Sequence[int], paths: tuple[str, ...] = paths) -> bool:
                is_yes = chance.random() < 0.9
                begun[tuple(paths[place] for place in places)] += is_yes
                yes.update({paths[place]: is_yes for place in places})
                return is_yes

            outcomes = smarthost.relay(SENDER, paths, CONTENT, soon(chance.choice((0.05, 1.0, 5.0))), commit=commit)
            assert len(outcomes) == len(paths)
            told |= dict(zip(paths, outcomes, strict=True))
            assert smarthost.figures()["waiting"] == 0
        smarthost.close(soon(1.0))
        smarthost.wait_settled(2.0)
        assert smarthost.figures()["busy"] == 0

    dots = Counter(mail.forward_paths for mail in server.mails)
    # A dot only where the caller had said yes, and to those whom it had been asked about.
    assert all(begun[paths] >= count for paths, count in dots.items())
    accepted = Counter(path for mail in server.mails if mail.is_accepted for path in mail.forward_paths)
    unanswered = Counter(
        path for mail in server.mails if mail.is_accepted or not mail.answer for path in mail.forward_paths
    )
    assert set(unanswered.values()) == {1}
    for path, outcome in told.items():
        if outcome.state is State.RELAYED:
            assert accepted[path] == 1
        elif outcome.state is not State.IN_DOUBT:
            assert accepted[path] == 0
        assert yes[path] or outcome.state in (State.DEFERRED, State.FAILED)
    assert {State.RELAYED, State.DEFERRED} <= {outcome.state for outcome in told.values()}
