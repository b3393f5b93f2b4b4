"""Is the smarthost there, and does it take us? Asked at start-up and by ``relayctl check``.

Owns the wording of what to do about it. The dialogue itself is ``dialling``'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, Protocol

from gevent import Timeout

from relay.delivery.config import SmarthostConfig
from relay.delivery.dialling import Dialler, LoginRefused, NotConnected, OpeningFailed
from relay.delivery.outcome import Phase
from relay.delivery.trouble import LocalFailure, classify_local, failed_here

TRIES: Final = 11
PAUSE_SECONDS: Final = 2.0
PING_TIMEOUT_SECONDS: Final = 12.0
"""For one host; more than any one phase has by default, so that the phase that hangs is named."""

_ADVICE: Final = {
    Phase.CONNECT: "check SMTP_HOST and SMTP_PORT, and that the server runs and can be reached from here",
    Phase.BANNER: "check that SMTP_PORT is an SMTP port, and whether it speaks TLS from the start (SMTP_TLS=implicit)",
    Phase.EHLO: "check SMTP_HELO_NAME, and whether this machine may use the server",
    Phase.STARTTLS: "check that the certificate is for SMTP_HOST, SMTP_CA_FILE and SMTP_TLS",
    Phase.AUTH: "check SMTP_TLS and how the server wants users to log in",
    Phase.NOOP: "look into the server's own logs",
}


class StopEvent(Protocol):
    """``gevent.event.Event`` or a patched ``threading.Event``."""

    def wait(self, timeout: float | None = None, /) -> object:
        """Wait until the event is set or ``timeout`` seconds are over; true when it is set."""


def ping(config: SmarthostConfig, timeout_seconds: float = PING_TIMEOUT_SECONDS) -> None:
    """Connect, EHLO, TLS and AUTH as configured, NOOP, QUIT; with the next host when one fails.

    Blocks for ``timeout_seconds`` a host at most, and ``quit_seconds`` for the goodbye. Raises ``NotConnected`` or
    ``LoginRefused`` (both ``EgressUnavailable``) with one sentence that says what to do, a sentence for each host where
    there are several, and ``ConfigError`` for unusable TLS settings.
    """
    errors: list[OpeningFailed] = []
    for host in config.hosts:
        try:
            _ping_host(dataclasses.replace(config, hosts=(host,)), timeout_seconds)
        except OpeningFailed as error:
            errors.append(error)
        else:
            return
    first = errors[0]
    raise type(first)("; ".join(map(str, errors)), first.outcome, first.trouble) from first


def _ping_host(config: SmarthostConfig, timeout_seconds: float) -> None:
    dialler = Dialler(config)
    timeout = Timeout(timeout_seconds)
    try:
        with timeout:
            session = dialler.probe()
    except Timeout as expired:
        if expired is not timeout:
            raise
        raise _no_answer(config, timeout_seconds) from expired
    except OpeningFailed as error:
        raise type(error)(f"{error}: {_advice(error)}", error.outcome, error.trouble) from error
    session.quit(config.timeouts.quit_seconds)


def wait_for_smtp(
    config: SmarthostConfig,
    on_failure: Callable[[int, OpeningFailed], None],
    stop: StopEvent,
    *,
    tries: int = TRIES,
    pause_seconds: float = PAUSE_SECONDS,
    timeout_seconds: float = PING_TIMEOUT_SECONDS,
) -> bool:
    """Ping until it works, ``tries`` times with ``pause_seconds`` in between.

    Returns true when the smarthost is ready and false as soon as ``stop`` is set. ``on_failure`` is called with the
    number of the try, from 1, and its error; the last error is raised too.
    """
    for number in range(1, tries + 1):
        try:
            ping(config, timeout_seconds)
        except OpeningFailed as error:
            on_failure(number, error)
            if number == tries:
                raise
        else:
            return True
        if stop.wait(pause_seconds):
            return False
    return False


def _advice(error: OpeningFailed) -> str:
    if isinstance(error, LoginRefused):
        return "check SMTP_USERNAME and SMTP_PASSWORD"
    return _ADVICE[error.outcome.phase]


def _no_answer(config: SmarthostConfig, timeout_seconds: float) -> NotConnected:
    trouble = classify_local(Phase.CONNECT, LocalFailure.TIMEOUT)
    outcome = failed_here(trouble, Phase.CONNECT, LocalFailure.TIMEOUT)
    text = f"{config.hosts[0]} did not answer within {timeout_seconds:g} s: {_ADVICE[Phase.CONNECT]}"
    return NotConnected(text, outcome, trouble)
