"""What ``make bench`` measures: its rows, and the figures that DESIGN asks of sending."""

from __future__ import annotations

from typing import NamedTuple

import smtp

KB = 1024
CALLERS = 200


class Setup(NamedTuple):
    """What has to be started for a row; rows with the same one share it."""

    workers: int = 2
    is_tracked: bool = True
    pool_size: int = 20


class Row(NamedTuple):
    """One line of the table: a closed loop, or an open one at a share of the peak that was found before."""

    part: str
    setup: Setup = Setup()
    size: int = 4 * KB
    callers: int = CALLERS
    share_of_peak: float = 0.0
    is_long: bool = False
    """One long run, whose first and last tenth are compared."""

    @property
    def name(self) -> str:
        """What the row is; it is tracked, of 4 KB and with a pool of 20 unless it says otherwise."""
        words = [f"{self.setup.workers} worker{'s' * (self.setup.workers > 1)}"]
        if self.share_of_peak:
            words.append(f"open loop, {self.share_of_peak:.0%} of peak")
        else:
            words.append(f"{self.callers} caller{'s' * (self.callers > 1)}")
        if self.size != 4 * KB:
            words.append(f"{self.size // KB} KB")
        if not self.setup.is_tracked:
            words.append("no JetStream")
        if self.part == "connections":
            words.append(f"pool {self.setup.pool_size}")
        if self.is_long:
            words.append("long")
        return ", ".join(words)


BASE = Row("base")
"""Always measured: nearly every row differs from it in one thing."""
PARTS: dict[str, list[Row]] = {
    "workers": [Row("workers", Setup(workers)) for workers in (1, 4)],
    "untracked": [Row("untracked", Setup(workers, is_tracked=False)) for workers in (1, 2, 4)],
    # With more in flight than 20 of the largest nats-server would be what is measured: it holds 64 MB for a client.
    "body": [Row("body", size=KB), Row("body", size=40 * KB, callers=50), Row("body", size=400 * KB, callers=20)],
    "callers": [Row("callers", callers=callers) for callers in (1, 50, 500)],
    "connections": [Row("connections", Setup(pool_size=size), callers=500) for size in (10, 50, 100)],
    "open": [Row("open", share_of_peak=share) for share in (0.5, 0.9)],
    "uptime": [Row("uptime", is_long=True)],
}
MORE_PARTS = ("composing", "smtp")
"""Parts that are no rows: composing by itself; what ``make bench-smtp`` measures, with fewer rounds."""


class Aim(NamedTuple):
    """A figure and its bound."""

    figure: str
    bound: float
    is_least: bool = False

    def is_reached_by(self, value: float) -> bool:
        """Whether it is as good as wanted."""
        return value >= self.bound if self.is_least else value <= self.bound

    @property
    def text(self) -> str:
        """The bound, as a table shows it."""
        return f"{'≥' if self.is_least else '≤'} {self.bound:g}"


GROWTH = "worker CPU a mail, growth with"
FAR_CONNECTIONS = (20, 100)
AIMS = (
    Aim("tracked sends, 2 workers, against smtp-source", 0.40, is_least=True),
    Aim("worker CPU, tracked, 4 KB, µs a mail", 110),
    Aim("composing 4 KB, ASCII with short lines, µs", 15),
    Aim("composing 4 KB, quoted-printable, µs", 40),
    *(
        Aim(f"SMTP layer alone against {each.name}", each.wanted, is_least=True)
        for each in smtp.CONTESTANTS
        if each.script != "ours.py"
    ),
    *(
        Aim(f"smarthost 20 ms away, {count} connections, share of the most", smtp.FAR_WANTED, is_least=True)
        for count in FAR_CONNECTIONS
    ),
    Aim("added latency at low load, p50, ms", 1.5),
    Aim("one send worker, 100 connections open, MB resident", 70),
    *(Aim(f"{GROWTH} {what}", 1.15) for what in ("callers", "workers", "connections", "uptime")),
)
