"""The skeleton of a worker: settings, logs, NATS, signals, and the order of shutting down.

A worker gives three things: ``start`` (returns when it serves, or waits inside until it can), ``stop_taking``
and ``finish``. Shutting down goes in this order, since ``nats.drain()`` alone loses what is in flight: stop
the subscriptions, finish what is in hand (records are written, replies published), close the pool, close NATS.

Signals: SIGTERM and SIGINT ask for that. So does SIGHUP, by which others are told to read their settings again: a
worker reads them only when it starts, and supervisord starts again what ended. SIGUSR1 and SIGUSR2, by which others
open their logs again, have no effect: logs go to supervisord. By default each would end it at once, with mail in hand.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import gevent
from gevent.event import Event

from relay.bus.client import Bus
from relay.bus.config import without_password
from relay.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, EXIT_TEMPORARY, ConfigError, EgressUnavailable
from relay.ops.logs import start_logging
from relay.ops.measuring import Measuring
from relay.ops.orders import SettingsGone, drain_seconds, read_settings
from relay.ops.parts import bus_config
from relay.ops.presence import Presence
from relay.ops.readings import bus_reading
from relay.ops.tracing import Tracing, start_tracing
from relay.settings import Settings, adopt, load_settings, unknown_names

log = logging.getLogger("relay.process")

STOP_TAKING_SECONDS = 2.0
LEAST_STOP_TAKING_SECONDS = 0.5
"""Also for who has no time to drain: a request that NATS had sent by then is still to be answered."""
BUS_CLOSE_SECONDS = 3.0
SHUTDOWN_MARGIN_SECONDS = 10
"""What a worker needs at most beyond DRAIN_SECONDS: ending subscriptions, settling what was cut, closing NATS."""
REST_SECONDS = 5.0
"""supervisord starts again at once what ended after its first second: an end that may come again takes its time."""


class Context(NamedTuple):
    """What every worker is given."""

    settings: Settings
    program: str
    bus: Bus
    presence: Presence
    stop: Event
    """Set when the process is asked to stop; every wait in ``start`` honours it."""
    fail: Callable[[str], None]
    """Ends the process in the usual order, with exit code 1: why it cannot go on. Another start may help."""
    measuring: Measuring
    tracing: Tracing | None = None
    """None when traces are off."""


class Worker(Protocol):
    """One program's work."""

    def start(self) -> None:
        """Serves as soon as it can. May block until then; returns early when ``stop`` is set.

        Raises ``EgressUnavailable`` when the process shall end and be started again later (exit 75), ``ConfigError``
        when starting it again changes nothing (exit 78).
        """

    def stop_taking(self, timeout_seconds: float) -> None:
        """Ends the subscriptions, at most this long."""

    def finish(self, timeout_seconds: float) -> None:
        """Finishes what is in hand, at most this long and a moment to settle what was cut; keeps only the bus."""


def run(program: str, build: Callable[[Context], Worker]) -> NoReturn:
    """Runs a worker until SIGTERM, SIGINT or SIGHUP; a second one of the first two means now. Never returns.

    The program's name may be given as first argument (``send-2``), a file whose settings replace the environment's as
    second. Exits 0 after an orderly stop, 78 on bad settings, 75 when the worker gave up for now, 1 when it could not
    go on.
    """
    program = sys.argv[1] if len(sys.argv) > 1 else program
    try:
        if len(sys.argv) > 2:
            adopt(read_settings(Path(sys.argv[2])))
        settings = load_settings()
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG)
    except SettingsGone as error:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
    start_logging(settings, program)
    for name in unknown_names():
        log.warning("the setting %s is not known and has no effect", name)
    sys.exit(_run(settings, program, build))


def _run(settings: Settings, program: str, build: Callable[[Context], Worker]) -> int:
    stop, asked = Event(), Event()
    _stop_on_signals(stop, asked)
    presence = Presence(settings.relay_state_dir, program)
    measuring = Measuring(settings.relay_state_dir, program)
    exit_codes: list[int] = []

    def end(why: str, exit_code: int) -> None:
        if not exit_codes and not stop.is_set():
            log.error("%s", why)
            presence.failed(why, exit_code)
            exit_codes.append(exit_code)
        stop.set()

    def on_bus_change(is_connected: bool, why: str) -> None:
        presence.lacks("nats", "" if is_connected else f"NATS at {without_password(settings.nats_url)}: {why}")

    presence.lacks("nats", f"NATS at {without_password(settings.nats_url)}: connecting")
    bus_deaths: list[str] = []

    def on_bus_death() -> None:
        bus_deaths.append(program)
        stop.set()

    bus = Bus(bus_config(settings), f"relay {program}", on_bus_change, on_bus_death)
    tracing = start_tracing(settings, program, lambda why: presence.note("tracing", why))
    try:
        worker = build(
            Context(settings, program, bus, presence, stop, lambda why: end(why, EXIT_FAILED), measuring, tracing)
        )
    except ConfigError as error:
        log.error("%s", error)
        presence.failed(str(error), EXIT_CONFIG)
        return EXIT_CONFIG
    measuring.also(lambda: presence.write_again(gevent.get_hub().threadpool.apply))
    measuring.add(lambda: bus_reading(program.partition("-")[0], bus))
    measuring.start()
    bus.start()
    starting = gevent.spawn(_start, worker, bus, presence, stop, lambda why: end(why, EXIT_CONFIG))
    starting.link_exception(lambda _: stop.set())
    stop.wait()
    failure = starting.exception
    starting.kill(timeout=1)
    _shut_down(worker, bus, presence, drain_seconds(settings.relay_state_dir, settings.drain_seconds))
    measuring.stop()
    if tracing is not None:
        tracing.close()
    if isinstance(failure, EgressUnavailable) or bus_deaths:
        return EXIT_TEMPORARY
    if exit_codes:
        asked.wait(REST_SECONDS)
        return exit_codes[0]
    return EXIT_OK if failure is None else EXIT_FAILED


def _start(worker: Worker, bus: Bus, presence: Presence, stop: Event, misconfigured: Callable[[str], None]) -> None:
    while not bus.wait_connected(1.0):
        if stop.is_set():
            return
    try:
        worker.start()
    except ConfigError as error:
        misconfigured(str(error))
    if not stop.is_set():
        presence.lacks("start", "")
        log.info("ready")


def _shut_down(worker: Worker, bus: Bus, presence: Presence, patience_seconds: float) -> None:
    """Takes ``patience_seconds``, one record's time and less than ``SHUTDOWN_MARGIN_SECONDS`` more, whatever hangs."""
    deadline = time.monotonic() + patience_seconds
    log.info("stopping: no more requests are taken")
    presence.draining()
    worker.stop_taking(max(LEAST_STOP_TAKING_SECONDS, min(STOP_TAKING_SECONDS, patience_seconds)))
    worker.finish(max(0.0, deadline - time.monotonic()))
    bus.close(BUS_CLOSE_SECONDS)
    log.info("stopped")


def _stop_on_signals(stop: Event, asked: Event) -> None:
    def ask() -> None:
        if asked.is_set():
            os._exit(1)
        asked.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, ask)
    # Not counted as asked: who sends it and then SIGTERM, or sends it twice, does not mean now.
    gevent.signal_handler(signal.SIGHUP, stop.set)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        gevent.signal_handler(number, log.info, "%s has no effect here", number.name)
