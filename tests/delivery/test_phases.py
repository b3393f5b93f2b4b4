"""A stall, a drop and what else can go wrong, in every phase of a session: what the caller gets, what the server saw.

Every case runs with PIPELINING and without, in clear, with STARTTLS and with TLS from the start. All time limits are
long but the one of the phase that is looked at, so that a mail which ends in time shows that this one was kept. The
cases of one test run at the same time, each with a server and a smarthost of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.lock
import gevent.pool
import pytest
from gevent import socket

from relay.delivery.config import Host, Timeouts
from relay.delivery.dialling import Dialler
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.smarthost import MAX_ATTEMPTS, Smarthost
from tests.delivery.conftest import config_for, soon
from tests.support.scripted_smtp import (
    Action,
    ScriptedSmtp,
    bytewise,
    drop,
    eventually,
    first_line,
    garbage,
    half,
    say,
    say_and_drop,
    silence,
    stall,
    wait,
)

Certificate = tuple[Path, Path]
SENDER = "sender@example.org"
PATHS = ("alice@example.com", "bob@example.com")
CONTENT = b"Subject: hello\r\n\r\nHello.\r\n"
BIG = (b"x" * 998 + b"\r\n") * 8_000
"""More than the buffers of both ends hold."""

LIMIT = 0.2
"""Of the phase that is looked at."""
LONG = 15.0
"""Of all the others."""
MARGIN = 2.0
"""For a machine that is busy with other things."""
AT_ONCE = 48


class Mode(NamedTuple):
    pipelining: bool
    tls: Any

    def __str__(self) -> str:
        return f"{'pipelined' if self.pipelining else 'stepwise'} {self.tls or 'clear'}"


MODES = [Mode(pipelining, tls) for pipelining in (True, False) for tls in ("", "starttls", "implicit")]

FAULTS = {
    "stall": stall(),
    "drop": drop(),
    "garbage": garbage(),
    "421": say_and_drop("421 4.3.2 closing"),
    "byte by byte": bytewise(),
    "half a reply": half(),
    "first line": first_line(),
    "trickle": bytewise(byte_seconds=0.05),
}
TOO_SLOW = {"stall", "half a reply", "first line", "trickle"}
"""The faults that only a time limit ends."""


class Ending(NamedTuple):
    """What a mail comes to."""

    state: State
    said_by: SaidBy
    reply_code: int | None
    attempts: int = 1


RELAYED = Ending(State.RELAYED, SaidBy.PEER, 250)
NOT_NOW = Ending(State.DEFERRED, SaidBy.LOCAL, None)
IN_DOUBT = Ending(State.IN_DOUBT, SaidBy.LOCAL, None)
GOODBYE = Ending(State.DEFERRED, SaidBy.PEER, 421)

OPENING = dict.fromkeys(FAULTS, NOT_NOW) | {"421": GOODBYE, "byte by byte": RELAYED}
TRANSACTION = OPENING | {
    "drop": NOT_NOW._replace(attempts=MAX_ATTEMPTS),
    "garbage": NOT_NOW._replace(attempts=MAX_ATTEMPTS),
    "421": GOODBYE._replace(attempts=MAX_ATTEMPTS),
}
DOT = dict.fromkeys(FAULTS, IN_DOUBT) | {
    # Never tried again here: the content has been there.
    "421": GOODBYE,
    "byte by byte": RELAYED,
}
RSET = dict.fromkeys(FAULTS, NOT_NOW) | {
    # The connection is replaced: one that had hung up was no attempt.
    "drop": RELAYED,
    "421": RELAYED,
    "garbage": RELAYED._replace(attempts=2),
    "byte by byte": RELAYED,
}


class Where(NamedTuple):
    """One phase."""

    phase: Phase
    endings: Mapping[str, Ending]
    script_phase: str
    place: int = 1
    """1: the first command of this kind is answered so, 2: the second."""
    tls: tuple[str, ...] = ("", "starttls", "implicit")
    mechanism: str = ""

    def script(self, action: Action) -> dict[str, Any]:
        if self.place == 1:
            return {self.script_phase: action}
        turns = itertools.cycle((Action(), action))
        return {self.script_phase: lambda: next(turns)}


WHERE = {
    "banner": Where(Phase.BANNER, OPENING, "banner"),
    "ehlo": Where(Phase.EHLO, OPENING, "ehlo"),
    "ehlo after starttls": Where(Phase.EHLO, OPENING, "ehlo", 2, ("starttls",)),
    "starttls": Where(Phase.STARTTLS, OPENING, "starttls", tls=("starttls",)),
    "auth plain": Where(Phase.AUTH, OPENING, "auth", mechanism="PLAIN"),
    "auth login": Where(Phase.AUTH, OPENING, "auth_begin", mechanism="LOGIN"),
    "auth login, user name": Where(Phase.AUTH, OPENING, "auth_username", mechanism="LOGIN"),
    "auth login, password": Where(Phase.AUTH, OPENING, "auth", mechanism="LOGIN"),
    "mail": Where(Phase.MAIL, TRANSACTION, "mail"),
    "rcpt": Where(Phase.RCPT, TRANSACTION, "rcpt"),
    "second rcpt": Where(Phase.RCPT, TRANSACTION, "rcpt", 2),
    "data": Where(Phase.DATA, TRANSACTION, "data"),
    "dot": Where(Phase.DOT, DOT, "dot"),
}


def limit_of(phase: Phase, seconds: float = LIMIT) -> dict[str, Any]:
    """The setting that gives a phase this time limit."""
    return {f"{phase.value}_seconds": seconds}


@contextmanager
def served(
    mode: Mode, certificate: Certificate | None, script: Mapping[str, Any], *, mechanism: str = "", **config: Any
) -> Iterator[tuple[ScriptedSmtp, Smarthost]]:
    """A server and a smarthost that uses it; ``config`` as for ``config_for``, but with long limits."""
    extensions = ("ENHANCEDSTATUSCODES", *(["PIPELINING"] if mode.pipelining else []))
    credentials = ("user", "pass") if mechanism else None
    if mechanism:
        extensions += (f"AUTH {mechanism}",)
        config |= {"username": "user", "password": "pass"}
    if mode.tls and certificate:
        config |= {"tls": mode.tls, "ca_file": str(certificate[0])}
    limits = {field.name: LONG for field in dataclasses.fields(Timeouts)}
    with ScriptedSmtp(
        script, extensions=extensions, tls=mode.tls, certificate=certificate, credentials=credentials
    ) as server:
        smarthost = Smarthost(config_for(server, **(limits | config)))
        try:
            yield server, smarthost
        finally:
            smarthost.close(soon(0.0))


def at_once(cases: Mapping[str, Callable[[], None]], most: int = AT_ONCE) -> None:
    """Run the cases at the same time, ``most`` of them; fail with the names of those that failed."""
    pool = gevent.pool.Pool(most)
    running: dict[str, Any] = {}
    try:
        for name, case in cases.items():
            running[name] = pool.spawn(case)
        pool.join()
    finally:
        pool.kill()
    failed = {name: case.exception for name, case in running.items() if case.exception is not None}
    assert not failed, "\n".join(f"{name}: {error!r}" for name, error in failed.items())


def relay(smarthost: Smarthost, content: bytes = CONTENT, seconds: float = LONG) -> tuple[list[Outcome], float]:
    """Hand a mail over; return also how long it took."""
    started_at = time.monotonic()
    outcomes = smarthost.relay(SENDER, PATHS, content, soon(seconds))
    return outcomes, time.monotonic() - started_at


def see(outcomes: list[Outcome], ending: Ending, phase: Phase) -> None:
    """All recipients came to the same end."""
    found = [(each.state, each.said_by, each.reply_code, each.attempt, each.phase) for each in outcomes]
    assert found == [(*ending, phase)] * len(PATHS)
    assert all(outcome.detail for outcome in outcomes)


def took(seconds: float, limit_seconds: float) -> bool:
    return limit_seconds - 0.01 <= seconds < limit_seconds + MARGIN


def dialogue(mode: Mode, mechanism: str) -> list[str]:
    """All that a client says until the content, RFC 5321 and RFC 3207."""
    tls = ["STARTTLS", "EHLO"] if mode.tls == "starttls" else []
    return ["EHLO", *tls, *(["AUTH"] if mechanism else []), "MAIL", "RCPT", "RCPT", "DATA"]


def heard_until(where: Where, mode: Mode) -> list[str]:
    """What the server has heard when it comes to the phase."""
    verbs = dialogue(mode, where.mechanism)
    match where.phase:
        case Phase.BANNER:
            return []
        case Phase.DOT:
            return verbs
    places = [index for index, verb in enumerate(verbs) if verb == where.phase.value.upper()]
    return verbs[: places[where.place - 1] + 1]


def goes_on(server: ScriptedSmtp, smarthost: Smarthost) -> None:
    """The server is well again, and so is the next mail; a circuit needs a moment."""
    server.change({})
    eventually(lambda: relay(smarthost)[0][0].state is State.RELAYED)
    # Answers that went to the wrong mail would show here.
    assert relay(smarthost)[0][0].remote_id == f"Q{len(server.mails)}"


@pytest.mark.parametrize("phase", dict.fromkeys(where.phase for where in WHERE.values()))
def test_every_fault_in_every_phase(phase: Phase, certificate: Certificate) -> None:
    def case(where: Where, fault: str, mode: Mode) -> None:
        ending = where.endings[fault]
        limit = limit_of(where.phase) if fault in TOO_SLOW else {}
        script = where.script(FAULTS[fault])
        with served(mode, certificate, script, mechanism=where.mechanism, **limit) as (server, smarthost):
            outcomes, seconds = relay(smarthost)
            see(outcomes, ending, Phase.DOT if ending == RELAYED else where.phase)
            assert took(seconds, LIMIT if fault in TOO_SLOW else 0.0)
            assert len(server.connections) == ending.attempts
            assert len(server.mails) == (ending.attempts if where.phase is Phase.DOT or ending == RELAYED else 0)
            goes_on(server, smarthost)
            if ending == RELAYED:
                assert len(server.connections) == 1
                return
            for number in range(ending.attempts):
                # Garbage does not keep the server from reading the rest of a pipelined group.
                heard, least = server.verbs(number), heard_until(where, mode)
                assert heard[: len(least)] == least
                assert heard in (least, dialogue(mode, where.mechanism)[: len(heard)])
                assert mode.pipelining or heard == least
            assert server.mails[-1].connection >= ending.attempts

    at_once(
        {
            f"{name}, {fault}, {mode}": partial(case, where, fault, mode)
            for name, where in WHERE.items()
            for fault in FAULTS
            for mode in MODES
            if where.phase is phase and mode.tls in where.tls
        }
    )


def test_the_callers_deadline_in_every_phase(certificate: Certificate) -> None:
    # Few are in the short time that counts at once, and none of the others begins meanwhile.
    turns = gevent.lock.BoundedSemaphore(10)

    def case(where: Where, fault: str, mode: Mode) -> None:
        # Who waits for a connection is told so, and not what keeps the dial, which goes on.
        phase = Phase.POOL if where.endings is OPENING else where.phase
        is_dot = where.endings is DOT
        script, limit = where.script(FAULTS[fault]), limit_of(where.phase, 2 * LIMIT)
        with served(mode, certificate, script, mechanism=where.mechanism, **limit) as (server, smarthost):
            gevent.sleep(0)
            with turns:
                outcomes, seconds = relay(smarthost, seconds=LIMIT)
            see(outcomes, IN_DOUBT if is_dot else NOT_NOW, phase)
            assert took(seconds, LIMIT)
            assert (len(server.connections), len(server.mails)) == (1, is_dot)
            goes_on(server, smarthost)
            heard = heard_until(where, mode)
            assert server.verbs(0)[: len(heard)] == heard
            assert "QUIT" not in server.verbs(0)

    cases = {
        f"{name}, {fault}, {mode}": partial(case, where, fault, mode)
        for name, where in WHERE.items()
        for fault in ("stall", "trickle")
        for mode in MODES
        if mode.tls in where.tls and (fault == "stall" or not mode.tls)
    }
    at_once(cases, len(cases))


HANDSHAKES = {
    "stall": stall(),
    "drop": drop(),
    "garbage": garbage(),
    "a reply in clear": say_and_drop("421 4.3.2 closing"),
    # A record of 16 KB that never ends.
    "half a record": Action(b"\x16\x03\x03\x40\x00\x02", "stall"),
    "trickle": Action(b"\x16\x03\x03\x40\x00" + b"\x02" * 200, is_bytewise=True, byte_seconds=0.05),
}


def test_every_fault_in_the_handshake(certificate: Certificate) -> None:
    def case(fault: str, mode: Mode) -> None:
        is_slow = fault in ("stall", "half a record", "trickle")
        limit = limit_of(Phase.STARTTLS) if is_slow else {}
        with served(mode, certificate, {"handshake": HANDSHAKES[fault]}, mechanism="PLAIN", **limit) as (
            server,
            smarthost,
        ):
            outcomes, seconds = relay(smarthost)
            see(outcomes, NOT_NOW, Phase.STARTTLS)
            assert took(seconds, LIMIT if is_slow else 0.0)
            assert (len(server.connections), server.mails) == (1, [])
            assert server.verbs(0) == (["EHLO", "STARTTLS"] if mode.tls == "starttls" else [])
            goes_on(server, smarthost)
            assert server.verbs(0) == (["EHLO", "STARTTLS"] if mode.tls == "starttls" else [])

    at_once({f"{fault}, {mode}": partial(case, fault, mode) for fault in HANDSHAKES for mode in MODES if mode.tls})


@contextmanager
def listening(backlog: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        yield listener


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port whose system answers no more SYN, since nobody accepts what is there already."""
    with listening(0) as listener:
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
                fillers.append(filler)
            yield int(listener.getsockname()[1])
        finally:
            for filler in fillers:
                filler.close()


