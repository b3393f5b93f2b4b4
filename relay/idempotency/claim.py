"""The value of a claim: its states, and every way from one to the next. No I/O, no clock.

A request with a ``request_id`` is claimed before anything is done for it. The claim is one key of a bucket and every
change of it a compare-and-set, so of all that try the same change at once exactly one succeeds. *Invariant:* no
recipient is sent to whose ``committing`` was not acknowledged first, nobody becomes ``committing`` a second time unless
the one who wrote it says that nothing was sent, and ``done`` never changes.

========== ============================================ ==============================================================
state      what is true                                 what follows
========== ============================================ ==============================================================
(none)     nothing was sent                             ``claimed``
claimed    its owner works; no final dot is out         ``committing``, ``open`` or ``done`` by its owner;
                                                        ``claimed`` by anybody once its lease has expired
committing the final dot may be out for the recipients  ``committing`` (more of them), ``open`` or ``done`` by its
           that are ``committing``                      owner; once its lease has expired ``claimed`` by anybody:
                                                        who was ``committing`` is then in doubt
open       nobody works; some recipients are certainly  ``claimed`` by anybody
           unsent; ``reply`` is what the last one said
done       nobody is unsent; ``reply`` is the answer    nothing; it is forgotten when the bucket's TTL has passed
========== ============================================ ==============================================================

What is left when the worker, NATS or the connection dies at any point:

================================================ =====================================================================
the last thing that happened                     what a repetition of the request meets
================================================ =====================================================================
before the claim was stored                      no claim: it is claimed anew
the claim was stored, its acknowledgement lost   ``claimed``: by its own worker recognised by its token, or withdrawn;
                                                 else taken over when the lease has expired
before ``committing`` was stored                 the same: nothing was sent
``committing`` stored, its acknowledgement lost  no dot until a read from the leader shows it. Dead meanwhile:
                                                 ``committing``, in doubt once the lease has expired, though unsent
between ``committing`` and the final dot         the same
between the final dot and its reply              the same, and rightly so
the reply was there, ``done`` not stored         the same: in doubt, though it is known to the caller, the record and
                                                 the log; so ``done`` is tried again as long as the lease lasts
``done`` stored, the caller not answered         ``done``: the same reply again
taken over, who is in doubt not recorded         who takes over next finds them ``forsaken``, and records them
``open`` stored                                  it is claimed anew, for those who are certainly unsent
JetStream away before ``committing``             DEFERRED ``deduplication unavailable``; nothing is sent unprotected
an individual mail sent, the next not begun      its recipient is ``committing``, since its outcome is written with the
                                                 next change: in doubt. Those after it are unsent, and are sent
the worker stands still and goes on later        its next compare-and-set fails if it was taken over. After
                                                 ``committing`` it may send its dot late, but nobody else sends
the NATS server's clock jumps                    forward: leases end early, which costs the owner a compare-and-set or
                                                 makes a mail in doubt too soon. Back: they last longer
================================================ =====================================================================
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import orjson

from relay import contract
from relay.delivery.outcome import State

MAX_DETAIL_CHARACTERS = 200

COMMITTING = "committing"
"""Of a recipient: the final dot may be out."""

SETTLED_OUTCOMES = frozenset({State.RELAYED, State.FAILED, State.IN_DOUBT})
"""Of a recipient: never sent to again under this request_id."""

UNSENT_OUTCOMES = frozenset({"", State.DEFERRED})
"""Of a recipient: certainly not sent to."""


class Phase(StrEnum):
    """Where a claim is; see the table."""

    CLAIMED = "claimed"
    COMMITTING = "committing"
    OPEN = "open"
    DONE = "done"


OWNED = frozenset({Phase.CLAIMED, Phase.COMMITTING})
"""Somebody works on it, or did until the lease expired."""


class Refusal(StrEnum):
    """Why a change is not made."""

    NOT_OURS = "somebody else has the claim"
    IN_PROGRESS = "somebody works on it"
    IS_DONE = "it is done"
    IS_SENT = "it was sent to, or may have been"


class Progress(NamedTuple):
    """One recipient: the mail that is meant for it, and what became of it."""

    email_id: str
    message_id_header: str = ""
    outcome: str = ""
    """A ``delivery.outcome.State``, ``COMMITTING``, or '' when nothing was tried yet."""
    reply_code: int | None = None
    enhanced_code: str = ""
    remote_id: str = ""
    detail: str = ""

    @property
    def is_unsent(self) -> bool:
        """Whether it may be sent to."""
        return self.outcome in UNSENT_OUTCOMES


class Owner(NamedTuple):
    """Who holds a claim. The token is another one for each attempt at a request."""

    token: str
    worker: str
    lease_seconds: float
    """From the moment when the claim's last change was stored, by the server's clock."""


class Value(NamedTuple):
    """What the bucket holds for a request_id."""

    phase: Phase
    fingerprint: str
    """Of what is to be sent: another mail under the same request_id is refused."""
    owner: Owner
    """Who made the last change."""
    attempt: int
    group_id: str
    recipients: tuple[Progress, ...]
    """In the order of the request; the ids are those of the first attempt."""
    reply: bytes | None = None
    """JSON object: the answer of ``done``, or of the attempt that ended in ``open``."""

    @property
    def unsent(self) -> tuple[int, ...]:
        """Indexes of the recipients who are certainly unsent."""
        return tuple(index for index, each in enumerate(self.recipients) if each.is_unsent)

    @property
    def forsaken(self) -> tuple[int, ...]:
        """Indexes of the recipients who are in doubt because nobody lived to say what became of them.

        Of any other doubt somebody said what it is.
        """
        return tuple(
            index
            for index, each in enumerate(self.recipients)
            if each.outcome == State.IN_DOUBT and not each.detail and each.reply_code is None
        )

    def as_json(self) -> bytes:
        """As it is stored."""
        stored: dict[str, Any] = {
            "state": self.phase,
            "fingerprint": self.fingerprint,
            "token": self.owner.token,
            "worker": self.owner.worker,
            "lease_seconds": self.owner.lease_seconds,
            "attempt": self.attempt,
            "group_id": self.group_id,
            "recipients": [
                {name: part for name, part in zip(_NAMES, each, strict=True) if part not in {"", None}}
                for each in self.recipients
            ],
        }
        if self.reply is not None:
            stored["reply"] = orjson.Fragment(self.reply)
        return orjson.dumps(stored)


_NAMES = Progress._fields


def read_value(stored: bytes) -> Value | None:
    """The value in a claim's bytes, None when it is none of ours."""
    try:
        found = orjson.loads(stored)
        reply = found.get("reply")
        return Value(
            Phase(found["state"]),
            str(found["fingerprint"]),
            Owner(str(found["token"]), str(found["worker"]), float(found["lease_seconds"])),
            int(found["attempt"]),
            str(found["group_id"]),
            tuple(Progress(**each) for each in found["recipients"]),
            orjson.dumps(reply) if reply is not None else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError):  # also what orjson raises
        return None


