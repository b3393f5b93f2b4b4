"""What every drill shares: the stage it plays on, and what it found out.

A drill is one function, ``play(stage, seconds) -> Findings``: it starts what it needs on the stage, makes trouble for
about ``seconds``, and states figures and checks. ``run`` shows them and ends everything that is on the stage.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from tests.support.nats_server import NatsServer
from tests.support.relay_process import RelayProcess

T = TypeVar("T")

STATUS_TRIES = 5


class Check(NamedTuple):
    """What a drill says must hold."""

    what: str
    holds: bool
    seen: str
    is_timing: bool = False
    """Whether it says how long something took or how much went through: on a crowded machine it may not hold, and
    nothing is wrong."""


class Findings:
    """What a drill found out, in the order in which it says it."""

    def __init__(self) -> None:
        self.figures: dict[str, float | int | str] = {}
        self.checks: list[Check] = []
        self.remarks: list[str] = []
        """Lines that explain a check that does not hold; shown only then."""

    def check(self, what: str, holds: bool, seen: object = "") -> None:
        """State what must hold, whether it does, and what was seen."""
        self.checks.append(Check(what, holds, str(seen)))

    def check_timing(self, what: str, holds: bool, seen: object = "") -> None:
        """The same of how long something took, or how much went through. What must not happen is never one of these."""
        self.checks.append(Check(what, holds, str(seen), is_timing=True))

    @property
    def is_good(self) -> bool:
        """Whether the drill checked something and all of it holds."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @property
    def is_late(self) -> bool:
        """Whether nothing but timings does not hold."""
        return not self.is_good and bool(self.checks) and all(check.holds or check.is_timing for check in self.checks)


class Drill(NamedTuple):
    """One row of ``run``'s table."""

    name: str
    play: Callable[[Stage, float], Findings]
    seconds: float
    """How long the trouble lasts where all drills are played; the command line may say otherwise."""
    margin_seconds: float
    """What the drill may take beyond that, for starting, being slow and looking at what is left; then it has failed."""
    whole_seconds: float = 0.0
    """How long it lasts with ``--whole``; 0: no longer than otherwise."""
    is_alone: bool = False
    """Whether nothing else may go on beside it: it says how long something takes, or needs the whole machine."""

    def length_seconds(self, *, is_whole: bool) -> float:
        """How long the trouble lasts."""
        return (self.whole_seconds if is_whole else 0.0) or self.seconds


class Stage(contextlib.ExitStack):
    """The servers of one drill and its directory; what was started on it ends with it, in reverse order."""

    def __init__(self, seed: int | None = None) -> None:
        """``seed``: of what a drill leaves to chance, instead of its own."""
        super().__init__()
        self.seed = seed
        # Short: a Unix socket's path has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="relay-drill-"))

    def start_nats(self, max_file_store: str = "1GB") -> NatsServer:
        """A nats-server with JetStream and an empty store of a limited size."""
        server = NatsServer(self.directory / "nats", max_file_store=max_file_store)
        self.callback(server.stop)
        return server.start()

    def start_relay(self, nats_url: str, smtp_port: int, **settings: str) -> RelayProcess:
        """A whole relay, ready."""
        relay = RelayProcess(self.directory / "relay", nats_url, smtp_port, **settings)
        self.callback(relay.stop)
        relay.start()
        return relay

    def forget(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)


def send_figures(relay: RelayProcess) -> list[dict[str, Any]]:
    """What each send worker tells of itself: the figures of ``relayctl status --json``."""
    for _ in range(STATUS_TRIES):  # on a crowded machine one may be late with its answer
        told = orjson.loads(relay.relayctl("status", "--json").stdout)
        figures = [program["figures"] for program in told["programs"] if program["name"].startswith("send-")]
        if figures and all(figures):
            return figures
    raise RuntimeError("a send worker does not tell its figures")
