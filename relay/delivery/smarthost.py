"""The smarthost as the jobs see it: one call hands a mail over and always answers with outcomes.

Owns the attempts at one mail: which failure is tried again here, how often, and what happens to a mail whose caller
has gone before the smarthost answered. ``trouble`` judges, ``pool`` has the connections, ``pacer`` the sending rate,
``guard`` the circuit.

Nothing is tried again that the smarthost may have taken. What it certainly has not is tried again within the deadline,
as long as the circuit is closed:

- a stale connection (it had hung up before our first command) is replaced, as often as it takes, uncounted;
- a connection that breaks before the content is sent is replaced, ``MAX_ATTEMPTS`` times in all;
- a mail refused for being too fast waits and goes out at a lower rate;
- recipients beyond what the smarthost takes in one transaction are served in another, as often as it takes, uncounted:
  each serves at least one. At the sending rate they have had their turn with the others.
"""

from __future__ import annotations

import contextvars
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

import gevent

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import OpeningFailed
from relay.delivery.guard import Guard
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.pacer import Pacer
from relay.delivery.rate import Rate
from relay.delivery.session import Commit, Ending, Session
from relay.delivery.trouble import LocalFailure, Remedy, classify_local, failed_here
from relay.errors import EgressUnavailable, PoolClosed, PoolTimeout, RateTimeout
from relay.histogram import Histogram
from relay.journey import TRANSACTION, WAIT, Follower

log = logging.getLogger("relay.delivery")

MAX_ATTEMPTS: Final = 3
"""At one mail, over connections that break; a mail that breaks each of them is not tried for ever."""
THROTTLED_PAUSE_SECONDS: Final = 1.0
"""Before a mail that was refused for being too fast is tried again, on average: rates are counted by the second."""

WEIGHT_OF_THE_LAST: Final = 0.1
"""Of one transaction's time, in the usual time."""
ROOM_FOR_SLOWER: Final = 1.25
"""Times the usual time that a transaction must have left to be begun."""
USUAL_HALVES_SECONDS: Final = 10.0
"""Without a transaction: one long wait of the past does not decide for ever."""

COUNTED_REMEDIES: Final = frozenset({Remedy.ANEW, Remedy.FEWER})
"""Those that could be tried for ever."""

Settled = Callable[[list[Outcome]], None]