def relay_to(port: int, **config: Any) -> tuple[list[Outcome], float]:
    with ScriptedSmtp() as server:
        limits = {field.name: LONG for field in dataclasses.fields(Timeouts)}
        changes = limits | {"hosts": (Host("127.0.0.1", port),)} | config
        smarthost = Smarthost(config_for(server, **changes))
    try:
        return relay(smarthost)
    finally:
        smarthost.close(soon(0.0))


def test_a_connection_that_is_refused() -> None:
    with listening(1) as listener:
        port = listener.getsockname()[1]
    outcomes, seconds = relay_to(port)
    see(outcomes, NOT_NOW, Phase.CONNECT)
    assert took(seconds, 0.0)


def test_a_connection_that_is_never_made() -> None:
    with full_backlog() as port:
        outcomes, seconds = relay_to(port, connect_seconds=LIMIT)
    see(outcomes, NOT_NOW, Phase.CONNECT)
    assert took(seconds, LIMIT)


@pytest.mark.parametrize(
    ("tls", "phase", "limit"),
    [("off", Phase.BANNER, "banner_seconds"), ("implicit", Phase.STARTTLS, "starttls_seconds")],
)
def test_a_connection_that_nobody_accepts(tls: str, phase: Phase, limit: str) -> None:
    with listening(5) as listener:
        outcomes, seconds = relay_to(listener.getsockname()[1], tls=tls, **{limit: LIMIT})
    see(outcomes, NOT_NOW, phase)
    assert took(seconds, LIMIT)


