"""Which host of a smarthost to connect to: the first that works, while those that failed are set aside. Pure.

Owns the order and how long a host is set aside; ``dialling`` connects, ``guard`` makes the trials. ``now`` is given.

============ ================================================ =========================================
state        who dials it                                     left by
============ ================================================ =========================================
in use       everyone, in the order of preference             ``failed``
set aside    nobody, as long as another host works            ``begin_trial`` when its time is over
on trial     the one dial that tries it                       ``worked`` (in use), ``failed`` (aside)
============ ================================================ =========================================

When all are set aside all are tried, the one whose time is over first at the front: a dial never fails unasked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from relay.delivery.config import Host

FIRST_ASIDE_SECONDS: Final = 2.0
LONGEST_ASIDE_SECONDS: Final = 60.0
TRIAL_SECONDS: Final = 60.0
"""A trial that said nothing for so long (its greenlet was killed) does not keep the host out for ever."""


@dataclasses.dataclass
class _Aside:
    reason: str
    until: float
    seconds: float = FIRST_ASIDE_SECONDS
    is_on_trial: bool = False


class Hosts:
    """The hosts of one smarthost, in order of preference."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = tuple(hosts)
        self._aside: dict[Host, _Aside] = {}

    def in_order(self) -> list[Host]:
        """Return the hosts that a dial should try, one after another."""
        good = [host for host in self._hosts if host not in self._aside]
        return good or sorted(self._hosts, key=lambda host: self._aside[host].until)

    def begin_trial(self, now: float) -> Host | None:
        """Return a host that is to be tried again, if others work and its time is over; for one caller at a time."""
        if not self._aside or len(self._aside) == len(self._hosts):
            return None
        for host in self._hosts:
            aside = self._aside.get(host)
            if aside is not None and aside.until <= now:
                aside.is_on_trial = True
                aside.until = now + TRIAL_SECONDS
                return host
        return None

    def failed(self, host: Host, reason: str, now: float) -> bool:
        """Set the host aside, twice as long after each trial; return whether it was in use until now."""
        aside = self._aside.get(host)
        reason = reason or "refused without a word"
        if aside is None:
            self._aside[host] = _Aside(reason, now + FIRST_ASIDE_SECONDS)
            return True
        # Several dials that were under way fail together: that is one failure.
        if aside.is_on_trial or aside.until <= now:
            aside.seconds = min(aside.seconds * 2, LONGEST_ASIDE_SECONDS)
            aside.until = now + aside.seconds
            aside.is_on_trial = False
        aside.reason = reason
        return False

    def worked(self, host: Host) -> bool:
        """Use the host again; return whether it was set aside."""
        return self._aside.pop(host, None) is not None

    def figures(self) -> list[dict[str, str]]:
        """Every host with the reason why it is set aside, '' when it is not."""
        return [
            {"host": str(host), "set_aside": self._aside[host].reason if host in self._aside else ""}
            for host in self._hosts
        ]

    def __repr__(self) -> str:
        return ", ".join(f"{host} aside" if host in self._aside else str(host) for host in self._hosts)