class Smarthost:
    """Hands mails over to one smarthost. Any number of greenlets of one thread may use it."""

    def __init__(self, config: SmarthostConfig, *, default_sender: str = "", follower: Follower | None = None) -> None:
        """``default_sender`` is the reverse-path of mails that name no sender; connects only when first needed.

        ``follower`` is told of each wait and each transaction. Raises ``ConfigError`` for unusable TLS settings.
        """
        self._config = config
        self._follower = follower
        self._rate = Rate(config.max_recipients_per_second)
        self._pacer = Pacer(self._rate)
        self._guard = Guard(config, default_sender, self._pacer.refuse)
        self._pool = self._guard.pool
        self._circuit = self._guard.circuit
        self._silence = self._guard.silence
        self._settling: set[Any] = set()
        self._stale_replaced = 0
        self._retried = 0
        self._usual_seconds = 0.0
        """About how long a transaction takes, with its reply to the final dot."""
        self._usual_at = 0.0
        self.pool_wait_seconds = Histogram()
        """How long mails waited for a connection, and for their turn at the sending rate; in vain, too."""
        self.transaction_seconds = Histogram()
        """How long transactions took, from MAIL to the last reply, without what ``commit`` took."""

    def relay(
        self,
        reverse_path: str,
        forward_paths: tuple[str, ...],
        content: bytes,
        deadline: float,
        on_settled: Settled | None = None,
        commit: Commit | None = None,
    ) -> list[Outcome]:
        """Hand one mail over; return one outcome per forward-path, in the same order.

        ``content`` has CRLF line ends and is not dot-stuffed. Blocks until ``deadline`` (``time.monotonic()``) at most.
        Raises nothing for what SMTP or the network does. What the deadline alone kept from being sent ``is_late``.

        ``commit`` is called once the smarthost waits for content, and before the first octet of it, with the places in
        ``forward_paths`` of those whom it accepted: a mail takes several transactions when one is tried again, or when
        the smarthost does not take all recipients together, so it is called again for the same places or for others.
        When it answers False they are DEFERRED (``deduplication unavailable``), no dot is sent and nothing more is
        tried. It may block, at best not beyond the deadline, after which nothing is sent; it must not raise, but if it
        does, or is killed, no dot is sent either.

        When the deadline comes while the final dot's reply is outstanding the outcomes are IN_DOUBT, the connection
        goes on waiting, and ``on_settled`` is called later, once and in another greenlet, with the outcomes as they
        turned out, IN_DOUBT again if no reply came. When the connection was lost before the deadline IN_DOUBT is final
        at once, and nothing is called.
        """
        is_probe = not self._circuit.is_closed
        if is_probe and not self._guard.begin_mail_probe():
            return [_unattempted(LocalFailure.CIRCUIT_OPEN, self._circuit.reason)] * len(forward_paths)
        try:
            session = self._connection(len(forward_paths), deadline)
            outcomes, ending = self._transact(session, reverse_path, forward_paths, content, deadline, commit, is_probe)
            if ending is None:
                return outcomes
            mail = _Mail(reverse_path, forward_paths, content, deadline, on_settled, commit, is_probe)
            mail.take(outcomes)
            self._try_again(mail, session, ending)
            return mail.outcomes
        except EgressUnavailable as error:
            return [_outcome_of(error)] * len(forward_paths)
        finally:
            if is_probe:
                self._guard.end_mail_probe()

    def figures(self) -> dict[str, Any]:
        """Numbers and words for status pages and logs."""
        rate = self._rate
        return {
            **self._guard.figures(),
            "awaiting_dot": len(self._settling),
            "stale_replaced": self._stale_replaced,
            "retried": self._retried,
            "throttled": rate.throttled_count,
            "rate_per_second": round(rate.current, 2) if rate.is_limited else None,
            "rate_lowered": rate.is_lowered,
            "rate_waiting": self._pacer.waiting,
        }

    def scale_rate(self, factor: float) -> None:
        """From now on ``factor`` times the sending rate: others share it, or no longer do. Never blocks."""
        self._rate.scale(factor, time.monotonic())
        self._pacer.rate_changed()

    def close(self, deadline: float) -> None:
        """Refuse who waits, let what is busy finish until ``deadline``, then cut it. Blocks no longer than that."""
        self._pacer.close()
        self._guard.close(deadline)

    def wait_settled(self, timeout_seconds: float) -> None:
        """After ``close``: let the calls of ``on_settled`` that are due come to an end."""
        gevent.joinall(list(self._settling), timeout=timeout_seconds)

    def _connection(self, recipients: int, deadline: float, *, is_retry: bool = False) -> Session:
        """Wait for this mail's turn and for a connection. Raises ``EgressUnavailable``."""
        rate = self._rate
        was_limited = rate.is_limited
        waits_since = time.monotonic()
        problem = ""
        try:
            if was_limited:
                self._pacer.wait(recipients, deadline, is_retry=is_retry)
            session = self._pool.acquire(deadline)
            if rate.is_limited and not was_limited:
                # It queued for a connection when nothing was known of a limit yet: now it queues for its turn.
                self._pool.hand_back(session)
                self._pacer.wait(recipients, deadline)
                session = self._pool.acquire(deadline)
        except EgressUnavailable as error:
            problem = type(error).__name__
            if isinstance(error, PoolTimeout):
                self._guard.look_for_silence(time.monotonic())
            raise
        finally:
            now = time.monotonic()
            self._note_wait(waits_since, now, problem)
        if deadline - now < self._usual_seconds * ROOM_FOR_SLOWER and self._is_too_late(deadline, now):
            # The content would go out with no time left for its reply: in doubt, where "not sent" is certain now.
            self._pool.hand_back(session)
            raise PoolTimeout("a connection came too late for a transaction")
        return session

    def _is_too_late(self, deadline: float, now: float) -> bool:
        """Whether a transaction should not be begun; what is known of their length counts less the older it is."""
        share: float = 0.5 ** ((now - self._usual_at) / USUAL_HALVES_SECONDS)
        return deadline - now < self._usual_seconds * ROOM_FOR_SLOWER * share

    def _try_again(self, mail: _Mail, session: Session, ending: Ending) -> None:
        """Go on from an attempt that ended in trouble, to the end of what may be tried. Raises nothing."""
        # Each stale connection leaves the pool, so after all of them comes a fresh one, which cannot be stale.
        stale_left = self._config.pool_size + 1
        while True:
            if ending.is_awaiting_dot:
                mail.note_late(ending.again)
                self._settle_later(session, mail)
                return
            remedies: Collection[Remedy] = ()
            if ending.is_stale and stale_left:
                stale_left -= 1
                self._stale_replaced += 1
            else:
                stale_left = self._config.pool_size + 1
                remedies = self._prepare_retry(mail, ending)
                if not remedies:
                    return
            try:
                session = self._next_session(mail, session if ending.is_kept else None, remedies)
            except EgressUnavailable as error:
                # What the smarthost said of an attempt tells more than that there was no time for another.
                if ending.is_stale and mail.attempt == 1:
                    mail.take([_outcome_of(error)] * len(mail.paths))
                elif isinstance(error, (PoolTimeout, RateTimeout)):
                    mail.note_late(range(len(mail.paths)))
                return
            outcomes, next_ending = self._transact(
                session, mail.reverse_path, mail.paths, mail.content, mail.deadline, mail.commit, mail.is_probe
            )
            mail.take(outcomes)
            if next_ending is None:
                return
            ending = next_ending

    def _prepare_retry(self, mail: _Mail, ending: Ending) -> Collection[Remedy]:
        """Leave those whom there is to be another attempt for, and return why; waits before it where that is needed."""
        again = ending.again
        if mail.attempt >= MAX_ATTEMPTS:
            again = {place: remedy for place, remedy in again.items() if remedy not in COUNTED_REMEDIES}
        if Remedy.SLOWER in again.values():
            # Spread, so that mails refused together do not come back together.
            pause_seconds = THROTTLED_PAUSE_SECONDS * random.uniform(0.75, 1.25)
            if time.monotonic() + pause_seconds < mail.deadline:
                gevent.sleep(pause_seconds)
            else:
                mail.note_late(place for place, remedy in again.items() if remedy is Remedy.SLOWER)
                again = {place: remedy for place, remedy in again.items() if remedy is not Remedy.SLOWER}
        remedies = set(again.values())
        if remedies:
            mail.narrow(sorted(again))
        if remedies - {Remedy.APART}:
            mail.attempt += 1
            self._retried += 1
        return remedies

    def _next_session(self, mail: _Mail, kept: Session | None, remedies: Collection[Remedy]) -> Session:
        """Return a connection for another transaction: ``kept``, from the last one, if there is time for it.

        Blocks until the mail's deadline at most, and never when one was kept. Raises ``EgressUnavailable``.
        """
        may_pass = self._circuit.is_closed or mail.is_probe
        if kept is not None:
            now = time.monotonic()
            if may_pass and not self._is_too_late(mail.deadline, now):
                return kept
            self._pool.release(kept, now)
        if not may_pass:
            raise EgressUnavailable(self._circuit.reason)
        if kept is not None:
            raise PoolTimeout("no time is left for another transaction")
        if Remedy.SLOWER in remedies:
            return self._connection(len(mail.paths), mail.deadline, is_retry=True)
        waits_since = time.monotonic()
        problem = ""
        try:
            return self._pool.acquire(mail.deadline)
        except EgressUnavailable as error:
            problem = type(error).__name__
            raise
        finally:
            self._note_wait(waits_since, time.monotonic(), problem)

    def _transact(
        self,
        session: Session,
        reverse_path: str,
        paths: tuple[str, ...],
        content: bytes,
        deadline: float,
        commit: Commit | None,
        is_probe: bool,
    ) -> tuple[list[Outcome], Ending | None]:
        """One transaction, and how it ended if not well. The session is given back unless it ``is_kept``."""
        begun_before = session.transactions
        try:
            outcomes = session.transact(reverse_path, paths, content, deadline, commit)
            # Before the session is given back: from then on it is somebody else's.
            ending = session.ending
            began_at = session.began_at
            has_begun = session.transactions != begun_before
            host = session.host
        finally:
            now = time.monotonic()
            if not session.is_kept:
                self._pool.release(session, now)
        took_seconds = now - began_at
        if ending is None:
            self.transaction_seconds.observe(took_seconds)
            self._usual_seconds += (took_seconds - self._usual_seconds) * WEIGHT_OF_THE_LAST
            self._usual_at = now
            self._count_relayed(len(outcomes), now, is_probe)
        else:
            if has_begun and not ending.is_awaiting_dot:
                self.transaction_seconds.observe(took_seconds)
            self._heed(outcomes, ending, now, is_probe)
            if any(outcome.state is State.IN_DOUBT and outcome.said_by is SaidBy.LOCAL for outcome in outcomes):
                # Nobody else has the session: what leaves a mail in doubt breaks it.
                self._guard.mail_in_doubt(session.dot_at, now, is_probe=is_probe)
        if self._follower is not None and has_begun:
            _tell(self._follower, host, outcomes, began_at, now)
        return outcomes, ending

    def _note_wait(self, begun_at: float, ended_at: float, problem: str) -> None:
        self.pool_wait_seconds.observe(ended_at - begun_at)
        if self._follower is not None:
            self._follower.step(WAIT, begun_at, ended_at, problem=problem)

    def _settle_later(self, session: Session, mail: _Mail) -> None:
        self._silence.waits(session, session.dot_at)
        # In the context of the request that this mail is from, for the follower's sake.
        settling = gevent.spawn(contextvars.copy_context().run, self._settle, session, mail)
        self._settling.add(settling)
        settling.link(self._settling.discard)

    def _settle(self, session: Session, mail: _Mail) -> None:
        """Wait on where the caller could not, and tell what became of the mail."""
        try:
            outcomes = session.await_dot()
            ending = session.ending
        finally:
            now = time.monotonic()
            began_at, host = session.began_at, session.host
            self.transaction_seconds.observe(now - began_at)
            self._silence.waits_no_more(session)
            self._pool.release(session, now)
        if self._follower is not None:
            _tell(self._follower, host, outcomes, began_at, now)
        if ending is None:
            self._count_relayed(len(outcomes), now, mail.is_probe)
        else:
            self._heed(outcomes, ending, now, mail.is_probe)
        mail.take(outcomes)
        if mail.on_settled is not None:
            mail.on_settled(mail.outcomes)

    def _heed(self, outcomes: list[Outcome], ending: Ending, now: float, is_probe: bool) -> None:
        """Do what the trouble asks for beyond the mail that met it."""
        heard = {outcome.phase for outcome in outcomes if outcome.said_by is SaidBy.PEER}
        if heard:
            self._guard.heard(now)
        self._guard.heed(ending.trouble, ending.reason, is_probe=is_probe)
        if Phase.DOT in heard:
            self._guard.dot_answered(now)
        is_throttled = ending.trouble.remedy is Remedy.SLOWER or Remedy.SLOWER in ending.again.values()
        if is_throttled and self._rate.throttled(now):
            log.warning("the smarthost is given fewer recipients a second: %r", self._rate)
            self._pacer.rate_changed()
        relayed = sum(outcome.state is State.RELAYED for outcome in outcomes)
        if relayed:
            self._count_relayed(relayed, now, is_probe)

    def _count_relayed(self, recipients: int, now: float, is_probe: bool) -> None:
        self._silence.answered_at = now
        if self._rate.accepted(recipients, now):
            self._pacer.rate_changed()
        if not self._circuit.is_closed:
            self._guard.dot_answered(now, is_probe=is_probe)


