"""Opening a session: name, TCP, TLS, banner, EHLO, STARTTLS, AUTH (RFC 5321 §3.1-3.2, RFC 3207, RFC 4954, RFC 8314).

Owns everything up to the first mail and the one ``SSLContext`` of the process for this smarthost. EHLO has no fallback
to HELO: a smarthost that cannot do ESMTP can do neither TLS nor AUTH.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from typing import Any

from gevent import Timeout, socket, ssl

from relay.delivery.channel import Channel
from relay.delivery.config import Host, SmarthostConfig, Timeouts
from relay.delivery.hosts import Hosts
from relay.delivery.outcome import Outcome, Phase
from relay.delivery.reply import Extensions, Reply, ReplyBuffer, parse_extensions
from relay.delivery.session import Session, local_failure
from relay.delivery.trouble import LocalFailure, Remedy, Trouble, classify_local, classify_reply, failed_here, refused
from relay.errors import AuthenticationRefused, ConfigError, ConnectFailed, EgressUnavailable, ProtocolViolation
from relay.redaction import without_addresses

log = logging.getLogger("relay.delivery")

IMPLICIT_TLS_PORTS = frozenset({465, 2465})


class OpeningFailed(EgressUnavailable):
    """No session: ``outcome`` is what a mail that waited for it gets, ``trouble`` whom it concerns."""

    def __init__(self, text: str, outcome: Outcome, trouble: Trouble) -> None:
        super().__init__(text)
        self.outcome = outcome
        self.trouble = trouble


class NotConnected(OpeningFailed, ConnectFailed):
    """Anything but the credentials."""


class LoginRefused(OpeningFailed, AuthenticationRefused):
    """The credentials."""


class Dialler:
    """Opens sessions to the first host of a smarthost that works."""

    def __init__(self, config: SmarthostConfig, default_sender: str = "") -> None:
        """Load the authorities, once: it costs milliseconds. Raises ``ConfigError`` for an unusable ``ca_file``."""
        self._config = config
        self._default_sender = default_sender
        self._ssl_context = None if config.tls == "off" else ssl_context(config)
        self.hosts = Hosts(config.hosts)

    def dial(self) -> Session:
        """Open a session, with the next host when one fails.

        Blocks at most for the sum of the configured limits, for each host. Raises ``OpeningFailed``, whose text holds
        what became of each.
        """
        return self._first_that_works(is_probe=False)

    def dial_host(self, host: Host) -> Session:
        """Open a session with this host and use it from now on, or set it aside. Raises ``OpeningFailed``."""
        try:
            session = self._dial(host)
            session.host = host
        except OpeningFailed as error:
            if self.hosts.failed(host, error.outcome.detail, time.monotonic()) and len(self._config.hosts) > 1:
                log.warning("set aside: %s", without_addresses(str(error)))
            raise
        if self.hosts.worked(host) and len(self._config.hosts) > 1:
            log.info("%s is used again", host)
        return session

    def probe(self) -> Session:
        """Open a session and see that it answers NOOP. Raises ``OpeningFailed``."""
        return self._first_that_works(is_probe=True)

    def _first_that_works(self, *, is_probe: bool) -> Session:
        failures: dict[Host, OpeningFailed] = {}
        for host in self.hosts.in_order():
            try:
                return self._ask(host, self.dial_host(host)) if is_probe else self.dial_host(host)
            except OpeningFailed as error:
                failures[host] = error
        raise _together(failures)

    def _dial(self, host: Host) -> Session:
        config = self._config
        channel = self._connect(host, self._resolve(host))
        opening = _Opening(channel, config, host)
        try:
            if config.tls == "implicit" or (config.tls == "auto" and host.port in IMPLICIT_TLS_PORTS):
                opening.start_tls(self._ssl_context)
            opening.expect(Phase.BANNER, b"")
            extensions = opening.greet()
            if not channel.is_tls and self._wants_starttls(extensions, channel):
                opening.request_tls(extensions)
                opening.start_tls(self._ssl_context)
                # RFC 3207 §4.2: what was said before the handshake is forgotten.
                extensions = opening.greet()
            if config.username and config.password:
                opening.log_in(extensions)
            opening.expect_silence()
        except (OSError, ProtocolViolation) as error:
            channel.close()
            detail = opening.awaited if isinstance(error, TimeoutError) else str(error)
            raise opening.failure(local_failure(error), detail) from error
        except BaseException:
            channel.close()
            raise
        return Session(channel, extensions, config, self._default_sender)

    def _ask(self, host: Host, session: Session) -> Session:
        """See that a new session answers NOOP."""
        try:
            reply = session.noop()
            if not reply.is_positive:
                raise ProtocolViolation(f"NOOP was answered with {reply.code} {reply.text}")
        except (OSError, ProtocolViolation) as error:
            session.close()
            failure = local_failure(error)
            trouble = classify_local(Phase.NOOP, failure)
            self.hosts.failed(host, f"NOOP: {error}", time.monotonic())
            raise NotConnected(
                f"{host}, noop: {error}", failed_here(trouble, Phase.NOOP, failure, str(error)), trouble
            ) from error
        except BaseException:
            session.close()
            raise
        return session

    def _wants_starttls(self, extensions: Extensions, channel: Channel) -> bool:
        config = self._config
        if config.tls != "auto":
            return config.tls == "starttls"
        has_credentials = bool(config.username and config.password)
        return extensions.starttls or (has_credentials and not channel.is_loopback)

    def _resolve(self, host: Host) -> list[tuple[Any, ...]]:
        try:
            with Timeout(self._config.timeouts.connect_seconds, TimeoutError("no answer from the name servers")):
                addresses: list[tuple[Any, ...]] = socket.getaddrinfo(host.name, host.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _unreachable(f"the name {host.name} cannot be resolved ({error})") from error
        return addresses

    def _connect(self, host: Host, addresses: list[tuple[Any, ...]]) -> Channel:
        """Try the addresses in turn; each has an equal share of the time that is left."""
        ends_at = time.monotonic() + self._config.timeouts.connect_seconds
        errors: list[str] = []
        for index, address in enumerate(addresses):
            now = time.monotonic()
            try:
                return Channel.connect(address, now + (ends_at - now) / (len(addresses) - index))
            except OSError as error:
                errors.append(f"{address[4][0]}: {error.strerror or error}")
        raise _unreachable(f"{host} does not accept connections ({'; '.join(errors[:4])})")


def _unreachable(text: str) -> NotConnected:
    trouble = classify_local(Phase.CONNECT, LocalFailure.UNREACHABLE)
    return NotConnected(text, failed_here(trouble, Phase.CONNECT, LocalFailure.UNREACHABLE, text), trouble)


def _together(failures: Mapping[Host, OpeningFailed]) -> OpeningFailed:
    """One error for a dial that no host answered; of refused credentials, if any host refused them."""
    errors = list(failures.values())
    chosen = next((error for error in errors if isinstance(error, LoginRefused)), errors[0])
    if len(errors) == 1:
        return chosen
    detail = "; ".join(f"{host}: {error.outcome.detail}" for host, error in failures.items())
    is_crowded = any(error.trouble.remedy is Remedy.FEWER for error in errors)
    trouble = chosen.trouble._replace(remedy=Remedy.FEWER) if is_crowded else chosen.trouble
    return type(chosen)("; ".join(map(str, errors)), chosen.outcome._replace(detail=detail), trouble)


class _Opening:
    """The dialogue on one new connection."""

    def __init__(self, channel: Channel, config: SmarthostConfig, host: Host) -> None:
        self._channel = channel
        self._config = config
        self._host = host
        self._replies = ReplyBuffer()
        self._phase = Phase.BANNER

    def expect(self, phase: Phase, command: bytes, code_class: int = 2) -> Reply:
        """Send ``command`` and return its reply; one of another class than ``code_class`` is a refusal."""
        self._phase = phase
        until = time.monotonic() + _limit_seconds(self._config.timeouts, phase)
        self.expect_silence()
        if command:
            self._channel.write(command, until)
        while (reply := self._replies.take()) is None:
            chunk = self._channel.read(until)
            if not chunk:
                raise ConnectionError("the peer hung up")
            self._replies.feed(chunk)
        if reply.code // 100 != code_class:
            raise self._refusal(reply)
        return reply

    def expect_silence(self) -> None:
        """Refuse what answers no command: it would be taken for the answer to the next one."""
        if not self._replies.is_empty:
            raise ProtocolViolation("a reply to no command")

    def greet(self) -> Extensions:
        return parse_extensions(self.expect(Phase.EHLO, f"EHLO {self._config.helo_name}\r\n".encode()))

    def request_tls(self, extensions: Extensions) -> None:
        """Ask for TLS where it is needed: going on without it would let anyone on the way strip it."""
        self._phase = Phase.STARTTLS
        if not extensions.starttls:
            raise self.failure(LocalFailure.NOT_OFFERED, "STARTTLS is required but not offered")
        self.expect(Phase.STARTTLS, b"STARTTLS\r\n")

    def start_tls(self, context: Any) -> None:
        """Do the handshake. Bytes that came before it are an attack or a fault: they would pass for encrypted ones."""
        self._phase = Phase.STARTTLS
        if not self._replies.is_empty:
            raise ProtocolViolation("bytes before the TLS handshake")
        try:
            until = time.monotonic() + self._config.timeouts.starttls_seconds
            self._channel.start_tls(context, self._host.name, until)
        except ssl.SSLCertVerificationError as error:
            raise self.failure(LocalFailure.TLS, error.verify_message or str(error)) from error
        except ssl.SSLError as error:
            raise self.failure(LocalFailure.TLS, error.reason or str(error)) from error

    def log_in(self, extensions: Extensions) -> None:
        """Do AUTH PLAIN (RFC 4616), else LOGIN, never where others can read it."""
        self._phase = Phase.AUTH
        if not self._channel.is_tls and not self._channel.is_loopback:
            raise self.failure(LocalFailure.NOT_OFFERED, "the password is not sent without TLS")
        username, password = self._config.username, self._config.password
        if "PLAIN" in extensions.auth:
            self.expect(Phase.AUTH, b"AUTH PLAIN " + _base64(f"\0{username}\0{password}"))
        elif "LOGIN" in extensions.auth:
            self.expect(Phase.AUTH, b"AUTH LOGIN\r\n", code_class=3)
            self.expect(Phase.AUTH, _base64(username), code_class=3)
            self.expect(Phase.AUTH, _base64(password))
        else:
            raise self.failure(LocalFailure.NOT_OFFERED, "neither AUTH PLAIN nor LOGIN is offered")

    @property
    def awaited(self) -> str:
        """What it waits for, in words."""
        return "no banner" if self._phase is Phase.BANNER else f"no reply to {self._phase.value.upper()}"

    def failure(self, failure: LocalFailure, detail: str) -> NotConnected:
        """Make the error for what happened here."""
        trouble = classify_local(self._phase, failure)
        outcome = failed_here(trouble, self._phase, failure, detail)
        return NotConnected(f"{self._host}, {self._phase.value}: {outcome.detail}", outcome, trouble)

    def _refusal(self, reply: Reply) -> OpeningFailed:
        trouble = classify_reply(self._phase, reply)
        outcome = refused(trouble, self._phase, reply)
        text = f"{self._host} refused {self._phase.value} with {reply.code} {reply.text}"
        # 4yz to AUTH says nothing about the credentials (RFC 4954 §6: 454 is a temporary failure).
        error_type = LoginRefused if self._phase is Phase.AUTH and reply.is_permanent else NotConnected
        return error_type(text, outcome, trouble)


def _limit_seconds(timeouts: Timeouts, phase: Phase) -> float:
    match phase:
        case Phase.BANNER:
            return timeouts.banner_seconds
        case Phase.EHLO:
            return timeouts.ehlo_seconds
        case Phase.STARTTLS:
            return timeouts.starttls_seconds
        case _:
            return timeouts.auth_seconds


def _base64(text: str) -> bytes:
    return base64.b64encode(text.encode()) + b"\r\n"


def ssl_context(config: SmarthostConfig) -> Any:
    """What TLS with the smarthost is to be like. Raises ``ConfigError``."""
    # gevent's own class, by name: create_default_context would make a blocking one in a process that is not patched.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if config.ca_file:
            context.load_verify_locations(config.ca_file)
        else:
            context.load_default_certs()
    except OSError as error:
        raise ConfigError(f"the certificate file {config.ca_file} cannot be used ({error})") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not config.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