CONTENT_FAULTS: dict[str, tuple[dict[str, Action], Ending]] = {
    "stall": ({"content": stall()}, NOT_NOW),
    "half a reply": ({"content": Action(b"552 5.3", "stall")}, NOT_NOW),
    "first line": ({"content": Action(b"552-5.3.4 too long\r\n55", "stall")}, NOT_NOW),
    "slow reader": ({"reading": wait(0.1)}, NOT_NOW),
    "drop": ({"content": drop()}, NOT_NOW._replace(attempts=MAX_ATTEMPTS)),
    "garbage": ({"content": Action(garbage().data, "drop")}, NOT_NOW._replace(attempts=MAX_ATTEMPTS)),
    "421": ({"content": say_and_drop("421 4.3.2 closing")}, GOODBYE._replace(attempts=MAX_ATTEMPTS)),
    "552": ({"content": say_and_drop("552 5.3.4 too long")}, Ending(State.FAILED, SaidBy.PEER, 552)),
}
"""What happens when the server has read a first part, and what the mail comes to."""


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_every_fault_in_the_content(fault: str, certificate: Certificate) -> None:
    script, ending = CONTENT_FAULTS[fault]
    is_slow = fault in ("stall", "half a reply", "first line", "slow reader")

    def case(mode: Mode) -> None:
        with served(mode, certificate, script, **(limit_of(Phase.CONTENT) if is_slow else {})) as (
            server,
            smarthost,
        ):
            outcomes, seconds = relay(smarthost, BIG)
            see(outcomes, ending, Phase.CONTENT)
            assert took(seconds, LIMIT if is_slow else 0.0)
            assert len(server.connections) == ending.attempts
            goes_on(server, smarthost)
            assert [server.verbs(number) for number in range(ending.attempts)] == [dialogue(mode, "")] * ending.attempts
            assert all(mail.content == CONTENT for mail in server.mails)

    at_once({str(mode): partial(case, mode) for mode in MODES})


