"""The smarthost as the jobs see it: one call hands a mail over and always answers with outcomes.

Owns the attempt (a stale connection is replaced, RFC 5321 leaves that to the client), and the circuit: when it opens,
who probes, and how long to wait in between. ``trouble`` judges, ``pool`` has the connections.

A connection that cannot be opened opens the circuit only when no other one lives; while others do, they show that the
smarthost serves us, so only dialling pauses. A refusal after MAIL that concerns all mail opens it at once.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import gevent
from gevent.event import Event

from relay.delivery.circuit import Circuit
from relay.delivery.config import SmarthostConfig
from relay.delivery.dialling import Dialler, LoginRefused, OpeningFailed
from relay.delivery.outcome import Outcome, Phase, State
from relay.delivery.pool import Pool
from relay.delivery.session import Session
from relay.delivery.trouble import LocalFailure, Probe, Radius, Trouble, classify_local, failed_here
from relay.errors import EgressUnavailable, PoolClosed, PoolTimeout
from relay.redaction import without_addresses

log = logging.getLogger("relay.delivery")

CONNECT_CAP_SECONDS: Final = 1.5
"""Between probes after connecting failed: a smarthost that is back is used again within 2 s."""
REFUSAL_CAP_SECONDS: Final = 30.0
"""Between probes after a refusal by rule (credentials, quota): asking often may get us locked out."""
DIAL_PAUSE_SECONDS: Final = 1.0
"""Without a new dial after one failed while other connections live."""


class Smarthost:
    """Hands mails over to one smarthost. Any number of greenlets of one thread may use it."""

    def __init__(self, config: SmarthostConfig, *, default_sender: str = "") -> None:
        """``default_sender`` is the reverse-path of mails that name no sender; connects only when first needed.

        Raises ``ConfigError`` when the TLS settings cannot be used.
        """
        self._config = config
        self._dialler = Dialler(config, default_sender)
        self._circuit = Circuit()
        self._pool = Pool(config, self._open_session, self._dial_failed)
        self._prober: Any = None
        self._closing = Event()
        self._opened = 0
        self._stale_replaced = 0

    def relay(
        self, reverse_path: str, forward_paths: tuple[str, ...], content: bytes, deadline: float
    ) -> list[Outcome]:
        """Hand one mail over; return one outcome per forward-path, in the same order.

        ``content`` has CRLF line ends and is not dot-stuffed. Up to the final dot this takes no longer than until
        ``deadline`` (``time.monotonic()``); the dot's reply has ``dot_timeout_seconds`` of its own. Raises nothing for
        what SMTP or the network does.
        """
        if self._circuit.is_closed:
            return self._attempt(reverse_path, forward_paths, content, deadline)
        is_probe = self._circuit.probe is Probe.MAIL and self._circuit.begin_probe(time.monotonic())
        if not is_probe:
            return [_unattempted(LocalFailure.CIRCUIT_OPEN, self._circuit.reason)] * len(forward_paths)
        try:
            outcomes = self._attempt(reverse_path, forward_paths, content, deadline)
            if any(outcome.state is State.RELAYED for outcome in outcomes):
                self._close_circuit()
            return outcomes
        finally:
            self._circuit.probe_void(time.monotonic())

    def figures(self) -> dict[str, int | str]:
        """Numbers and words for status pages and logs."""
        state = self._pool.state
        return {
            "idle": len(state.idle),
            "busy": len(state.busy) + len(state.reserved),
            "dialling": state.dialling,
            "waiting": len(state.waiters),
            "max": state.size,
            "connections_opened": self._opened,
            "stale_replaced": self._stale_replaced,
            "circuit": self._circuit.state.value,
            "circuit_reason": self._circuit.reason,
        }

    def close(self, deadline: float) -> None:
        """Refuse who waits, let what is busy finish until ``deadline``, then cut it. Blocks no longer than that."""
        self._closing.set()
        self._pool.close(deadline)
        if self._prober is not None:
            self._prober.kill()

    def _attempt(
        self, reverse_path: str, forward_paths: tuple[str, ...], content: bytes, deadline: float
    ) -> list[Outcome]:
        """Use connections until one is not stale; a stale one has been told nothing, so the mail cannot be doubled."""
        pool = self._pool
        # Each stale connection leaves the pool, so after all of them comes a fresh one, which cannot be stale.
        for _ in range(self._config.pool_size + 1):
            try:
                session = pool.acquire(deadline)
            except EgressUnavailable as error:
                return [_outcome_of(error)] * len(forward_paths)
            try:
                outcomes = session.transact(reverse_path, forward_paths, content, deadline)
                trouble = session.trouble
                is_stale = session.is_stale
            finally:
                pool.release(session, is_reusable=session.is_reusable)
            if trouble is None:
                return outcomes
            if is_stale:
                self._stale_replaced += 1
                continue
            if trouble.radius is Radius.SMARTHOST:
                self._open_circuit(outcomes, trouble)
            return outcomes
        return outcomes

    def _open_session(self) -> Session:
        """Dial for the pool. While the circuit is open this is the probe, and only a 250 to NOOP closes it."""
        if self._circuit.is_closed:
            session = self._dialler.dial()
        else:
            session = self._dialler.probe()
            if self._circuit.probe is Probe.NOOP:
                self._close_circuit()
        self._opened += 1
        return session

    def _dial_failed(self, error: EgressUnavailable) -> None:
        state = self._pool.state
        if state.living or state.dialling:
            # Others live, or may in a moment: they serve those who wait.
            self._pool.hold_dials(DIAL_PAUSE_SECONDS)
            return
        now = time.monotonic()
        reason = _outcome_of(error).detail
        if self._circuit.is_closed:
            is_refusal = isinstance(error, LoginRefused)
            self._circuit.open(reason, Probe.NOOP, now, REFUSAL_CAP_SECONDS if is_refusal else CONNECT_CAP_SECONDS)
            log.error("the smarthost is set aside, all mail is deferred: %s", without_addresses(reason))
        else:
            self._circuit.probe_failed(reason, now)
        self._pool.refuse_waiters(error)
        self._start_probing()

    def _open_circuit(self, outcomes: list[Outcome], trouble: Trouble) -> None:
        """All mail would meet the same: defer everyone until a real mail gets through again."""
        detail = next(outcome.detail for outcome in outcomes if outcome.state is not State.RELAYED)
        now = time.monotonic()
        if self._circuit.is_closed:
            self._circuit.open(detail, trouble.probe or Probe.MAIL, now, REFUSAL_CAP_SECONDS)
            log.error("the smarthost is set aside, all mail is deferred: %s", without_addresses(detail))
        else:
            self._circuit.probe_failed(detail, now)
        self._pool.refuse_waiters(EgressUnavailable(detail))

    def _close_circuit(self) -> None:
        self._circuit.close()
        log.info("the smarthost takes mail again")

    def _start_probing(self) -> None:
        if self._circuit.probe is Probe.NOOP and self._prober is None and not self._closing.is_set():
            self._prober = gevent.spawn(self._probe)

    def _probe(self) -> None:
        """Try to connect, ever less often, until it works."""
        try:
            while not self._circuit.is_closed:
                if self._closing.wait(self._circuit.seconds_to_probe(time.monotonic())):
                    return
                if self._circuit.begin_probe(time.monotonic()):
                    # _open_session closes the circuit, _dial_failed puts the next probe off.
                    self._pool.probe()
                    self._circuit.probe_void(time.monotonic())
        finally:
            self._prober = None


def _outcome_of(error: EgressUnavailable) -> Outcome:
    """What a mail gets that was never begun."""
    if isinstance(error, OpeningFailed):
        return error.outcome
    if isinstance(error, PoolTimeout):
        return _unattempted(LocalFailure.NO_CONNECTION)
    if isinstance(error, PoolClosed):
        return _unattempted(LocalFailure.CLOSING)
    return _unattempted(LocalFailure.CIRCUIT_OPEN, str(error))


def _unattempted(failure: LocalFailure, detail: str = "") -> Outcome:
    return failed_here(classify_local(Phase.POOL, failure), Phase.POOL, failure, detail)