# -- changes ---------------------------------------------------------------------------------
def claimed(fingerprint: str, group_id: str, recipients: Iterable[Progress], owner: Owner) -> Value:
    """The first claim of a request_id."""
    return Value(Phase.CLAIMED, fingerprint, owner, 1, group_id, tuple(recipients))


def taken_over(value: Value, owner: Owner, *, is_expired: bool) -> Value | Refusal:
    """``value`` claimed by another owner, who goes on with those who are unsent. There may be none left."""
    if value.phase is Phase.DONE:
        return Refusal.IS_DONE
    if value.phase in OWNED and not is_expired:
        return Refusal.IN_PROGRESS
    recipients = tuple(_without_dot(each) for each in value.recipients)
    return value._replace(
        phase=Phase.CLAIMED, owner=owner, attempt=value.attempt + 1, recipients=recipients, reply=None
    )


def committing(
    value: Value, owner: Owner, indexes: Iterable[int], noted: Mapping[int, Progress] | None = None
) -> Value | Refusal:
    """``value`` when its owner is about to send the final dot for the recipients at ``indexes``.

    ``noted`` is what became of others meanwhile.
    """
    if (refusal := _refusal(value, owner)) is not None:
        return refusal
    recipients = list(_with_results(value.recipients, noted or {}))
    for index in indexes:
        if recipients[index].outcome != COMMITTING and not recipients[index].is_unsent:
            return Refusal.IS_SENT
        recipients[index] = Progress(*recipients[index][:2], outcome=COMMITTING)
    return value._replace(phase=_phase(recipients), owner=owner, recipients=tuple(recipients))