def test_the_callers_deadline_amid_the_content(certificate: Certificate) -> None:
    def case(script: dict[str, Action], mode: Mode) -> None:
        with served(mode, certificate, {}) as (server, smarthost):
            assert relay(smarthost)[0][0].state is State.RELAYED
            server.change(script)
            outcomes, seconds = relay(smarthost, BIG, seconds=2 * LIMIT)
            see(outcomes, NOT_NOW, Phase.CONTENT)
            assert took(seconds, 2 * LIMIT)
            goes_on(server, smarthost)
            assert all(mail.content == CONTENT for mail in server.mails)

    at_once(
        {
            f"{name}, {mode}": partial(case, script, mode)
            for name, script in {"stall": {"content": stall()}, "slow reader": {"reading": wait(0.1)}}.items()
            for mode in MODES
        }
    )


@pytest.mark.parametrize(
    "script",
    [
        {"content": say("552 5.3.4 too long"), "dot": silence()},
        {"content": say("552 5.3.4 too long"), "dot": Action(b"552 5.3.4 too long\r\n", wait_seconds=0.02)},
        {"content": Action(b"552-5.3.4 too\r\n552 5.3.4 long\r\n", is_bytewise=True), "dot": silence()},
    ],
    ids=["once", "and again at the dot", "byte by byte"],
)
def test_a_refusal_amid_the_content_of_a_server_that_reads_on(
    script: dict[str, Action], certificate: Certificate
) -> None:
    def case(content: bytes, mode: Mode) -> None:
        with served(mode, certificate, script) as (server, smarthost):
            outcomes, _ = relay(smarthost, content)
            see(outcomes, Ending(State.FAILED, SaidBy.PEER, 552), Phase.DOT)
            assert len(server.connections) == 1
            server.change({})
            # At once: what the server may still say must not be taken for the answer to this one.
            [outcome, _], _ = relay(smarthost)
            assert outcome.state is State.RELAYED
            assert outcome.remote_id == f"Q{len(server.mails)}"
            assert [len(mail.content) for mail in server.mails[1:]] == [len(CONTENT)]

    at_once(
        {
            f"{len(content)} bytes, {mode}": partial(case, content, mode)
            for content in (BIG, BIG[:200_000])
            for mode in MODES
        }
    )


