"""What is kept of every mail, whatever asked for it: counts, one log line, the record and its facts.

Used by the jobs that hand mails over. Never an address or content in a log line; how the record is written is
``tracking``'s.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import gevent

from relay.delivery.outcome import SENT_STATES, Outcome, Phase, State
from relay.histogram import Histogram
from relay.journey import Follower
from relay.redaction import without_addresses
from relay.tracking.record import rfc3339
from relay.tracking.tracker import HandedOver, Tracker

log = logging.getLogger("relay.sending")

AMEND_SECONDS = 1.0

RELAYED = "mail relayed"
RELAYED_FIELDS = ("email_id", "group_id", "outcome", "compose_ms", "smtp_ms", "tracking_ms")
"""The one line that every mail writes, which is why a program may give ``Books`` a cheaper way to write it."""


def log_relayed_line(*values: object) -> None:
    """Logs ``RELAYED`` with the values of ``RELAYED_FIELDS``."""
    log.info(RELAYED, extra=dict(zip(RELAYED_FIELDS, values, strict=True)), stacklevel=2)


class Books:
    """One for all requests of a worker."""

    def __init__(
        self,
        tracker: Tracker,
        log_relayed: Callable[..., None] = log_relayed_line,
        waited_in_vain: Callable[[], object] = lambda: None,
        follower: Follower | None = None,
    ) -> None:
        """``log_relayed`` is called once a mail, as ``log_relayed_line`` is.

        ``waited_in_vain`` is told of each mail that was deferred before it had a connection; ``follower`` of what
        became of each mail, and of each request without one.
        """
        self._tracker = tracker
        self._amending: set[Any] = set()
        self._log_relayed = log_relayed
        self._follower = follower
        self.waited_in_vain = waited_in_vain
        self.counts: Counter[str] = Counter()
        """How many requests ended how: the states of ``Outcome``, ``refused``, and ``not_sent`` on purpose."""
        self.last_error = ""
        """The detail of the last mail that was not relayed, with its time."""
        self.reply_classes: Counter[str] = Counter()
        """What the smarthost said last of each mail; ``none`` where it said nothing."""
        self.send_seconds = Histogram()
        """From a request that is attempted to its reply."""

    def record(self, mail: HandedOver, outcome: Outcome) -> None:
        """Writes record and facts of a mail that the smarthost has, or may have; blocks for their acknowledgement."""
        if outcome.phase is Phase.POOL and outcome.state is State.DEFERRED:
            self.waited_in_vain()
        elif outcome.state in SENT_STATES:
            self._tracker.note(mail)

    def amend(self, mail: HandedOver) -> None:
        """The same for a mail that may have a record, of an attempt that did not reach everyone, or died.

        Blocks for ``AMEND_SECONDS`` at most; then it goes on in the background. ``wait_amended`` waits for all.
        """
        amending = gevent.spawn(self._tracker.settle, mail)
        self._amending.add(amending)
        amending.link(self._amending.discard)
        amending.join(AMEND_SECONDS)

    def wait_amended(self, timeout_seconds: float) -> None:
        """Blocks until no record is being amended, ``timeout_seconds`` at most."""
        gevent.joinall(list(self._amending), timeout=timeout_seconds)

    def settle(self, mail: HandedOver, outcome: Outcome) -> None:
        """The smarthost has spoken of a mail whose caller was told that it is in doubt: the record says it from now on.

        It may happen before the record of the mail in doubt is written; ``Tracker.settle`` makes it then.
        """
        fields = {"email_id": mail.email_id, "outcome": outcome.state.value, "reply_code": outcome.reply_code}
        if outcome.state is State.IN_DOUBT:
            log.warning("mail stays in doubt: %s", without_addresses(outcome.detail[:200]), extra=fields)
            return
        self.counts["settled"] += 1
        log.info("mail in doubt settled: %s", without_addresses(outcome.detail[:200]), extra=fields)
        self._tracker.settle(mail)

    def note(
        self, email_id: str, group_id: str, outcome: Outcome, compose_s: float, smtp_s: float, tracking_s: float
    ) -> None:
        """Counts and logs a mail: ids, what was said and how long each step took."""
        state = outcome.state
        self.counts[state] += 1
        code = outcome.reply_code
        self.reply_classes[f"{code // 100}xx" if code else "none"] += 1
        values = (
            email_id,
            without_addresses(group_id[:128]),
            str(state),
            round(compose_s * 100_000) / 100,
            round(smtp_s * 100_000) / 100,
            round(tracking_s * 100_000) / 100,
        )
        if self._follower is not None:
            self._follower.came_to(
                state.value,
                problem="" if state is State.RELAYED else without_addresses(outcome.detail[:200]),
                email_id=email_id,
                group_id=values[1],
                reply_code=code,
                enhanced_code=outcome.enhanced_code,
                attempt=outcome.attempt if outcome.attempt > 1 else None,
            )
        if state is State.RELAYED:
            self._log_relayed(*values)
        else:
            self._note_failure(outcome, dict(zip(RELAYED_FIELDS, values, strict=True)))

    def note_unattempted(self, outcome: Outcome) -> None:
        """Counts and logs a request that never became a mail, although it was not refused."""
        self.counts[outcome.state] += 1
        self._tell(outcome.state.value, problem=without_addresses(outcome.detail[:200]))
        self._note_failure(outcome, {"outcome": outcome.state.value})

    def note_unsent(self, why: str) -> None:
        """Counts and logs a request for which nothing is sent on purpose."""
        self.counts["not_sent"] += 1
        self._tell("not_sent")
        log.info("mail not sent: %s", why)

    def note_refused(self, error: str) -> None:
        """Counts and logs a request that the relay itself does not take."""
        self.counts["refused"] += 1
        self._tell("refused", error=error)
        log.debug("request refused: %s", error)

    def note_repeated(self) -> None:
        """A request that was answered before is answered so again; ``idempotency`` counts it."""
        self._tell("repeated")

    def _tell(self, outcome: str, problem: str = "", **facts: str) -> None:
        if self._follower is not None:
            self._follower.came_to(outcome, problem=problem, **facts)

    def _note_failure(self, outcome: Outcome, fields: dict[str, Any]) -> None:
        said = without_addresses(outcome.detail[:200])
        self.last_error = f"{rfc3339(time.time())} {said}"
        log.warning("mail not relayed: %s", said, extra=fields | {"reply_code": outcome.reply_code})
