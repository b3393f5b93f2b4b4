"""The smarthost: can it be reached, does it speak what the settings say, does it take us? Each fault told apart.

Owns the words for what is wrong and what to do. The dialogue that decides is the workers' own (``delivery.dialling``);
where it fails, a closer look finds out why.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import gevent
from gevent import Timeout, ssl

from relay.delivery.config import Host, SmarthostConfig, Timeouts
from relay.delivery.dialling import Dialler, LoginRefused, OpeningFailed
from relay.delivery.outcome import Phase, SaidBy
from relay.errors import ConfigError
from relay.ops.doctor.dialogue import first_words, is_implicit, look, speaks_tls_first
from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.doctor.network import SLOW_LOOKUP_SECONDS, Reach, Trouble, reach
from relay.ops.parts import smarthost_config
from relay.settings import Settings

PHASE_SECONDS = 8.0
PING_SECONDS = 9.0
"""More than any one phase has, so that the phase that hangs is named."""
CERTIFICATE_DAYS = 14
DAY_SECONDS = 86_400

AMAZON = re.compile(
    r"email-smtp(?:-fips)?\.(?P<region>[a-z]{2,}(?:-[a-z]+)+-\d+)\.amazonaws\.com(?:\.cn)?", re.IGNORECASE
)
"""Amazon SES's SMTP endpoints."""

EXPIRED, NOT_YET_VALID = 10, 9
UNTRUSTED = frozenset({2, 18, 19, 20, 21})
WRONG_NAME = frozenset({62, 64})
"""OpenSSL's X509_V_ERR_… numbers."""


class Advice(NamedTuple):
    """What is wrong and what to do."""

    detail: str
    remedy: str


def region_of(host: str) -> str:
    """The region of one of Amazon's SMTP endpoints, '' for other hosts."""
    found = AMAZON.fullmatch(host)
    return found["region"].lower() if found else ""


def smarthost(settings: Settings, *, is_thorough: bool = False) -> Iterator[Finding]:
    """A finding for each host at least. Takes 25 s at most, however many hosts there are."""
    if not settings.email_enabled:
        detail = f"{settings.smarthost} not asked: EMAIL_ENABLED is false, so no mail is sent"
        yield warning("SMTP", detail, "set EMAIL_ENABLED=true to send mail")
        return
    try:
        config = smarthost_config(settings)
        Dialler(config)
    except ConfigError as error:
        yield failed("SMTP", str(error), "name a file of CA certificates in PEM in SMTP_CA_FILE")
        return
    sender = settings.sender if is_thorough else ""
    asked = [gevent.spawn(_examine, config, host, sender, is_thorough=is_thorough) for host in config.hosts]
    gevent.joinall(asked)
    answers = [each.get() for each in asked]
    # As long as one host works mail goes out.
    works = any(answer[0].ok for answer in answers)
    for host, (first, *others) in zip(config.hosts, answers, strict=True):
        what = "SMTP" if len(answers) == 1 else f"SMTP {host}"
        yield first._replace(what=what, is_warning=not first.ok and works)
        yield from (each._replace(what=what) for each in others)


def _examine(config: SmarthostConfig, host: Host, sender: str, *, is_thorough: bool) -> list[Finding]:
    """Whether the host takes us, then what else there is to say of it; what each is about is named later."""
    reached = reach(host.name, host.port)
    if reached.trouble is not Trouble.NONE:
        return [failed("", reached.problem, reached.remedy("SMTP_HOST", "SMTP_PORT"))]
    single = dataclasses.replace(config, hosts=(host,), timeouts=_hurried(config.timeouts))
    login = f"logged in as {config.username}" if config.username and config.password else "without login"
    try:
        with Timeout(PING_SECONDS) as timeout:
            session = Dialler(single).probe()
    except Timeout as expired:
        if expired is not timeout:
            raise
        advice = Advice(f"{host} did not answer within {PING_SECONDS:g} s", _LOOK_THERE)
        return [failed("", *advice)]
    except OpeningFailed as error:
        return [failed("", *explain(error, single, host))]
    session.quit()
    findings = [well("", f"{host} takes mail, {login}")]
    if is_thorough:
        findings += _closer(single, host, sender, reached)
    return findings


