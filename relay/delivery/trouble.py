"""What to do about a failure: the only place that maps one to an outcome's state and to its blast radius.

Pure. Owns the table below; leaves acting on it to ``session`` (connections), ``smarthost`` (another attempt) and
``guard`` (the circuit).
Sources: RFC 5321 §4.2.1, §4.2.4.2, §4.3.2, §4.5.3.1.10; RFC 3463 §3; RFC 4954 §6; RFC 1047;
Amazon SES, "SMTP response codes".

=====================================  ===========  ==========  ========  =====  ======
failure                                state        radius      reusable  probe  remedy
=====================================  ===========  ==========  ========  =====  ======
**the peer's reply**
421 "too many" … "connections"         DEFERRED     connection  no        noop*  fewer
421 at any point before the dot        DEFERRED     connection  no        noop*  anew
451 4.4.2 (it tired of waiting)        DEFERRED     connection  no        noop*  anew
421, 451 4.4.2 to the final dot        DEFERRED     connection  no        -      -
503 to the final dot                   IN_DOUBT     connection  no        -      -
4yz, 5yz in banner … AUTH, NOOP        DEFERRED     smarthost   no        noop   -
530, 534, 535, 538 after AUTH          DEFERRED     smarthost   no        mail   -
454 … "quota exceeded"                 DEFERRED     smarthost   yes       mail   -
454 … "maximum sending rate"           DEFERRED     transaction yes       -      slower
503 (we are out of step)               DEFERRED     connection  no        -      anew
4yz to RCPT                            DEFERRED     recipient   yes       -      -
4yz to MAIL, DATA, the final dot       DEFERRED     transaction yes       -      -
452, 552, x.5.3 "too many recipients"
to RCPT                                DEFERRED     recipient   yes       -      apart
5yz to RCPT                            FAILED       recipient   yes       -      -
554 denied / not verified, for the
default sender                         FAILED       smarthost   yes       mail   -
5yz to MAIL, DATA, the final dot       FAILED       transaction yes       -      -
to RSET: anything but 2yz              DEFERRED     connection  no        -      anew
**here**
until AUTH: refused, lost, timeout …   DEFERRED     smarthost   no        noop   -
MAIL … content: lost, garbage          DEFERRED     connection  no        -      anew
MAIL … content: timeout                DEFERRED     connection  no        -      -
after the final dot: the same          IN_DOUBT     connection  no        -      -
no reply yet when the caller must know IN_DOUBT     connection  no        -      -
the content was not to be sent after
all (``commit``)                       DEFERRED     transaction no        -      -
too big, an extension missing, bad path FAILED      transaction yes       -      -
no connection in time, closing, open,
no room at the sending rate            DEFERRED     transaction yes       -      -
=====================================  ===========  ==========  ========  =====  ======

\\* only while the connection is being opened; then the radius is the smarthost's.

The last column is what may be tried at once, since nothing was taken: the mail again on another connection (anew),
the same with fewer connections from here on (fewer), in a while at a lower rate (slower), or for the rest of its
recipients in another transaction (apart). A time-out is not tried again: the server is slow already. Nor is, but for
"maximum sending rate", anything that was said after the final dot: a server that closes down may say 421 before it
comes to the dot that it already has.

An extension that one recipient's address needs is missing for that one; the others are served.

Too many recipients (RFC 5321 §4.5.3.1.10, RFC 3463 §3.6 X.5.3): 452, which RFC 821 called 552. A 452 whose enhanced
code says something else (a full mailbox, a full disk) is another matter. To the first recipient of a transaction it
is a refusal like others, since there is no smaller one: ``session`` keeps the remedy only where somebody was accepted
before.

"Smarthost" for a connection that could not be opened means: as far as this connection can tell. ``guard`` opens
the circuit for it only when no other connection lives, since those prove the contrary.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Reply


class Radius(enum.IntEnum):
    """How much else a failure concerns; ordered, so that the widest of several can be taken with ``max``."""

    RECIPIENT = 1
    TRANSACTION = 2
    CONNECTION = 3
    SMARTHOST = 4


class Probe(enum.StrEnum):
    """What shows that the smarthost serves us again."""

    NOOP = "noop"
    """A connection that gets as far as a 250 to NOOP."""
    MAIL = "mail"
    """One real mail: connecting and logging in worked all the time."""
    DOT = "dot"
    """The answer to any final dot, also to one that was sent before: everything but that worked all the time."""


class Remedy(enum.StrEnum):
    """What may be tried at once for a mail that was certainly not taken."""

    ANEW = "anew"
    """The same on another connection."""
    FEWER = "fewer"
    """The same, and fewer connections for a while."""
    SLOWER = "slower"
    """Again in a while, and fewer recipients a second from here on."""
    APART = "apart"
    """In another transaction, without those who were accepted in this one."""


class LocalFailure(enum.Enum):
    """What happened here, without a reply; the value is the text for ``Outcome.detail``."""

    TIMEOUT = "timed out"
    LOST = "connection lost"
    GARBAGE = "the smarthost broke the protocol"
    UNREACHABLE = "cannot connect"
    TLS = "TLS failed"
    NOT_OFFERED = "a needed extension is not offered"
    NO_CONNECTION = "no connection in time"
    NO_ROOM = "no room in time at the sending rate"
    NO_REPLY_YET = "no reply to the final dot in time; the record will say what became of the mail"
    NOT_COMMITTED = "deduplication unavailable"
    CLOSING = "shutting down"
    CIRCUIT_OPEN = "smarthost unavailable"
    TOO_BIG = "5.3.4 the mail is larger than the smarthost takes"
    NEEDS_SMTPUTF8 = "5.6.7 the address needs SMTPUTF8, which the smarthost does not offer"
    NEEDS_8BITMIME = "5.6.3 the content needs 8BITMIME, which the smarthost does not offer"
    NUL = "5.6.0 the content has a NUL octet, which no mail may have"
    BAD_PATH = "5.1.0 the address cannot be put into an SMTP command"


class Trouble(NamedTuple):
    """What one failure means."""

    state: State
    radius: Radius
    is_reusable: bool = True
    """Whether the connection may carry another transaction."""
    probe: Probe | None = None
    """What closes the circuit; set exactly when ``radius`` is SMARTHOST."""
    remedy: Remedy | None = None


OPENING_PHASES = frozenset({Phase.CONNECT, Phase.BANNER, Phase.EHLO, Phase.STARTTLS, Phase.AUTH, Phase.NOOP})
"""Before the first mail; NOOP is only asked to see whether a new connection is good."""
_CROWDED = re.compile(r"too many\b.*\bconnections\b", re.IGNORECASE)
"""Amazon SES: ``Too many concurrent SMTP connections``; others say it in nearly the same words. In the plural: too
many messages on *this connection* is no complaint about their number."""
_TOO_MANY_RECIPIENTS = re.compile(r"too many\b.*\brecipients?\b", re.IGNORECASE)
_NOT_LOGGED_IN_CODES = frozenset({530, 534, 535, 538})
_MESSAGE_FAILURES = frozenset(
    {
        LocalFailure.TOO_BIG,
        LocalFailure.NEEDS_SMTPUTF8,
        LocalFailure.NEEDS_8BITMIME,
        LocalFailure.NUL,
        LocalFailure.BAD_PATH,
    }
)
_NO_ATTEMPT_FAILURES = frozenset(
    {LocalFailure.NO_CONNECTION, LocalFailure.NO_ROOM, LocalFailure.CLOSING, LocalFailure.CIRCUIT_OPEN}
)

_LAST_TROUBLE = Trouble(State.DEFERRED, Radius.CONNECTION, is_reusable=False)
_CONNECTION_TROUBLE = _LAST_TROUBLE._replace(remedy=Remedy.ANEW)
_OUT_OF_STEP_TROUBLE = _LAST_TROUBLE._replace(state=State.IN_DOUBT)
_CROWDED_TROUBLE = _LAST_TROUBLE._replace(remedy=Remedy.FEWER)
_OPENING_TROUBLE = Trouble(State.DEFERRED, Radius.SMARTHOST, is_reusable=False, probe=Probe.NOOP)


def classify_reply(phase: Phase, reply: Reply, *, default_sender: str = "") -> Trouble:
    """Say what a refusal (4yz, 5yz) means.

    ``default_sender`` is the reverse-path when it is the one that Relay uses by default, else ''.
    """
    if phase is Phase.DOT and (is_goodbye(reply) or reply.code == 503):
        return _OUT_OF_STEP_TROUBLE if reply.code == 503 else _LAST_TROUBLE
    is_crowded = reply.code == 421 and _CROWDED.search(reply.text) is not None
    if phase in OPENING_PHASES:
        return _OPENING_TROUBLE._replace(remedy=Remedy.FEWER) if is_crowded else _OPENING_TROUBLE
    if is_crowded:
        return _CROWDED_TROUBLE
    if is_goodbye(reply) or reply.code == 503 or phase is Phase.RSET:
        return _CONNECTION_TROUBLE
    if reply.code in _NOT_LOGGED_IN_CODES:
        return Trouble(State.DEFERRED, Radius.SMARTHOST, is_reusable=False, probe=Probe.MAIL)
    text = reply.text.lower()
    if reply.code == 454 and "quota exceeded" in text:
        return Trouble(State.DEFERRED, Radius.SMARTHOST, probe=Probe.MAIL)
    if reply.code == 454 and "maximum sending rate" in text:
        return Trouble(State.DEFERRED, Radius.TRANSACTION, remedy=Remedy.SLOWER)
    if reply.code == 554 and _concerns_sender(text, default_sender.lower()):
        return Trouble(State.FAILED, Radius.SMARTHOST, probe=Probe.MAIL)
    if phase is Phase.RCPT and _has_too_many_recipients(reply):
        return Trouble(State.DEFERRED, Radius.RECIPIENT, remedy=Remedy.APART)
    state = State.DEFERRED if reply.is_transient else State.FAILED
    return Trouble(state, Radius.RECIPIENT if phase is Phase.RCPT else Radius.TRANSACTION)


def classify_local(phase: Phase, failure: LocalFailure) -> Trouble:
    """Say what a failure without a reply means."""
    if failure in _MESSAGE_FAILURES:
        return Trouble(State.FAILED, Radius.TRANSACTION)
    if failure in _NO_ATTEMPT_FAILURES:
        return Trouble(State.DEFERRED, Radius.TRANSACTION)
    if failure is LocalFailure.NOT_COMMITTED:
        return Trouble(State.DEFERRED, Radius.TRANSACTION, is_reusable=False)
    if phase in OPENING_PHASES:
        return _OPENING_TROUBLE
    if phase is Phase.DOT:
        return Trouble(State.IN_DOUBT, Radius.CONNECTION, is_reusable=False)
    return _LAST_TROUBLE if failure is LocalFailure.TIMEOUT else _CONNECTION_TROUBLE


def is_goodbye(reply: Reply) -> bool:
    """Whether the peer is about to close the connection: 421 (RFC 5321 §3.8), or SES's 451 4.4.2 to an idle client."""
    return reply.code == 421 or (reply.code == 451 and reply.enhanced_code == "4.4.2")


