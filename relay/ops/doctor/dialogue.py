"""A closer look at an SMTP port than the relay itself takes: what it speaks first, its certificate, its answer to MAIL.

For diagnosis alone: the relay's own dialogue is ``delivery.dialling``'s. Sends no mail: after MAIL comes QUIT.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, NamedTuple

from gevent import Timeout, socket, ssl

from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.dialling import IMPLICIT_TLS_PORTS, ssl_context
from relay.delivery.reply import Reply, ReplyBuffer, parse_extensions
from relay.errors import ConfigError, ProtocolViolation

LOOK_SECONDS = 4.0


class Look(NamedTuple):
    """What was seen before the look ended, for whatever reason."""

    certificate_ends_at: float | None
    """Epoch seconds; None without TLS, or where the certificate is not verified."""
    mail: Reply | None
    """The answer to MAIL from the default sender, None when it was not asked."""


def is_implicit(config: SmarthostConfig, host: Host) -> bool:
    """Whether the settings say that TLS comes first."""
    return config.tls == "implicit" or (config.tls == "auto" and host.port in IMPLICIT_TLS_PORTS)


def speaks_tls_first(host: Host) -> bool:
    """Whether a TLS handshake works as the first thing on a connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with _connected(host) as sock:
            context.wrap_socket(sock, server_hostname=host.name).close()
    except OSError:
        return False
    return True


def first_words(host: Host) -> str:
    """The first line that is said in clear, '' when none comes."""
    try:
        with _connected(host) as sock:
            return bytes(sock.recv(512)).decode("ascii", "replace").partition("\n")[0].strip()
    except OSError:
        return ""


def look(config: SmarthostConfig, host: Host, sender: str) -> Look:
    """Opens a session without logging in; asks MAIL from ``sender`` unless that is ''. Never raises."""
    ends_at: float | None = None
    mail: Reply | None = None
    with contextlib.suppress(OSError, ProtocolViolation, ConfigError), _connected(host) as plain:
        talk = _Talk(plain)
        is_first = is_implicit(config, host)
        if is_first:
            ends_at = talk.start_tls(config, host)
        talk.hear()
        extensions = parse_extensions(talk.ask(f"EHLO {config.helo_name}"))
        if not is_first and extensions.starttls and config.tls != "off" and talk.ask("STARTTLS").is_positive:
            ends_at = talk.start_tls(config, host)
            talk.ask(f"EHLO {config.helo_name}")
        if sender:
            mail = talk.ask(f"MAIL FROM:<{sender}>")
        talk.ask("QUIT")
    return Look(ends_at, mail)


class _Talk:
    """One connection, command by command."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._replies = ReplyBuffer()

    def hear(self) -> Reply:
        while (reply := self._replies.take()) is None:
            chunk = self._sock.recv(4096)
            if not chunk:
                raise ConnectionError("the peer hung up")
            self._replies.feed(chunk)
        return reply

    def ask(self, command: str) -> Reply:
        self._sock.sendall(f"{command}\r\n".encode())
        return self.hear()

    def start_tls(self, config: SmarthostConfig, host: Host) -> float | None:
        """When the certificate ends."""
        self._sock = ssl_context(config).wrap_socket(self._sock, server_hostname=host.name)
        certificate = self._sock.getpeercert() or {}
        ends = certificate.get("notAfter")
        return float(ssl.cert_time_to_seconds(ends)) if ends else None


@contextlib.contextmanager
def _connected(host: Host) -> Any:
    """A connection; whatever is done with it ends after ``LOOK_SECONDS`` with a ``TimeoutError``."""
    until = time.monotonic() + LOOK_SECONDS
    with Timeout(LOOK_SECONDS, TimeoutError("no answer")):
        sock = socket.create_connection((host.name, host.port), timeout=max(0.1, until - time.monotonic()))
        try:
            sock.settimeout(None)
            yield sock
        finally:
            sock.close()
