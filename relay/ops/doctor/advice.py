"""Settings that are legal and unwise, or contradict each other. Asks nobody."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.doctor.smtp import region_of
from relay.settings import Settings, unknown_names

MANY_CONNECTIONS = 200
"""Open at once to one Amazon SES endpoint, above which an account is known to meet 421."""
USUAL_STOP_SECONDS = 30
"""What Kubernetes gives a pod to end in."""


def known_names() -> Finding:
    """Whether every variable that looks like a setting is one."""
    if unknown := unknown_names():
        return warning("settings", f"no effect: {', '.join(unknown)}", "check the spelling")
    return well("settings", "all known")


def settings_advice(settings: Settings) -> Iterator[Finding]:
    """One finding for each thing that is unwise."""
    for finding in (
        _password_in_clear(settings),
        _unverified(settings),
        _half_a_login(settings),
        _sender(settings),
        _connections(settings),
        _drain(settings),
        _timeouts(settings),
        _events(settings),
    ):
        if finding is not None:
            yield finding


def _remote_hosts(settings: Settings) -> list[str]:
    return [name for name, _ in settings.smtp_hosts if not _is_loopback(name)]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name.lower() in {"localhost", "localhost.localdomain"}


def _has_password(settings: Settings) -> bool:
    return bool(settings.smtp_password.get_secret_value() or settings.smtp_password_file)


def _password_in_clear(settings: Settings) -> Finding | None:
    remote = _remote_hosts(settings)
    if settings.smtp_tls != "off" or not remote:
        return None
    if settings.smtp_username and _has_password(settings):
        detail = f"SMTP_TLS=off and a password for {remote[0]}: Relay never sends one in clear, so nobody logs in"
        return failed("settings", detail, "set SMTP_TLS=auto")
    detail = f"SMTP_TLS=off: whoever is on the way to {remote[0]} reads every mail"
    return warning("settings", detail, "set SMTP_TLS=auto, unless the network between is yours alone")


def _unverified(settings: Settings) -> Finding | None:
    remote = _remote_hosts(settings)
    if settings.smtp_tls_verify or settings.smtp_tls == "off" or not remote:
        return None
    detail = f"SMTP_TLS_VERIFY=false: whoever pretends to be {remote[0]} gets the password and every mail"
    return warning("settings", detail, "set it to true, and SMTP_CA_FILE when the authority is your own")


def _half_a_login(settings: Settings) -> Finding | None:
    if bool(settings.smtp_username) == _has_password(settings):
        return None
    there, missing = (
        ("SMTP_USERNAME", "SMTP_PASSWORD") if settings.smtp_username else ("SMTP_PASSWORD", "SMTP_USERNAME")
    )
    return warning("settings", f"{there} is set and {missing} is not: nobody logs in", f"set {missing} too")


def _sender(settings: Settings) -> Finding | None:
    domain = settings.sender.rpartition("@")[2].rstrip(">").strip().lower()
    if not domain or domain in settings.smtp_allowed_from_domains:
        return None
    detail = (
        f"{domain} of DEFAULT_SMTP_FROM is not in SMTP_ALLOWED_FROM_DOMAINS: a request that names the default sender as"
        " its own is refused"
    )
    return warning("settings", detail, f"add {domain} to SMTP_ALLOWED_FROM_DOMAINS, unless that is meant")


def _connections(settings: Settings) -> Finding | None:
    connections = settings.smtp_pool_size * settings.relay_send_workers
    if connections <= MANY_CONNECTIONS or not any(region_of(name) for name, _ in settings.smtp_hosts):
        return None
    detail = f"{settings.relay_send_workers} send workers may open {connections} connections to Amazon SES together"
    return warning(
        "settings", detail, f"lower SMTP_POOL_SIZE: {MANY_CONNECTIONS} in all carry more than most accounts may"
    )


def _drain(settings: Settings) -> Finding | None:
    if settings.drain_seconds <= USUAL_STOP_SECONDS:
        return None
    detail = f"DRAIN_SECONDS is {settings.drain_seconds:g}; by itself Kubernetes kills after {USUAL_STOP_SECONDS} s"
    seconds = settings.drain_seconds + 15
    remedy = (
        f"set terminationGracePeriodSeconds (systemd: TimeoutStopSec) to {seconds:g} or more, where that runs Relay"
    )
    return warning("settings", detail, remedy)


def _timeouts(settings: Settings) -> Finding | None:
    if settings.smtp_dot_timeout_seconds >= settings.send_timeout_seconds:
        return None
    detail = (
        f"SMTP_DOT_TIMEOUT_SECONDS ({settings.smtp_dot_timeout_seconds:g}) is less than SEND_TIMEOUT_SECONDS"
        f" ({settings.send_timeout_seconds:g}): mails end in doubt whose answer was still to come"
    )
    return warning("settings", detail, "raise SMTP_DOT_TIMEOUT_SECONDS (120 is its default)")


def _events(settings: Settings) -> Finding | None:
    if not settings.ses_configuration_set or settings.ses_eventing_enabled:
        return None
    detail = "SES_CONFIGURATION_SET is set and SES_EVENTING_ENABLED is false: nobody reads the events here"
    return warning("settings", detail, "set SES_EVENTING_ENABLED=true in one relay, unless another one reads them")
