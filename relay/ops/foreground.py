"""The relay in the foreground: supervisord as a child of this process, which may be PID 1 of a container."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
import xmlrpc.client
from collections.abc import Callable

from relay.errors import EXIT_FAILED, EXIT_OK
from relay.ops.supervision import ProgramStatus, Supervision, SupervisionError, cannot_work

WATCH_SECONDS = 0.5
PIPE_BYTES = select.PIPE_BUF


def stay(
    supervision: Supervision,
    command: list[str],
    environment: dict[str, str],
    when_up: Callable[[], None] = lambda: None,
) -> int:
    """Runs supervisord as a child until it ends; the exit code for this process.

    Passes its output on (standard output may be a socket, which the programs could not open again), makes SIGTERM
    and its like an orderly stop, reaps orphans, and ends everything when a program can never work: 78 when that
    one exited 78, else 1. Not so while ``relayctl`` changes what runs: what does not work then, it takes back.
    ``when_up`` is called once supervisord answers.
    """
    reader, writer = os.pipe()
    child = subprocess.Popen(
        command, env=environment, stdout=writer, stderr=writer, start_new_session=True
    )  # a session of its own: Ctrl-C reaches us alone
    os.close(writer)
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: asked.append(True))
    failure = EXIT_OK
    is_stopping = is_up = False
    while True:
        _pass_on(reader, WATCH_SECONDS)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child.pid:
            _pass_on(reader, 0)
            return failure or os.waitstatus_to_exitcode(status)
        if not is_up and _answers(supervision):
            is_up = True
            when_up()
        if failure == EXIT_OK and not is_stopping and not supervision.is_being_changed():
            failure = _hopeless_exit_code(supervision)
        if (asked or failure != EXIT_OK) and not is_stopping:
            is_stopping = True
            with contextlib.suppress(OSError, xmlrpc.client.Error, SupervisionError):
                supervision.begin_draining()
            child.send_signal(signal.SIGTERM)


def _answers(supervision: Supervision) -> bool:
    try:
        return supervision.is_running()
    except SupervisionError:  # not yet
        return False


def _hopeless_exit_code(supervision: Supervision) -> int:
    """0 while every program may yet work."""
    try:
        statuses = supervision.statuses()
        hopeless = next((each for each in statuses if _is_hopeless(each)), None)
        if hopeless is None or supervision.is_being_changed():  # it may have begun to be since that was looked at
            return EXIT_OK
    except SupervisionError:  # supervisord is starting, or ending
        return EXIT_OK
    print(f"relayctl: {hopeless.name} can never work like this; see what it said above", flush=True)
    return (hopeless.report.exit_code if hopeless.report is not None else 0) or EXIT_FAILED


def _is_hopeless(status: ProgramStatus) -> bool:
    """Stopped is what somebody wanted to be stopped."""
    return cannot_work(status) and status.state != "STOPPED"


def _pass_on(reader: int, timeout_seconds: float) -> None:
    """Copies what arrives in time to standard output; drops what nobody there takes: mail must not wait for it."""
    deadline = time.monotonic() + timeout_seconds
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, PIPE_BYTES)
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [1], [], max(0.0, deadline - time.monotonic()))[1]:
                os.write(1, chunk)  # at most PIPE_BYTES, which a pipe that takes any takes whole
        if not chunk or time.monotonic() >= deadline:
            return