def test_a_refusal_amid_the_content_of_a_server_that_reads_no_more(certificate: Certificate) -> None:
    def case(mode: Mode) -> None:
        script = {"content": Action(b"552 5.3.4 too long\r\n", "stall")}
        with served(mode, certificate, script, content_seconds=LIMIT) as (server, smarthost):
            outcomes, seconds = relay(smarthost, BIG)
            see(outcomes, Ending(State.FAILED, SaidBy.PEER, 552), Phase.CONTENT)
            assert seconds < LIMIT + MARGIN
            goes_on(server, smarthost)

    at_once({str(mode): partial(case, mode) for mode in MODES})


def test_content_larger_than_all_buffers_arrives_whole(certificate: Certificate) -> None:
    def case(mode: Mode) -> None:
        with served(mode, certificate, {}) as (server, smarthost):
            assert relay(smarthost, BIG)[0][0].state is State.RELAYED
            assert [mail.content == BIG for mail in server.mails] == [True]

    at_once({str(mode): partial(case, mode) for mode in MODES})


LATER: dict[str, tuple[Action, Ending]] = {
    "250": (wait(3 * LIMIT), RELAYED),
    "250 byte by byte": (bytewise(byte_seconds=LIMIT / 10), RELAYED),
    "550": (Action(b"550 5.7.1 no\r\n", wait_seconds=3 * LIMIT), Ending(State.FAILED, SaidBy.PEER, 550)),
    "451": (Action(b"451 4.3.0 later\r\n", wait_seconds=3 * LIMIT), Ending(State.DEFERRED, SaidBy.PEER, 451)),
    "421": (Action(b"421 4.3.2 closing\r\n", "drop", wait_seconds=3 * LIMIT), GOODBYE),
    "drop": (Action(then="drop", wait_seconds=3 * LIMIT), IN_DOUBT),
    "garbage": (Action(garbage().data, wait_seconds=3 * LIMIT), IN_DOUBT),
    "stall": (stall(), IN_DOUBT),
    "first line": (first_line(), IN_DOUBT),
}
"""What comes after the caller has gone, and what the mail comes to."""
HEALTHY = ("250", "250 byte by byte", "550", "451")