def settled(value: Value, owner: Owner, results: Mapping[int, Progress], reply: bytes | None) -> Value | Refusal:
    """``value`` when its owner's attempt is over: ``done`` when nobody is unsent, else ``open``.

    Whoever is ``committing`` and has no result is in doubt. Without a reply it can only be ``open``.
    """
    if (refusal := _refusal(value, owner)) is not None:
        return refusal
    recipients = tuple(_without_dot(each) for each in _with_results(value.recipients, results))
    is_open = reply is None or any(each.is_unsent for each in recipients)
    return value._replace(phase=Phase.OPEN if is_open else Phase.DONE, owner=owner, recipients=recipients, reply=reply)


def _refusal(value: Value, owner: Owner) -> Refusal | None:
    """Why ``owner`` may not change it."""
    if value.owner.token != owner.token:
        return Refusal.NOT_OURS
    return None if value.phase in OWNED else Refusal.IS_DONE


def _phase(recipients: Iterable[Progress]) -> Phase:
    return Phase.COMMITTING if any(each.outcome == COMMITTING for each in recipients) else Phase.CLAIMED


def _without_dot(each: Progress) -> Progress:
    return each._replace(outcome=State.IN_DOUBT.value) if each.outcome == COMMITTING else each


def _with_results(recipients: Iterable[Progress], results: Mapping[int, Progress]) -> Iterable[Progress]:
    """What was settled stays, and the ids are those of the claim."""
    for index, each in enumerate(recipients):
        result = results.get(index)
        if result is None or each.outcome in SETTLED_OUTCOMES or (not result.outcome and each.outcome == COMMITTING):
            yield each
        else:
            detail = result.detail[:MAX_DETAIL_CHARACTERS]
            yield result._replace(email_id=each.email_id, message_id_header=each.message_id_header, detail=detail)


# -- what a request is told ------------------------------------------------------------------
class Reason(StrEnum):
    """Why a request is not taken; the words are the caller's."""

    PAYLOAD_DIFFERS = contract.REQUEST_ID_REUSED
    IN_PROGRESS = "in progress"
    UNAVAILABLE = "deduplication unavailable"
    OVERLOADED = "overloaded"

    @property
    def retryable(self) -> bool:
        """Whether the same request may be made again."""
        return self is not Reason.PAYLOAD_DIFFERS


class Refused(NamedTuple):
    """Nothing was sent for this request, and nothing may be."""

    reason: Reason


class Settled(NamedTuple):
    """It was answered before, or a twin was just now."""

    reply: bytes
    """That answer, with ``"duplicate": true``."""


def answer_from(value: Value, fingerprint: str) -> Settled | Refused:
    """What a request is told when its claim has a reply; ``fingerprint`` is the request's own."""
    if value.fingerprint != fingerprint:
        return Refused(Reason.PAYLOAD_DIFFERS)
    if value.reply is None:
        return Refused(Reason.IN_PROGRESS)
    return Settled(orjson.dumps({**orjson.loads(value.reply), "duplicate": True}))


# -- what a claim is known by ----------------------------------------------------------------
def claim_key(scope: str, request_id: str) -> str:
    """The key of a request_id. ``scope`` is its caller's name, '' where callers are not told apart."""
    return fingerprint_of([scope, request_id])


def fingerprint_of(value: object) -> str:
    """A hash that two values share only if they are equal: 43 characters that a key may have.

    Takes None, numbers, text, bytes and buffers, sequences of them (named tuples too) and mappings with text as keys,
    in whatever order. Buffers are not copied.
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def _pieces(value: object) -> Iterable[bytes | bytearray | memoryview]:
    """A kind, a length where there is one, and what it holds, so that no two values give the same octets."""
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield b"s%d:" % len(text)
        yield text
    elif isinstance(value, bytes | bytearray | memoryview):
        yield b"b%d:" % (value.nbytes if isinstance(value, memoryview) else len(value))
        yield value
    elif value is None or isinstance(value, bool | int | float):
        yield f"{value!r};".encode()
    elif isinstance(value, Mapping):
        yield b"m%d:" % len(value)
        for name in sorted(value):
            yield from _pieces(name)
            yield from _pieces(value[name])
    elif isinstance(value, list | tuple):
        yield b"l%d:" % len(value)
        for each in value:
            yield from _pieces(each)
    else:
        raise TypeError(f"a {type(value).__name__} has no fingerprint")
