"""The pollers: receive from the queue, have what came handled, delete what is done, give the rest back.

Owns the engagement worker's greenlets, and that what is in hand stays hidden from others until it is settled. Leaves
what a notification means to ``Engagement``, and SQS to ``Queue``.

Nothing is deleted before ``Engagement`` has called it done, so a process may end on any line of this file: what was
not deleted is received again. A batch that waits for NATS is kept, and kept hidden, by the poller that has it; that one
receives nothing else meanwhile. What raises is tried alone; what raises alone stays in the queue, and is parked once
it was received ``PARK_AFTER_RECEIVES`` times.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import gevent
from gevent import getcurrent
from gevent.event import Event

from relay.aws.sqs import LONGEST_VISIBILITY_SECONDS, Backlog, Queue, SqsMessage
from relay.engagement import Engagement
from relay.errors import BusRefused, BusUnavailable, ConfigError, QueueUnavailable
from relay.redaction import without_addresses
from relay.tracking.batch import Notification, Verdict
from relay.tracking.record import rfc3339

log = logging.getLogger("relay.polling")

T = TypeVar("T")

HANDLE_SECONDS = 10.0
EMPTY_SECONDS = 0.5
"""An empty answer that comes sooner was not waited for."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
BACKLOG_SECONDS = 30.0
"""Between two looks at how much the queue holds."""
PARK_AFTER_RECEIVES = 10
EXTEND_AFTER = 1 / 3
"""Of the visibility timeout. Looked at every tenth of it, so that it is done well before half of it is over."""
REFUSALS = 3
"""JetStream may refuse for a moment while a cluster starts; what it refuses so often it refuses for good."""
REFUSED_PAUSE_SECONDS = 2.0

Say = Callable[[str, str], None]
"""``say(what, why)``: what is lacking for serving, or with '' that it no longer is."""


class PollingConfig(NamedTuple):
    """How the queue is polled; settings ENGAGEMENT_*."""

    pollers: int = 2
    receive_failures: int = 3
    """After so many failed receives one after the other the process ends; 0: never."""


class _Batch:
    """Messages in hand. Compared by identity."""

    def __init__(self, sqs_messages: Sequence[SqsMessage]) -> None:
        self.sqs_messages = sqs_messages
        self.received_at = self.hidden_at = time.monotonic()
        self.is_lost = False
        """It cannot be kept hidden any longer: SQS allows 12 hours."""
        self.broken = 0
        """How many of them raised alone."""