@pytest.mark.parametrize("pipelining", [True, False], ids=["pipelined", "stepwise"])
def test_what_comes_after_the_deadline_settles_the_mail_once(pipelining: bool, certificate: Certificate) -> None:
    def case(later: str, mode: Mode) -> None:
        action, ending = LATER[later]
        settled: list[list[Outcome]] = []
        with served(mode, certificate, {}, dot_seconds=4 * LIMIT, pool_size=1) as (server, smarthost):
            # A connection that is there: only the dot takes its time.
            assert relay(smarthost)[0][0].state is State.RELAYED
            server.change({"dot": [action]})
            started_at = time.monotonic()
            outcomes = smarthost.relay(SENDER, PATHS, CONTENT, soon(LIMIT), settled.append)
            assert took(time.monotonic() - started_at, LIMIT)
            see(outcomes, IN_DOUBT, Phase.DOT)
            assert settled == []
            assert (smarthost.figures()["awaiting_dot"], smarthost.figures()["busy"]) == (1, 1)
            eventually(lambda: settled != [])
            see(settled[0], ending, Phase.DOT)
            if later in ("stall", "first line"):
                assert took(time.monotonic() - started_at, 4 * LIMIT)
            assert len(server.mails) == 2
            goes_on(server, smarthost)
            assert len(server.connections) == (1 if later in HEALTHY else 2)
            smarthost.wait_settled(5.0)
            assert (len(settled), smarthost.figures()["awaiting_dot"]) == (1, 0)
        assert len(settled) == 1

    at_once(
        {
            f"{later}, {mode}": partial(case, later, mode)
            for later in LATER
            for mode in MODES
            if mode.pipelining is pipelining
        }
    )


def test_closing_settles_what_the_server_has_not_answered(certificate: Certificate) -> None:
    def case(answer: Action, seconds: float, ending: Ending, mode: Mode) -> None:
        settled: list[list[Outcome]] = []
        with served(mode, certificate, {}) as (server, smarthost):
            assert relay(smarthost)[0][0].state is State.RELAYED
            server.change({"dot": answer})
            see(smarthost.relay(SENDER, PATHS, CONTENT, soon(LIMIT), settled.append), IN_DOUBT, Phase.DOT)
            started_at = time.monotonic()
            smarthost.close(soon(seconds))
            assert time.monotonic() - started_at < seconds + MARGIN
            smarthost.wait_settled(5.0)
            assert len(settled) == 1
            see(settled[0], ending, Phase.DOT)
            assert (smarthost.figures()["busy"], smarthost.figures()["awaiting_dot"]) == (0, 0)
        assert len(server.mails) == 2

    at_once(
        {
            f"{name}, {mode}": partial(case, *given, mode)
            for name, given in {
                "cut": (stall(), 0.1, IN_DOUBT),
                "answered while closing": (wait(2 * LIMIT), LONG, RELAYED),
            }.items()
            for mode in MODES
        }
    )


