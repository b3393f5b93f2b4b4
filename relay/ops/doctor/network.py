"""Can a host be reached? Its name, its addresses, TCP; what became of each, told apart.

Owns the words for what is wrong below the protocols. Everything is bounded and the addresses are tried side by side.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import time
from enum import Enum, auto
from typing import Any, NamedTuple

import gevent
from gevent import Timeout, socket

LOOKUP_SECONDS = 5.0
CONNECT_SECONDS = 4.0
SLOW_LOOKUP_SECONDS = 1.0
MOST_ADDRESSES = 8

_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class Trouble(Enum):
    """Why a host cannot be reached."""

    NONE = auto()
    NO_NAME = auto()
    """The name servers say that there is none."""
    NO_LOOKUP = auto()
    """The name servers do not answer."""
    REFUSED = auto()
    """The host is there and nothing listens."""
    SILENT = auto()
    """No answer: a firewall drops it, or there is no such host."""
    NO_ROUTE = auto()
    """This host has no way to such addresses."""


class Reach(NamedTuple):
    """What became of it."""

    host: str
    port: int
    trouble: Trouble
    """Of the host as a whole: NONE when one address works."""
    reached: tuple[str, ...]
    failures: dict[str, str]
    """Addresses that do not work, each with why not."""
    lookup_seconds: float

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine, or this container, by its name or every address."""
        addresses = [*self.reached, *self.failures]
        return self.host == "localhost" or (bool(addresses) and all(map(_is_loopback, addresses)))

    @property
    def problem(self) -> str:
        """What is wrong, '' when nothing is."""
        listed = ", ".join(list(self.failures)[:3])
        match self.trouble:
            case Trouble.NO_NAME:
                return f"the name {self.host} does not exist ({self.failures.get(self.host, '')})"
            case Trouble.NO_LOOKUP:
                return f"the name servers do not answer for {self.host} ({self.failures.get(self.host, '')})"
            case Trouble.REFUSED:
                return f"nothing listens on port {self.port} of {self.host} ({listed}: connection refused)"
            case Trouble.SILENT:
                return f"port {self.port} of {self.host} does not answer within {CONNECT_SECONDS:g} s ({listed})"
            case Trouble.NO_ROUTE:
                kinds = " and ".join(sorted({_kind(each) for each in self.failures}))
                return f"{self.host} has only {kinds} addresses ({listed}), and this host has no route to them"
            case _:
                return ""

    def remedy(self, host_setting: str, port_setting: str) -> str:
        """What to do about it, '' when nothing is wrong."""
        where = f"{host_setting} and {port_setting}" if port_setting != host_setting else host_setting
        match self.trouble:
            case Trouble.NO_NAME:
                return f"check the spelling in {host_setting}, and this host's search domains in /etc/resolv.conf"
            case Trouble.NO_LOOKUP:
                return "check the name servers in /etc/resolv.conf, and that this host may reach them on port 53"
            case Trouble.REFUSED if self.is_loopback:
                return (
                    f"start the server there, or check {where}; in a container localhost is the container itself, so"
                    " name the server's service or host instead"
                )
            case Trouble.REFUSED:
                return f"check {where}, and that the server runs"
            case Trouble.SILENT if self.port == 25:
                return (
                    "most clouds block port 25 to the outside: use 587 (Amazon SES: also 2587), or ask for its release"
                )
            case Trouble.SILENT:
                return (
                    f"a firewall, security group or network policy drops it: allow port {self.port}, or check {where}"
                )
            case Trouble.NO_ROUTE:
                return f"give this host a route for such addresses, or name a host in {host_setting} that has others"
            case _:
                return ""


def reach(host: str, port: int) -> Reach:
    """Looks the name up and connects to each of its addresses. Takes 10 s at most."""
    begun = time.monotonic()
    try:
        with Timeout(LOOKUP_SECONDS, TimeoutError(f"nothing within {LOOKUP_SECONDS:g} s")):
            found: list[tuple[Any, ...]] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        is_final = isinstance(error, UnicodeError) or (
            isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
        )
        why = getattr(error, "strerror", None) or str(error)
        trouble = Trouble.NO_NAME if is_final else Trouble.NO_LOOKUP
        return Reach(host, port, trouble, (), {host: why}, time.monotonic() - begun)
    lookup_seconds = time.monotonic() - begun
    addresses = list(dict.fromkeys(found))[:MOST_ADDRESSES]
    tries = [gevent.spawn(_connect_error, address) for address in addresses]
    gevent.joinall(tries, timeout=CONNECT_SECONDS + 1)
    errors = {str(address[4][0]): each.value for address, each in zip(addresses, tries, strict=True)}
    gevent.killall(tries, block=False)
    reached = tuple(address for address, number in errors.items() if number == 0)
    failures = {address: _in_words(number) for address, number in errors.items() if number != 0}
    trouble = Trouble.NONE if reached else _worst(list(errors.values()))
    return Reach(host, port, trouble, reached, failures, lookup_seconds)


def _connect_error(address: tuple[Any, ...]) -> int:
    """0, or the error's number."""
    family, kind, proto, _, sockaddr = address
    with socket.socket(family, kind, proto) as sock:
        sock.settimeout(CONNECT_SECONDS)
        try:
            sock.connect(sockaddr)
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def _worst(numbers: list[int | None]) -> Trouble:
    """What the addresses have in common; what may mean most where they differ."""
    if errno.ECONNREFUSED in numbers:
        return Trouble.REFUSED
    if all(number in _NO_ROUTE for number in numbers):
        return Trouble.NO_ROUTE
    return Trouble.SILENT


def _in_words(number: int | None) -> str:
    if number is None or number == errno.ETIMEDOUT:
        return f"no answer within {CONNECT_SECONDS:g} s"
    return os.strerror(number).lower()


def _kind(address: str) -> str:
    try:
        return f"IPv{ipaddress.ip_address(address.partition('%')[0]).version}"
    except ValueError:
        return "unknown"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