class _Mail:
    """One mail and what became of each of its forward-paths so far."""

    __slots__ = (
        "_commit",
        "_places",
        "attempt",
        "content",
        "deadline",
        "forward_paths",
        "is_probe",
        "on_settled",
        "outcomes",
        "paths",
        "reverse_path",
    )

    def __init__(
        self,
        reverse_path: str,
        forward_paths: tuple[str, ...],
        content: bytes,
        deadline: float,
        on_settled: Settled | None,
        commit: Commit | None,
        is_probe: bool,
    ) -> None:
        self.reverse_path = reverse_path
        self.forward_paths = forward_paths
        self.paths = forward_paths
        """Those that the next attempt is for."""
        self.content = content
        self.deadline = deadline
        self.on_settled = on_settled
        self.is_probe = is_probe
        """Whether it may pass an open circuit, to see whether that can be closed."""
        self.attempt = 1
        """Which one is, or was the last. A stale connection does not count, nor does serving some apart from others."""
        self.outcomes: list[Outcome] = []
        """One for each of ``forward_paths``, in their order, once there was an attempt."""
        self._places: list[int] | None = None
        """Where in ``outcomes`` those of ``paths`` stand; None: all, in order."""
        self._commit = commit

    @property
    def commit(self) -> Commit | None:
        """What a transaction for ``paths`` has to ask before it sends the content."""
        commit, places = self._commit, self._places
        if commit is None or places is None:
            return commit
        return lambda accepted: commit([places[place] for place in accepted])

    def take(self, outcomes: list[Outcome]) -> None:
        """Keep what an attempt came to."""
        if self.attempt > 1:
            outcomes = [outcome._replace(attempt=self.attempt) for outcome in outcomes]
        if self._places is None:
            self.outcomes = outcomes
        else:
            self.outcomes = self.outcomes.copy()
            for place, outcome in zip(self._places, outcomes, strict=True):
                self.outcomes[place] = outcome

    def narrow(self, places: Sequence[int]) -> None:
        """Leave for the next attempt only those who stand at ``places`` of the last one's outcomes."""
        before = self._places
        self._places = list(places) if before is None else [before[place] for place in places]
        self.paths = tuple(self.forward_paths[place] for place in self._places)

    def note_late(self, places: Iterable[int]) -> None:
        """No time is left for those at ``places`` of the last attempt's outcomes, who would have had another one."""
        self.outcomes = self.outcomes.copy()
        for place in places:
            at = place if self._places is None else self._places[place]
            self.outcomes[at] = self.outcomes[at]._replace(is_late=True)