class Polling:
    """The pollers of one process. ``look``, then ``start``; ``stop_taking`` and ``finish`` end them."""

    def __init__(
        self, queue: Queue, engagement: Engagement, config: PollingConfig, say: Say, fail: Callable[[str], None]
    ) -> None:
        """``fail`` is told why the pollers cannot go on: the process is to end then."""
        self._queue = queue
        self._engagement = engagement
        self._config = config
        self._say_lacking = say
        self._fail = fail
        self._stop = Event()
        self._pollers: list[gevent.Greenlet] = []
        self._watchers: list[gevent.Greenlet] = []
        self._receiving: set[gevent.Greenlet] = set()
        self._in_hand: set[_Batch] = set()
        self._lacking: dict[str, str] = {}
        self._failures = 0
        self._failed_at = self._resume_at = 0.0
        self._broken_batches = 0
        self.counts: Counter[str] = Counter()
        self.backlog: Backlog | None = None
        """As last seen; None when it is not known."""
        self.last_error = ""

    # -- life ------------------------------------------------------------------------------
    def look(self) -> None:
        """Returns when SQS has answered; failures count and wait as those of ``receive`` do.

        Returns early when stopped or failed. Raises ``ConfigError``: no such queue, or it may not be used.
        """
        while not self._stop.is_set():
            begun_at = time.monotonic()
            try:
                self._queue.look()
            except QueueUnavailable as error:
                self._receive_failed(begun_at, error)
                self._stop.wait(self._resume_at - time.monotonic())
            else:
                self._receive_worked()
                return

    def start(self) -> None:
        """Starts polling. The end of a greenlet by an error ends the process."""
        if self._stop.is_set():
            return
        self._pollers += [gevent.spawn(self._poll) for _ in range(self._config.pollers)]
        self._watchers += [gevent.spawn(self._keep_hidden), gevent.spawn(self._watch_backlog)]
        for each in (*self._pollers, *self._watchers):
            each.link_exception(lambda ended: self._fail(f"polling ended by an error of ours: {ended.exception!r}"))

    def stop_taking(self, timeout_seconds: float) -> None:
        """Receives no more: what waits for messages is cut at once, what handles some goes on."""
        self._stop.set()
        gevent.killall(list(self._receiving), timeout=timeout_seconds)

    def finish(self, timeout_seconds: float) -> None:
        """Waits for what is being handled; what takes longer is cut, and its messages are received again later."""
        gevent.joinall(self._pollers, timeout=timeout_seconds)
        gevent.killall([*self._pollers, *self._watchers], timeout=1)

    @property
    def in_hand(self) -> int:
        """Messages that were received and are not settled yet."""
        return sum(len(batch.sqs_messages) for batch in self._in_hand)

    @property
    def idle(self) -> int:
        """Pollers that wait for messages."""
        return len(self._receiving)

    @property
    def problem(self) -> str:
        """Why no events are handled now; '' when they are."""
        return "; ".join(self._lacking.values())

    # -- receive ---------------------------------------------------------------------------
    def _poll(self) -> None:
        while not self._stop.is_set():
            gevent.sleep(0)  # whoever else is ready goes first, also when the queue always has an answer at once
            self._stop.wait(max(0.0, self._resume_at - time.monotonic()))
            if self._stop.is_set():
                return
            if sqs_messages := self._receive():
                self._settle(_Batch(sqs_messages))

    def _receive(self) -> list[SqsMessage]:
        begun_at = time.monotonic()
        self._receiving.add(getcurrent())
        try:
            sqs_messages = self._queue.receive()
        except QueueUnavailable as error:
            self._receive_failed(begun_at, error)
            return []
        finally:
            self._receiving.discard(getcurrent())
        self._receive_worked()
        if not sqs_messages and time.monotonic() - begun_at < EMPTY_SECONDS:
            self._stop.wait(EMPTY_SECONDS)  # what stands in for SQS does not wait; nor must each request cost money
        self.counts["received"] += len(sqs_messages)
        return sqs_messages

    def _receive_worked(self) -> None:
        self._failures = 0
        self._resume_at = 0.0
        self._say("sqs", "")

    def _receive_failed(self, begun_at: float, error: QueueUnavailable) -> None:
        """Counts a failure, and has all pollers wait. Several that began before the last one was seen are one."""
        self._remember(str(error))
        if begun_at < self._failed_at:
            return
        self.counts["receive_failures"] += 1
        self._failures += 1
        self._failed_at = time.monotonic()
        pause_seconds = min(FIRST_PAUSE_SECONDS * 2 ** min(self._failures - 1, 10), LONGEST_PAUSE_SECONDS)
        self._resume_at = self._failed_at + pause_seconds * random.uniform(0.5, 1)
        self._say("sqs", f"the queue of events cannot be asked: {error}")
        log.warning("events cannot be received (failure %d in a row): %s", self._failures, error)
        if self._config.receive_failures and self._failures >= self._config.receive_failures:
            self._stop.set()
            self._fail(f"events could not be received {self._failures} times in a row; the last time: {error}")

    # -- settle ----------------------------------------------------------------------------
    def _settle(self, batch: _Batch) -> None:
        self._in_hand.add(batch)
        try:
            verdicts = self._verdicts(batch)
        finally:
            # Before it is settled: or what is given back early would be hidden once more.
            self._in_hand.discard(batch)
        if batch.is_lost:
            log.warning("messages were in hand for as long as SQS allows; those that are not done go back to the queue")
        self._delete([each for each, verdict in zip(batch.sqs_messages, verdicts, strict=True) if verdict.is_done])
        again: dict[int, list[SqsMessage]] = {}
        for each, verdict in zip(batch.sqs_messages, verdicts, strict=True):
            if not verdict.is_done:
                again.setdefault(verdict.retry_seconds, []).append(each)
        for seconds, sqs_messages in again.items():
            self.counts["left"] += len(sqs_messages)
            if seconds or self._stop.is_set():
                self._queue.hide(sqs_messages, seconds)

    def _delete(self, done: Sequence[SqsMessage]) -> None:
        if not done:
            return
        try:
            left = self._queue.delete(done)
        except QueueUnavailable as error:
            left = list(done)
            self._remember(str(error))
        self.counts["deleted"] += len(done) - len(left)
        self.counts["undeleted"] += len(left)
        if left:
            log.warning("%d messages that are done could not be deleted; they will be received again", len(left))

    def _verdicts(self, batch: _Batch) -> Sequence[Verdict]:
        """One for each message, whatever happens."""
        try:
            verdicts = self._handle(batch, batch.sqs_messages)
        except Exception as error:
            self._remember(without_addresses(f"{type(error).__name__}: {error}"))
            log.exception("a batch of events could not be handled; each is tried alone")
        else:
            self._broken_batches = 0
            return verdicts
        verdicts = [self._verdict_alone(batch, each) for each in batch.sqs_messages]
        if batch.broken < len(verdicts) or len(verdicts) == 1:
            self._broken_batches = 0
        else:
            # Nothing can be handled: it is not the messages. Going on at full speed would only fill the log.
            pause_seconds = min(FIRST_PAUSE_SECONDS * 2**self._broken_batches, LONGEST_PAUSE_SECONDS)
            self._broken_batches = min(self._broken_batches + 1, 10)
            self._stop.wait(pause_seconds)
        return verdicts

    def _verdict_alone(self, batch: _Batch, sqs_message: SqsMessage) -> Verdict:
        try:
            return self._handle(batch, [sqs_message])[0]
        except Exception as error:  # noqa: BLE001 - the boundary of one message, whatever is in it
            why = without_addresses(f"{type(error).__name__}: {error}")
        batch.broken += 1
        self.counts["broken"] += 1
        log.error("an event could not be handled: %s", why, extra={"sqs_message_id": sqs_message.sqs_message_id})
        if sqs_message.received_count < PARK_AFTER_RECEIVES:
            return Verdict(False, 0, why)
        try:
            verdict = self._with_nats(batch, lambda: self._engagement.park(_notification(sqs_message), why))
        except Exception:
            log.exception("an event that cannot be handled could not be parked either; it stays in the queue")
            return Verdict(False, 0, why)
        return verdict or Verdict(False)

    def _handle(self, batch: _Batch, sqs_messages: Sequence[SqsMessage]) -> Sequence[Verdict]:
        notifications = [_notification(each) for each in sqs_messages]
        verdicts = self._with_nats(batch, lambda: self._engagement.handle(notifications, HANDLE_SECONDS))
        if verdicts is None:
            return [Verdict(False)] * len(notifications)
        if len(verdicts) != len(notifications):
            raise ValueError(f"{len(verdicts)} verdicts for {len(notifications)} notifications")
        return verdicts

    def _with_nats(self, batch: _Batch, action: Callable[[], T]) -> T | None:
        """What ``action`` gives, however long NATS is away; None when the batch is to go back to the queue."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            try:
                given = action()
            except (BusUnavailable, BusRefused) as error:
                self._remember(str(error))
                self._say("storage", f"events wait for JetStream: {error}")
            else:
                self._say("storage", "")
                return given
            if self._stop.wait(pause_seconds * random.uniform(0.5, 1)) or batch.is_lost:
                return None
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

    # -- watch -----------------------------------------------------------------------------
    def _keep_hidden(self) -> None:
        """Extends what is in hand, so that nobody else receives it while it waits."""
        visibility_seconds = self._queue.visibility_seconds
        while True:
            gevent.sleep(visibility_seconds / 10)
            for batch in list(self._in_hand):
                now = time.monotonic()
                if batch not in self._in_hand or now - batch.hidden_at < visibility_seconds * EXTEND_AFTER:
                    continue
                if now - batch.received_at + visibility_seconds > LONGEST_VISIBILITY_SECONDS:
                    batch.is_lost = True
                    continue
                batch.hidden_at = now
                self._queue.hide(batch.sqs_messages, visibility_seconds)
                self.counts["extended"] += len(batch.sqs_messages)

    def _watch_backlog(self) -> None:
        while True:
            try:
                self.backlog = self._queue.backlog()
            except QueueUnavailable:  # the pollers say so
                self.backlog = None
            gevent.sleep(BACKLOG_SECONDS)

    def _say(self, what: str, why: str) -> None:
        if self._lacking.get(what, "") != why:
            if why:
                self._lacking[what] = why
            else:
                self._lacking.pop(what)
            self._say_lacking(what, why)

    def _remember(self, what: str) -> None:
        self.last_error = f"{rfc3339(time.time())} {what}"


def prepare(what: str, steps: Callable[[], str], stop: Event, say: Say) -> None:
    """Has ``steps`` done; waits while JetStream is away, and says so. Returns early when ``stop`` is set.

    ``steps`` gives '' or why JetStream refuses, or raises ``BusRefused`` or ``BusUnavailable``. Raises ``ConfigError``
    when it goes on refusing.
    """
    refusals = 0
    pause_seconds = FIRST_PAUSE_SECONDS
    while not stop.is_set():
        try:
            why_not = steps()
        except BusRefused as error:
            why_not = str(error)
        except BusUnavailable as error:
            say("storage", f"waiting for JetStream: {error}")
            stop.wait(pause_seconds * random.uniform(0.5, 1))
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            continue
        if not why_not:
            say("storage", "")
            return
        refusals += 1
        if refusals >= REFUSALS:
            raise ConfigError(f"{what}: {why_not}")
        say("storage", why_not)
        stop.wait(REFUSED_PAUSE_SECONDS)


def _notification(sqs_message: SqsMessage) -> Notification:
    return Notification(sqs_message.body, sqs_message.sqs_message_id, sqs_message.received_count, sqs_message.sent_at)