def _hurried(timeouts: Timeouts) -> Timeouts:
    """No phase takes so long that its host's findings would come too late."""
    return Timeouts(**{name: min(seconds, PHASE_SECONDS) for name, seconds in dataclasses.asdict(timeouts).items()})


def _closer(config: SmarthostConfig, host: Host, sender: str, reached: Reach) -> Iterator[Finding]:
    if reached.lookup_seconds > SLOW_LOOKUP_SECONDS:
        detail = f"resolving {host.name} took {reached.lookup_seconds:.1f} s, and each new connection resolves it"
        yield warning("", detail, "use a name server that is near, or a caching one (nscd, systemd-resolved, dnsmasq)")
    if reached.failures:
        told = ", ".join(f"{address}: {why}" for address, why in list(reached.failures.items())[:3])
        detail = f"some addresses of {host.name} do not work ({told}); a connection may wait for them first"
        yield warning(
            "", detail, "mend the route to them (IPv6 above all), or name a host that has only those that work"
        )
    has_login = bool(config.username and config.password)
    seen = look(config, host, "" if has_login else sender)
    if seen.certificate_ends_at is not None:
        days = (seen.certificate_ends_at - time.time()) / DAY_SECONDS
        if days < CERTIFICATE_DAYS:
            detail = f"the certificate of {host} ends in {max(0, days):.0f} days; then no mail goes out"
            yield warning("", detail, "have whoever runs the server renew it")
    if seen.mail is not None and not seen.mail.is_positive:
        yield failed("", *_refused_mail(seen.mail.code, seen.mail.text, host, sender))


def _refused_mail(code: int, text: str, host: Host, sender: str) -> Advice:
    detail = f"{host} refuses MAIL from {sender} with {code} {text}"
    if code == 530 and "starttls" in text.lower():
        return Advice(detail, "set SMTP_TLS=starttls")
    if code in {530, 550, 503, 535} and "auth" in text.lower():
        return Advice(detail, "set SMTP_USERNAME and SMTP_PASSWORD: the server takes mail only after a login")
    return Advice(detail, "set DEFAULT_SMTP_FROM to a sender that the server takes, or have it allow this one")


# -- why a session could not be opened -------------------------------------------------------------------------------
_LOOK_THERE = (
    "look into the server's own logs; what it does before it answers (lookups of this host's name) may be slow"
)


def explain(error: OpeningFailed, config: SmarthostConfig, host: Host) -> Advice:
    """What is wrong and what to do; asks the host again where that tells more. Takes 4 s more at most."""
    # Of a reply to LOGIN's user name or password nothing is shown but what the server said.
    phase = error.outcome.phase
    if error.outcome.said_by is SaidBy.PEER:
        return _refused(error, host)
    match phase:
        case Phase.BANNER | Phase.CONNECT:
            return _no_greeting(error, config, host)
        case Phase.STARTTLS:
            return _no_tls(error.__cause__, str(error), config, host)
        case Phase.AUTH:
            return _no_login(str(error), config)
        case _:
            return Advice(str(error), _LOOK_THERE)


def _refused(error: OpeningFailed, host: Host) -> Advice:
    """The server said no."""
    code = error.outcome.reply_code or 0
    detail = str(error)
    if isinstance(error, LoginRefused) or error.outcome.phase is Phase.AUTH:
        return Advice(detail, _login_remedy(code, detail, host))
    match error.outcome.phase:
        case Phase.BANNER | Phase.EHLO:
            return Advice(
                detail,
                "have the server allow this host's address, and check SMTP_HELO_NAME (a name that resolves here)",
            )
        case Phase.STARTTLS:
            return Advice(detail, "the server offers TLS and cannot do it now: look into its certificate and its logs")
        case _:
            return Advice(detail, _LOOK_THERE)


def _login_remedy(code: int, text: str, host: Host) -> str:
    if code // 100 == 4:
        return "the server cannot check passwords just now: wait, or look into its logs"
    if region := region_of(host.name):
        if "not subscribed" in text.lower():
            return f"the AWS account does not use SES in {region} yet: open the SES console there, or change SMTP_HOST"
        return (
            "Amazon's SMTP credentials are not an IAM access key and its secret, and each region has its own: make some"
            f" in the SES console of {region}, the region that SMTP_HOST names"
        )
    if code == 530:
        return "the server wants TLS before a login: set SMTP_TLS=starttls"
    if code == 534:
        return "the server wants another way to log in: with Gmail and Microsoft an app password"
    if code == 538:
        return "the server wants TLS before a login: set SMTP_TLS=starttls"
    return "check SMTP_USERNAME and SMTP_PASSWORD (a line end or a space at its end counts), and that the user may send"