def refused(trouble: Trouble, phase: Phase, reply: Reply) -> Outcome:
    """Make the outcome of a refusal."""
    return Outcome(trouble.state, reply.text, reply.code, reply.enhanced_code, SaidBy.PEER, phase)


def failed_here(trouble: Trouble, phase: Phase, failure: LocalFailure, detail: str = "") -> Outcome:
    """Make the outcome of a failure without a reply; ``detail`` is one line without secrets."""
    text = f"{failure.value}: {detail}" if detail else failure.value
    return Outcome(trouble.state, text, None, "", SaidBy.LOCAL, phase)


def _has_too_many_recipients(reply: Reply) -> bool:
    """Whether a refused RCPT is one more than the transaction may have."""
    if reply.enhanced_code.endswith(".5.3"):
        return True
    if reply.code == 452 and not reply.enhanced_code:
        return True
    return reply.code in (452, 552) and _TOO_MANY_RECIPIENTS.search(reply.text) is not None


def _concerns_sender(text: str, default_sender: str) -> bool:
    """Whether SES's 554 is about the default sender itself.

    In its sandbox SES says "not verified" about recipients too, and names them; that is one mail's trouble.
    """
    if not default_sender or not ("access denied" in text or "not verified" in text):
        return False
    return default_sender in text or "@" not in text
