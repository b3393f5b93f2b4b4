"""Relay's own ``Smarthost`` against a server that is far away, over TLS: the first second, and then the steady rate.

Prints one JSON object. ``first_second`` are the mails relayed in the first second, with no connection open before;
``all_open_ms`` is when every caller had its first mail relayed. ``rate`` is mails a second in the window of
``--seconds`` that begins when the first second is over and every connection is open, ``cpu_us`` our CPU for each of
them, ``opened_in_window`` the connections that had to be opened in it. ``sent`` and ``relayed`` count all mails.
"""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import argparse
import json
import time

import gevent
import gevent.event
from contest import FORWARD_PATH, MAIL_SECONDS, REVERSE_PATH, content_of
from ours import config_for

from relay.delivery.outcome import State
from relay.delivery.smarthost import Smarthost

LONGEST_OPENING_SECONDS = 20.0


class Callers:
    """As many greenlets as connections, each hands over one mail after another until told to stop."""

    def __init__(self, smarthost: Smarthost, count: int, content: bytes) -> None:
        self.sent = 0
        self.relayed = 0
        self._count = count
        self._served = 0
        self._smarthost = smarthost
        self._content = content
        self._is_stopping = False
        self.all_served = gevent.event.Event()
        self._callers = [gevent.spawn(self._call) for _ in range(count)]

    def _call(self) -> None:
        is_first = True
        while not self._is_stopping:
            self.sent += 1
            until = time.monotonic() + MAIL_SECONDS
            [outcome] = self._smarthost.relay(REVERSE_PATH, (FORWARD_PATH,), self._content, until)
            if outcome.state is not State.RELAYED:
                raise SystemExit(f"a mail was not relayed: {outcome}")
            self.relayed += 1
            if is_first:
                is_first = False
                self._served += 1
                if self._served == self._count:
                    self.all_served.set()

    def stop(self) -> None:
        """Let everyone finish the mail at hand."""
        self._is_stopping = True
        gevent.joinall(self._callers, timeout=MAIL_SECONDS, raise_error=True)


def main() -> None:
    """Parses options, sends, prints."""
    parser = argparse.ArgumentParser(description="Relay's SMTP layer and a server far away")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--ca-file", required=True)
    options = parser.parse_args()
    config = config_for(options.port, options.connections, tls="implicit", ca_file=options.ca_file)
    smarthost = Smarthost(config)
    begun = time.monotonic()
    callers = Callers(smarthost, options.connections, content_of(options.size))
    first_second: list[int] = []
    gevent.spawn_later(1.0, lambda: first_second.append(callers.relayed))
    if not callers.all_served.wait(LONGEST_OPENING_SECONDS):
        raise SystemExit(f"not every connection is open: {smarthost.figures()}")
    all_open_ms = (time.monotonic() - begun) * 1000
    gevent.sleep(max(0.0, begun + 1.1 - time.monotonic()))
    opened = int(smarthost.figures()["connections_opened"])
    relayed, cpu_begun, window_begun = callers.relayed, time.process_time(), time.monotonic()
    gevent.sleep(options.seconds)
    seconds = time.monotonic() - window_begun
    mails = callers.relayed - relayed
    cpu_seconds = time.process_time() - cpu_begun
    opened_in_window = int(smarthost.figures()["connections_opened"]) - opened
    callers.stop()
    smarthost.close(time.monotonic() + 5.0)
    measured = {
        "rate": mails / seconds,
        "cpu_us": cpu_seconds / max(1, mails) * 1e6,
        "opened_in_window": opened_in_window,
        "first_second": first_second[0],
        "all_open_ms": all_open_ms,
        "sent": callers.sent,
        "relayed": callers.relayed,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
