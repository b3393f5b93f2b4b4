"""Three real nats-servers in a cluster, with the tracking's streams on one of them or on all.

The one that may be frozen: requests reach the relay through the others meanwhile: JetStream hangs and NATS goes on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import gevent

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.errors import BusRefused, BusUnavailable
from relay.tracking import storage
from tests.support.nats_server import NatsServer, free_port

SERVERS = 3
READY_SECONDS = 30.0
ASK_SECONDS = 1.0
STORING = "s2"
"""The server that holds the streams, by its tag."""


class NatsCluster:
    """``url`` is a server that leads no stream; ``freeze`` and ``thaw`` are for the one that does.

    ``replicas``: how many servers hold each stream; 1 or all.
    """

    def __init__(self, directory: Path, replicas: int = 1) -> None:
        self._config = storage.StorageConfig(replicas=replicas)
        ports = [free_port() for _ in range(SERVERS)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        self.servers = [
            NatsServer(
                directory / f"s{number}",
                config=f'server_name: s{number}\nserver_tags: ["s{number}"]\n'
                f'cluster {{ name: tests, listen: "127.0.0.1:{port}", routes: [{routes}] }}',
            )
            for number, port in enumerate(ports)
        ]
        """``s0`` and so on, in this order."""
        self._storing = self.servers[-1]
        self.url = self.servers[0].url

    def start(self) -> NatsCluster:
        """Starts the servers; returns when bucket and log are made, and led by the last of them."""
        for server in self.servers:
            server.start()
        bus = Bus(self.url, "making streams")
        bus.start()
        try:
            if not bus.wait_connected(10):
                raise TimeoutError(f"NATS: {bus.last_error}")
            self._make_streams(JetStream(bus, ASK_SECONDS))
        finally:
            bus.close()
        return self

    def _make_streams(self, jetstream: JetStream) -> None:
        deadline = time.monotonic() + READY_SECONDS
        placed = {"placement": {"tags": [STORING]}} if self._config.replicas == 1 else {}
        for stream in (storage._bucket(self._config), storage._log(self._config)):
            while True:  # the servers elect a leader first
                try:
                    jetstream.api(f"STREAM.CREATE.{stream['name']}", stream | placed)
                    break
                except (BusUnavailable, BusRefused):
                    if time.monotonic() > deadline:
                        raise
                    gevent.sleep(0.05)
        for name in (contract.LOG_STREAM, f"KV_{contract.RECIPIENTS_BUCKET}"):
            while (leader := _leader(jetstream, name)) != STORING:
                if not leader and time.monotonic() < deadline:
                    gevent.sleep(0.05)  # a new stream, too, elects one
                elif placed or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} is on {leader}")
                else:
                    _step_down(jetstream, name)
                    gevent.sleep(0.2)

    def freeze(self) -> None:
        """Stops the server that holds the streams; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._storing.process is not None and self._storing.process.poll() is None:
            os.kill(self._storing.process.pid, number)

    def stop(self) -> None:
        """Ends the servers."""
        self.thaw()
        for server in self.servers:
            server.stop()


def _leader(jetstream: JetStream, stream: str) -> str:
    """The server that leads a stream, '' when none does."""
    try:
        return str(jetstream.api(f"STREAM.INFO.{stream}")["cluster"].get("leader", ""))
    except (BusUnavailable, BusRefused):
        return ""


def _step_down(jetstream: JetStream, stream: str) -> None:
    """Has the storing server lead a stream that all of them hold."""
    try:
        jetstream.api(f"STREAM.LEADER.STEPDOWN.{stream}", {"placement": {"preferred": STORING}})
    except (BusUnavailable, BusRefused):
        return  # it is asked for again