def _tell(follower: Follower, host: Host | None, outcomes: list[Outcome], began_at: float, ended_at: float) -> None:
    """Tell of a transaction, by what became of the first recipient who did not get the mail, or else of the first."""
    relayed = sum(outcome.state is State.RELAYED for outcome in outcomes)
    decisive = next((outcome for outcome in outcomes if outcome.state is not State.RELAYED), outcomes[0])
    is_relayed = relayed == len(outcomes)
    follower.step(
        TRANSACTION,
        began_at,
        ended_at,
        problem="" if is_relayed else decisive.state.value,
        host=host.name if host else None,
        port=host.port if host else None,
        phase=None if is_relayed else decisive.phase.value,
        reply_code=decisive.reply_code,
        enhanced_code=decisive.enhanced_code,
        recipients=len(outcomes) if len(outcomes) > 1 else None,
        relayed=relayed if len(outcomes) > 1 else None,
    )


def _outcome_of(error: EgressUnavailable) -> Outcome:
    """What a mail gets that was never begun."""
    if isinstance(error, OpeningFailed):
        return error.outcome
    if isinstance(error, PoolTimeout):
        return _unattempted(LocalFailure.NO_CONNECTION)._replace(is_late=True)
    if isinstance(error, RateTimeout):
        return _unattempted(LocalFailure.NO_ROOM, str(error))._replace(is_late=True)
    if isinstance(error, PoolClosed):
        return _unattempted(LocalFailure.CLOSING)
    return _unattempted(LocalFailure.CIRCUIT_OPEN, str(error))


def _unattempted(failure: LocalFailure, detail: str = "") -> Outcome:
    return failed_here(classify_local(Phase.POOL, failure), Phase.POOL, failure, detail)