def test_every_fault_in_rset(certificate: Certificate) -> None:
    def case(fault: str, mode: Mode) -> None:
        ending = RSET[fault]
        limit = limit_of(Phase.RSET) if fault in TOO_SLOW else {}
        with served(mode, certificate, {"rcpt": say("550 5.1.1 unknown")}, **limit) as (server, smarthost):
            # Leaves a transaction open, which RSET has to end.
            assert relay(smarthost)[0][0].reply_code == 550
            server.change({"rset": FAULTS[fault]})
            outcomes, seconds = relay(smarthost)
            see(outcomes, ending, Phase.RSET if ending == NOT_NOW else Phase.DOT)
            assert took(seconds, LIMIT if fault in TOO_SLOW else 0.0)
            is_kept = fault == "byte by byte"
            assert len(server.connections) == (2 if ending != NOT_NOW and not is_kept else 1)
            goes_on(server, smarthost)
            assert [mail.connection for mail in server.mails] == [0 if is_kept else 1] * len(server.mails)

    at_once({f"{fault}, {mode}": partial(case, fault, mode) for fault in FAULTS for mode in MODES})


def test_no_fault_in_quit_delays_or_harms_a_mail(certificate: Certificate) -> None:
    def case(fault: str, mode: Mode) -> None:
        with served(mode, certificate, {"quit": FAULTS[fault]}, max_messages=1) as (server, smarthost):
            for number in range(2):
                outcomes, seconds = relay(smarthost)
                see(outcomes, RELAYED, Phase.DOT)
                assert took(seconds, 0.0)
                eventually(partial(server.has_heard, "QUIT", number))
            assert (len(server.connections), len(server.mails)) == (2, 2)
            assert (smarthost.figures()["idle"], smarthost.figures()["busy"]) == (0, 0)

    at_once({f"{fault}, {mode}": partial(case, fault, mode) for fault in FAULTS for mode in MODES})


def test_the_answer_to_quit_is_waited_for_only_so_long() -> None:
    def case(fault: str) -> None:
        with ScriptedSmtp({"quit": FAULTS[fault]}) as server:
            session = Dialler(config_for(server)).dial()
            started_at = time.monotonic()
            session.quit(LIMIT)
            assert time.monotonic() - started_at < LIMIT + MARGIN
            eventually(lambda: server.verbs(0) == ["EHLO", "QUIT"])

    at_once({fault: partial(case, fault) for fault in FAULTS})


def test_every_fault_in_the_noop_of_a_probe(certificate: Certificate) -> None:
    def case(fault: str, mode: Mode) -> None:
        is_slow = fault in TOO_SLOW
        script = {"banner": [say_and_drop("554 5.3.2 not now")], "noop": [FAULTS[fault]]}
        with served(mode, certificate, script, rset_seconds=LIMIT if is_slow else LONG) as (server, smarthost):
            assert relay(smarthost)[0][0].reply_code == 554
            eventually(partial(server.has_heard, "NOOP", 1))
            started_at = time.monotonic()
            outcomes, seconds = relay(smarthost)
            if fault == "byte by byte":
                goes_on(server, smarthost)
                assert len(server.connections) == 2
                return
            # The one probe is under way, or has failed: all others are answered at once.
            see(outcomes, NOT_NOW, Phase.POOL)
            assert took(seconds, 0.0)
            eventually(lambda: smarthost.figures()["circuit"] == "open")
            assert time.monotonic() - started_at < (LIMIT if is_slow else 0.0) + MARGIN
            assert not is_slow or time.monotonic() - started_at > LIMIT / 2
            eventually(lambda: smarthost.figures()["circuit"] == "closed")
            goes_on(server, smarthost)
            assert server.verbs(1)[-1] == "NOOP"
            assert {mail.connection for mail in server.mails} == {2}

    at_once({f"{fault}, {mode}": partial(case, fault, mode) for fault in FAULTS for mode in MODES})


def test_a_limit_begins_once() -> None:
    """A reply that begins shortly before its time is over gets no more time for the rest of it."""

    def case(phase: Phase, mode: Mode) -> None:
        with served(mode, None, {}, **limit_of(phase, 0.6)) as (server, smarthost):
            if phase is Phase.RSET:
                server.change({"rcpt": say("550 5.1.1 unknown")})
                assert relay(smarthost)[0][0].reply_code == 550
            server.change({phase.value: Action(b"250 2.", "stall", wait_seconds=0.5)})
            outcomes, seconds = relay(smarthost)
            see(outcomes, NOT_NOW, phase)
            assert 0.6 <= seconds < 1.0

    at_once(
        {
            f"{phase.value}, {mode}": partial(case, phase, mode)
            for phase in (Phase.RSET, Phase.MAIL, Phase.RCPT)
            for mode in MODES
            if not mode.tls
        }
    )