def _no_greeting(error: OpeningFailed, config: SmarthostConfig, host: Host) -> Advice:
    hearing = gevent.spawn(first_words, host)
    if not is_implicit(config, host) and speaks_tls_first(host):
        return Advice(
            f"{host} speaks TLS from the first byte on, and SMTP_TLS={config.tls} waits for a greeting in clear",
            "set SMTP_TLS=implicit, or SMTP_PORT to the port for STARTTLS (587)",
        )
    said = hearing.get()
    if said and not said.startswith(("220", "4", "5")):
        return Advice(f"{host} speaks, but no SMTP: {said[:60]!r}", "check SMTP_HOST and SMTP_PORT (587, 465 or 25)")
    return Advice(
        str(error), "check that SMTP_PORT is an SMTP port; a server that greets late may distrust this host's address"
    )


def _no_tls(cause: BaseException | None, text: str, config: SmarthostConfig, host: Host) -> Advice:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _bad_certificate(cause.verify_code, cause.verify_message, host)
    reason = (cause.reason or "") if isinstance(cause, ssl.SSLError) else ""
    is_version = reason != "WRONG_VERSION_NUMBER" and ("PROTOCOL" in reason or "VERSION" in reason)
    if not is_version and is_implicit(config, host) and (said := first_words(host)).startswith(("220", "4", "5")):
        return Advice(
            f"{host} begins in clear ({said[:40]!r}), and TLS from the first byte on is what the settings ask for",
            "set SMTP_TLS=starttls for this port, or SMTP_PORT to the one for implicit TLS (465)",
        )
    if is_version:
        return Advice(
            f"{host} has no TLS 1.2 or newer ({reason.lower().replace('_', ' ')})",
            "have whoever runs the server allow TLS 1.2; Relay speaks nothing older",
        )
    if "HANDSHAKE" in reason or "CIPHER" in reason:
        return Advice(
            f"{host} and this host have no way of encrypting in common ({reason.lower().replace('_', ' ')})",
            "have whoever runs the server look at its TLS ciphers, and whether it asks for a client certificate",
        )
    if cause is None:
        why = f"SMTP_TLS={config.tls} asks for it" if config.tls == "starttls" else "a password is set, which needs TLS"
        return Advice(
            f"{host} does not offer STARTTLS, and {why}",
            "have the server offer it, or use its port for implicit TLS (SMTP_PORT=465)",
        )
    return Advice(text, "check that the port speaks TLS as SMTP_TLS says; a firewall that inspects SMTP may break it")


def _bad_certificate(code: int, message: str, host: Host) -> Advice:
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if code == EXPIRED:
        return Advice(
            f"the certificate of {host} has expired",
            f"have it renewed; if this host's clock is wrong ({now}), set that",
        )
    if code == NOT_YET_VALID:
        return Advice(f"the certificate of {host} is not valid yet", f"set this host's clock: it says {now}")
    if code in WRONG_NAME:
        return Advice(
            f"the certificate of {host} is for another name ({message.rstrip('.')})",
            "set SMTP_HOST to the name that the certificate has",
        )
    if code in UNTRUSTED:
        return Advice(
            f"the certificate of {host} is not trusted here ({message})",
            "put the certificate of its authority into a file and set SMTP_CA_FILE (SMTP_TLS_VERIFY=false only to try)",
        )
    return Advice(f"the certificate of {host} is no good: {message}", "have whoever runs the server look at it")


def _no_login(text: str, config: SmarthostConfig) -> Advice:
    if "without TLS" in text:
        return Advice(text, "set SMTP_TLS=starttls, or implicit on port 465")
    if "neither AUTH" in text:
        remedy = "use a port where the server offers it (587 or 465), or leave out SMTP_USERNAME if it wants no login"
        if config.tls in {"off", "auto"}:
            remedy = "many servers offer it only under TLS: set SMTP_TLS=starttls; or leave SMTP_USERNAME out"
        return Advice(text, remedy)
    return Advice(text, _LOOK_THERE)
