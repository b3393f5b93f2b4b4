"""Every row of the table: what a failure means and whom it concerns."""

from __future__ import annotations

import pytest

from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Reply, ReplyBuffer
from relay.delivery.trouble import (
    OPENING_PHASES,
    LocalFailure,
    Probe,
    Radius,
    Remedy,
    Trouble,
    classify_local,
    classify_reply,
    failed_here,
    is_goodbye,
    refused,
)

SENDER = "noreply@example.org"
F, D = State.FAILED, State.DEFERRED
ANEW = Trouble(D, Radius.CONNECTION, False, remedy=Remedy.ANEW)
APART = Trouble(D, Radius.RECIPIENT, remedy=Remedy.APART)


def reply(text: str) -> Reply:
    buffer = ReplyBuffer()
    buffer.feed(text.encode() + b"\r\n")
    parsed = buffer.take()
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("phase", "text", "trouble"),
    [
        # Amazon SES, "SMTP response codes"
        ("dot", "451 Temporary service failure", Trouble(D, Radius.TRANSACTION)),
        ("mail", "451 4.4.2 Timeout waiting for data from client.", ANEW),
        (
            "dot",
            "454 Throttling failure: Maximum sending rate exceeded.",
            Trouble(D, Radius.TRANSACTION, remedy=Remedy.SLOWER),
        ),
        (
            "dot",
            "454 Throttling failure: Daily message quota exceeded.",
            Trouble(D, Radius.SMARTHOST, True, Probe.MAIL),
        ),
        ("dot", "454 Temporary service failure", Trouble(D, Radius.TRANSACTION)),
        ("auth", "454 Temporary authentication failure", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("auth", "535 Authentication Credentials Invalid", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("auth", "535 Account not subscribed to SES", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("mail", "530 Authentication required", Trouble(D, Radius.SMARTHOST, False, Probe.MAIL)),
        ("mail", "535 Authentication required", Trouble(D, Radius.SMARTHOST, False, Probe.MAIL)),
        ("mail", "501 Invalid MAIL FROM address provided", Trouble(F, Radius.TRANSACTION)),
        ("dot", "552 Message is too long.", Trouble(F, Radius.TRANSACTION)),
        ("dot", "554 Transaction failed: Duplicate header 'X'", Trouble(F, Radius.TRANSACTION)),
        ("dot", "554 Access denied: User x is not authorized", Trouble(F, Radius.TRANSACTION)),
        (
            "banner",
            "421 Too many concurrent SMTP connections",
            Trouble(D, Radius.SMARTHOST, False, Probe.NOOP, Remedy.FEWER),
        ),
        ("mail", "421 Too many concurrent SMTP connections", ANEW._replace(remedy=Remedy.FEWER)),
        # 421 at any point
        ("banner", "421 4.3.2 not now", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("rcpt", "421 4.3.2 bye", ANEW),
        # After the dot it may have been said before the server came to the dot.
        ("dot", "421 4.3.2 bye", ANEW._replace(remedy=None)),
        ("dot", "451 4.4.2 Timeout", ANEW._replace(remedy=None)),
        ("dot", "503 5.5.1 order", ANEW._replace(state=State.IN_DOUBT, remedy=None)),
        ("mail", "421 4.7.0 too many errors", ANEW),
        ("mail", "421 Too many messages on this connection", ANEW),
        # the rest of the design's table
        ("banner", "554 no service", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("ehlo", "550 your name", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("starttls", "454 no TLS now", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
        ("mail", "550 5.7.1 no", Trouble(F, Radius.TRANSACTION)),
        ("mail", "450 4.7.1 later", Trouble(D, Radius.TRANSACTION)),
        ("rcpt", "550 5.1.1 unknown", Trouble(F, Radius.RECIPIENT)),
        ("rcpt", "450 4.2.1 busy", Trouble(D, Radius.RECIPIENT)),
        ("rcpt", "452 4.5.3 too many", APART),
        ("rcpt", "552 5.5.3 too many", APART),
        ("rcpt", "550 5.5.3 too many", APART),
        ("rcpt", "452 5.5.3 too many", APART),
        ("rcpt", "452 Too many recipients", APART),
        ("rcpt", "452 4.3.2 Too many recipients from you", APART),
        ("rcpt", "552 Too many recipients", APART),
        ("rcpt", "452", APART),
        ("rcpt", "452 4.2.2 full", Trouble(D, Radius.RECIPIENT)),
        ("rcpt", "452 4.3.1 no room", Trouble(D, Radius.RECIPIENT)),
        ("rcpt", "450 4.7.1 too many recipients today", Trouble(D, Radius.RECIPIENT)),
        ("rcpt", "552 5.2.2 full", Trouble(F, Radius.RECIPIENT)),
        ("rcpt", "552 full", Trouble(F, Radius.RECIPIENT)),
        # Only a RCPT can be one too many.
        ("mail", "452 4.5.3 too many", Trouble(D, Radius.TRANSACTION)),
        ("dot", "452 4.5.3 too many", Trouble(D, Radius.TRANSACTION)),
        ("dot", "552 too many recipients", Trouble(F, Radius.TRANSACTION)),
        ("data", "503 5.5.1 order", ANEW),
        ("data", "554 5.5.1 no", Trouble(F, Radius.TRANSACTION)),
        ("rset", "500 what", ANEW),
        ("noop", "500 what", Trouble(D, Radius.SMARTHOST, False, Probe.NOOP)),
    ],
)
def test_replies(phase: str, text: str, trouble: Trouble) -> None:
    assert classify_reply(Phase(phase), reply(text)) == trouble


NOT_VERIFIED = "554 Message rejected: Email address is not verified. The following identities failed the check: "


@pytest.mark.parametrize(
    ("default_sender", "text", "radius"),
    [
        (SENDER, "554 Access denied: User `arn:x' is not authorized to perform `ses:SendRawEmail'", Radius.SMARTHOST),
        (SENDER, NOT_VERIFIED + "NoReply@example.org", Radius.SMARTHOST),
        # The sandbox complains about recipients in the same words: one mail's trouble.
        (SENDER, NOT_VERIFIED + "bob@example.com", Radius.TRANSACTION),
        ("", NOT_VERIFIED + SENDER, Radius.TRANSACTION),
        (SENDER, "554 Transaction failed", Radius.TRANSACTION),
        (SENDER, "550 Access denied", Radius.TRANSACTION),
    ],
)
def test_a_refused_sender_concerns_all_only_when_it_is_the_default_one(
    default_sender: str, text: str, radius: Radius
) -> None:
    trouble = classify_reply(Phase.DOT, reply(text), default_sender=default_sender)
    assert (trouble.state, trouble.radius) == (State.FAILED, radius)
    assert (trouble.probe is Probe.MAIL) == (radius is Radius.SMARTHOST)


@pytest.mark.parametrize("failure", [LocalFailure.TIMEOUT, LocalFailure.LOST, LocalFailure.GARBAGE])
@pytest.mark.parametrize("phase", [*Phase])
def test_failures_here(phase: Phase, failure: LocalFailure) -> None:
    trouble = classify_local(phase, failure)
    assert not trouble.is_reusable
    assert (trouble.state is State.IN_DOUBT) == (phase is Phase.DOT)
    assert (trouble.radius is Radius.SMARTHOST) == (phase in OPENING_PHASES)
    assert (trouble.probe is Probe.NOOP) == (phase in OPENING_PHASES)
    # What may have been taken is never tried again, nor is a slow server asked once more.
    is_certain = phase is not Phase.DOT and phase not in OPENING_PHASES and failure is not LocalFailure.TIMEOUT
    assert (trouble.remedy is Remedy.ANEW) == is_certain


@pytest.mark.parametrize(
    "failure",
    [
        LocalFailure.TOO_BIG,
        LocalFailure.NEEDS_SMTPUTF8,
        LocalFailure.NEEDS_8BITMIME,
        LocalFailure.NUL,
        LocalFailure.BAD_PATH,
    ],
)
def test_an_impossible_mail_fails_and_spoils_nothing(failure: LocalFailure) -> None:
    assert classify_local(Phase.MAIL, failure) == Trouble(State.FAILED, Radius.TRANSACTION)


@pytest.mark.parametrize(
    "failure",
    [LocalFailure.NO_CONNECTION, LocalFailure.NO_ROOM, LocalFailure.CLOSING, LocalFailure.CIRCUIT_OPEN],
)
def test_a_mail_that_was_not_begun_is_deferred(failure: LocalFailure) -> None:
    assert classify_local(Phase.POOL, failure) == Trouble(State.DEFERRED, Radius.TRANSACTION)


def test_content_that_was_not_to_be_sent_costs_the_connection_and_is_not_tried_again() -> None:
    trouble = classify_local(Phase.CONTENT, LocalFailure.NOT_COMMITTED)
    assert trouble == Trouble(D, Radius.TRANSACTION, is_reusable=False)


def test_our_own_words_never_carry_a_reply_code() -> None:
    outcome = failed_here(classify_local(Phase.DOT, LocalFailure.LOST), Phase.DOT, LocalFailure.LOST, "x")
    assert outcome == Outcome(State.IN_DOUBT, "connection lost: x", None, "", SaidBy.LOCAL, Phase.DOT)


def test_a_refusal_carries_what_the_peer_said() -> None:
    said = reply("550 5.1.1 unknown")
    outcome = refused(classify_reply(Phase.RCPT, said), Phase.RCPT, said)
    assert outcome == Outcome(State.FAILED, "unknown", 550, "5.1.1", SaidBy.PEER, Phase.RCPT)


@pytest.mark.parametrize(
    ("text", "expected"), [("421 bye", True), ("451 4.4.2 idle", True), ("451 4.3.0 x", False), ("221 bye", False)]
)
def test_goodbyes(text: str, expected: bool) -> None:
    assert is_goodbye(reply(text)) is expected
