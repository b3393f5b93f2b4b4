"""Keeps mail away from a smarthost that serves nobody, and notices when it serves again.

Owns when the circuit opens, who probes and how long to wait in between, and how the pool reacts to a smarthost that
wants fewer connections. ``circuit`` has the states, ``trouble`` judges, ``pool`` and ``dialling`` connect.

A connection that cannot be opened opens the circuit only when no other one lives; while others do, they show that the
smarthost serves us, so only dialling pauses. But those of a smarthost that hangs live, too: a dial that waited in vain
while nothing was heard on any connection opens it as well. A refusal after MAIL that concerns all mail opens it at
once. So does silence, as ``silence`` has it: a smarthost that answers no content would leave every mail in doubt.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import gevent
from gevent.event import Event

from relay.delivery.circuit import Circuit
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import Dialler, LoginRefused, OpeningFailed
from relay.delivery.outcome import SaidBy
from relay.delivery.pool import Pool
from relay.delivery.session import Session
from relay.delivery.silence import Silence
from relay.delivery.trouble import Probe, Radius, Remedy, Trouble
from relay.errors import EgressUnavailable
from relay.redaction import without_addresses

log = logging.getLogger("relay.delivery")

CONNECT_CAP_SECONDS: Final = 1.5
"""Between probes after connecting failed: a smarthost that is back is used again within 2 s."""
REFUSAL_CAP_SECONDS: Final = 30.0
"""Between probes after a refusal by rule (credentials, quota): asking often may get us locked out."""
DIAL_PAUSE_SECONDS: Final = 1.0
"""Without a new dial after one failed while other connections live."""
IN_VAIN_SECONDS: Final = 1.0
"""A dial that took so long to fail was not refused: it waited for something that did not come."""


class Guard:
    """The way to the smarthost's connections, which it closes while there is no use in trying."""

    def __init__(
        self, config: SmarthostConfig, default_sender: str, on_open: Callable[[EgressUnavailable], None]
    ) -> None:
        """``on_open`` is called when the circuit opens, with what those are to be told who wait elsewhere.

        Raises ``ConfigError`` when the TLS settings cannot be used.
        """
        self._dialler = Dialler(config, default_sender)
        self.circuit = Circuit()
        self.pool = Pool(config, self._open_session, self._dial_failed)
        self._on_open = on_open
        self._prober: Any = None
        self._closing = Event()
        self._opened = 0
        self.silence = Silence()
        self._heard_at = 0.0
        """When a new connection was last greeted, or a mail refused, on ``time.monotonic()``."""

    def begin_mail_probe(self) -> bool:
        """Let this one mail pass, when only a mail can show that the smarthost is well and it is time to try.

        Not when there is no connection for it: it would wait, and be no wiser. ``end_mail_probe`` must follow.
        """
        if self.circuit.probe is Probe.NOOP or not self.pool.state.has_room:
            return False
        return self.circuit.begin_probe(time.monotonic())

    def end_mail_probe(self) -> None:
        """The mail is done; unless it closed the circuit, the next may try after a while."""
        self.circuit.probe_void(time.monotonic())

    def heard(self, now: float) -> None:
        """The smarthost said something of a mail."""
        self._heard_at = now

    def dot_answered(self, now: float, *, is_probe: bool = False) -> None:
        """A final dot was answered, however late. ``is_probe``: it was the probe's, and the mail was relayed."""
        self.silence.answered_at = now
        if self.circuit.is_closed:
            return
        if self.circuit.probe is Probe.DOT or (is_probe and self.circuit.probe is Probe.MAIL):
            self._close_circuit()

    def mail_in_doubt(self, dot_at: float, now: float, *, is_probe: bool) -> None:
        """A mail whose final dot was sent at ``dot_at`` has no answer."""
        self.silence.doubt(dot_at, now)
        if is_probe:
            self.circuit.probe_failed(self.circuit.reason, now)
        self.look_for_silence(now)

    def look_for_silence(self, now: float) -> None:
        """Open the circuit when the smarthost takes mails and answers none."""
        if not self.circuit.is_closed or self._closing.is_set():
            return
        seconds = self.silence.seconds(self.pool.state.limit, now)
        if seconds:
            reason = f"it takes mails and has answered none for {seconds:.0f} s"
            self.circuit.open(reason, Probe.DOT, now, REFUSAL_CAP_SECONDS)
            log.error("the smarthost is set aside, all mail is deferred: %s", reason)
            self._turn_away(EgressUnavailable(reason))

    def heed(self, trouble: Trouble, reason: str, *, is_probe: bool) -> None:
        """Do what the trouble in a transaction means for all the others; ``reason`` is one line for people."""
        if trouble.remedy is Remedy.FEWER:
            self._shrink()
        if trouble.radius is not Radius.SMARTHOST:
            return
        now = time.monotonic()
        if self.circuit.is_closed:
            self.circuit.open(reason, trouble.probe or Probe.MAIL, now, REFUSAL_CAP_SECONDS)
            log.error("the smarthost is set aside, all mail is deferred: %s", without_addresses(reason))
        elif is_probe:
            self.circuit.probe_failed(reason, now, trouble.probe)
        self._turn_away(EgressUnavailable(reason))

    def figures(self) -> dict[str, Any]:
        """Numbers and words for status pages and logs."""
        state = self.pool.state
        return {
            "idle": len(state.idle),
            "busy": len(state.busy) + len(state.reserved),
            "dialling": state.dialling,
            "waiting": len(state.waiters),
            "max": state.size,
            "limit": state.limit,
            "connections_opened": self._opened,
            "hosts": self._dialler.hosts.figures(),
            "circuit": self.circuit.state.value,
            "circuit_reason": self.circuit.reason,
        }

    def close(self, deadline: float) -> None:
        """Refuse who waits, let what is busy finish until ``deadline``, then cut it. Blocks no longer than that."""
        self._closing.set()
        self.pool.close(deadline)
        if self._prober is not None:
            self._prober.kill()

    def _open_session(self) -> Session:
        """Dial for the pool. While the circuit is open this is the probe, and only a 250 to NOOP closes it."""
        begun_at = time.monotonic()
        try:
            if self.circuit.is_closed:
                session = self._try_host_again() or self._dialler.dial()
            else:
                session = self._dialler.probe()
                if self.circuit.probe is Probe.NOOP and not self.circuit.is_closed:
                    self._close_circuit()
        except OpeningFailed as error:
            now = time.monotonic()
            is_in_vain = error.outcome.said_by is SaidBy.LOCAL and now - begun_at >= IN_VAIN_SECONDS
            if is_in_vain and max(self._heard_at, self.silence.answered_at) < begun_at and self.circuit.is_closed:
                self._set_aside(error, now)
            raise
        self._heard_at = time.monotonic()
        self._opened += 1
        return session

    def _try_host_again(self) -> Session | None:
        """See whether a host that was set aside works again, best with a connection that no mail waits for."""
        host = self._dialler.hosts.begin_trial(time.monotonic())
        if host is None or self.pool.dial_aside(partial(self._open_trial, host)):
            return None
        # The pool is full: this dial is the trial. Whoever waits is served by others too.
        with contextlib.suppress(OpeningFailed):
            return self._dialler.dial_host(host)
        return None

    def _open_trial(self, host: Host) -> Session:
        session = self._dialler.dial_host(host)
        self._opened += 1
        return session

    def _close_circuit(self) -> None:
        """Let everyone pass again."""
        self.circuit.close()
        self.silence.forget_doubts()
        log.info("the smarthost takes mail again")

    def _dial_failed(self, error: EgressUnavailable) -> None:
        state = self.pool.state
        if state.living and isinstance(error, OpeningFailed) and error.trouble.remedy is Remedy.FEWER:
            self._shrink()
        if state.living or state.dialling:
            # Others live, or may in a moment: they serve those who wait.
            self.pool.hold_dials(DIAL_PAUSE_SECONDS)
            return
        self._set_aside(error, time.monotonic())

    def _set_aside(self, error: EgressUnavailable, now: float) -> None:
        """No connection can be had: open the circuit, or leave it open, and probe."""
        reason = error.outcome.detail if isinstance(error, OpeningFailed) else str(error)
        if self.circuit.is_closed:
            is_refusal = isinstance(error, LoginRefused)
            self.circuit.open(reason, Probe.NOOP, now, REFUSAL_CAP_SECONDS if is_refusal else CONNECT_CAP_SECONDS)
            log.error("the smarthost is set aside, all mail is deferred: %s", without_addresses(reason))
        else:
            self.circuit.probe_failed(reason, now)
        self._turn_away(error)
        self._start_probing()

    @property
    def _is_waiting_for_connection(self) -> bool:
        return not self.circuit.is_closed and self.circuit.probe is Probe.NOOP

    def _shrink(self) -> None:
        limit_before = self.pool.state.limit
        self.pool.shrink()
        if self.pool.state.limit < limit_before:
            log.warning("the smarthost wants fewer connections: %d at most for now", self.pool.state.limit)

    def _turn_away(self, error: EgressUnavailable) -> None:
        self.pool.refuse_waiters(error)
        self._on_open(error)

    def _start_probing(self) -> None:
        if self.circuit.probe is Probe.NOOP and self._prober is None and not self._closing.is_set():
            self._prober = gevent.spawn(self._probe)

    def _probe(self) -> None:
        """Try to connect, ever less often, until it works."""
        try:
            while self._is_waiting_for_connection:
                if self._closing.wait(self.circuit.seconds_to_probe(time.monotonic())):
                    return
                if self._is_waiting_for_connection and self.circuit.begin_probe(time.monotonic()):
                    try:
                        # _open_session closes the circuit, _dial_failed puts the next probe off.
                        self.pool.probe()
                    finally:
                        self.circuit.probe_void(time.monotonic())
        finally:
            self._prober = None
