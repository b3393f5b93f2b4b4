"""Every setting, one row each: name, type, default, unit, meaning. The only reader of the environment.

Names are those of ``lfx-v2-email-service`` where it has the setting, else the field's own words with
the unit in the name. A row's ``why`` is the reason for its default. The README's table and
``conf/relay.env.example`` are made from these rows, and a test holds them to it.

An empty variable counts as unset (orchestrators set such), but for the four lists SMTP_ALLOWED_…, where
it has a meaning of its own, by the contract for the three of domains: the empty list.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from dotenv.parser import parse_stream
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from relay.errors import AddressInvalid, ConfigError
from relay.submission.address import parse_address
from relay.submission.fields import DEFAULT_ALLOWED_HEADERS, header_patterns
from relay.submission.policy import normalised_domains

TRUE_WORDS = frozenset({"true", "t", "1"})
FALSE_WORDS = frozenset({"false", "f", "0"})


class Group(StrEnum):
    """Headings of the settings table, in its order."""

    RELAY = "The relay"
    NATS = "NATS"
    SMTP = "The smarthost"
    POLICY = "Senders and recipients"
    TRACKING = "Tracking"
    SES = "Amazon SES"
    LOGS = "Logs"
    TRACES = "Traces"


def _boolean(value: object) -> object:
    """``true/t/1/false/f/0`` in any case, nothing else: ``yes`` or ``on`` is an error, not a silent false."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
        raise ValueError("must be true, t, 1, false, f or 0")
    return value


def _words(value: object) -> object:
    """A comma-separated list; white space and empty entries are dropped."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _domains(value: object) -> object:
    words = _words(value)
    if isinstance(words, tuple):
        return normalised_domains(words)
    return words


def _nats_url(value: object) -> object:
    for part in str(value).split(","):
        try:
            url = urlsplit(part.strip())
            is_usable = url.scheme in {"nats", "tls"} and bool(url.hostname) and url.port != 0
        except ValueError:  # its text may hold part of a password
            is_usable = False
        if not is_usable:
            raise ValueError("must be nats://host:port (or tls://), several separated by commas")
    return value


def _host_and_port(text: str) -> tuple[str, int]:
    """``host``, ``host:port``, ``[address]:port`` or a bare IPv6 address; port 0: none is named.

    Raises ``ValueError``.
    """
    text = text.strip()
    name, port = text, ""
    if text.startswith("["):
        name, bracket, port = text[1:].partition("]")
        if not bracket or (port and not re.fullmatch(r":.+", port)):
            raise ValueError(f"{text[:60]!r} is not [address]:port")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        name, _, port = text.partition(":")
        if not port:
            raise ValueError(f"{text[:60]!r} names no port after its colon")
    if not re.fullmatch(r"[\w.:%-]+", name):
        # What has an @ may be a URL with a password.
        shown = "what is given" if "@" in text else repr(text[:60])
        raise ValueError(f"{shown} is no host name")
    if port and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"{port[:10]!r} is no port (1 to 65535)")
    return name, int(port or 0)


def _smtp_hosts(value: object) -> object:
    for part in str(value).split(","):
        _host_and_port(part)
    return value


def _read_secret(path: str) -> str:
    return Path(path).read_text(encoding="utf-8").removesuffix("\n")


def _secret_file(value: str) -> str:
    if value:
        try:
            secret = _read_secret(value)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            from relay.bus.access import shown_path

            raise ValueError(f"{shown_path(value)} cannot be read: {why}") from error
        if not secret or "\n" in secret:
            raise ValueError(f"{value} must hold one line with the password")
    return value


def _mailbox(value: object) -> object:
    try:
        if value:
            parse_address(str(value))
    except AddressInvalid as error:
        raise ValueError(f"is no mail address: {error}") from error
    return value


def _header_names(value: object) -> object:
    words = _words(value)
    return header_patterns(words) if isinstance(words, tuple) else words


def _buckets(value: object) -> object:
    words = _words(value)
    for word in words if isinstance(words, tuple) else ():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", word):
            raise ValueError(f"{word[:40]!r} is no name of a bucket: letters, digits, _ and -")
    return words


def _reply_prefixes(value: object) -> object:
    words = _words(value)
    if not isinstance(words, tuple):
        return words
    prefixes = tuple(word.removesuffix(".") for word in words)
    if not prefixes:
        raise ValueError("must name at least one prefix, or nobody would get a reply")
    for prefix in prefixes:
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", prefix):
            raise ValueError(f"{prefix[:40]!r} is no prefix of inboxes: letters, digits, _ and - with dots between")
        if "lfx.email-service".startswith(prefix) or prefix.startswith("lfx.email-service"):
            raise ValueError(f"{prefix!r} would let callers have the relay write to its own subjects")
    return prefixes


def _ca_file(value: object) -> object:
    if value:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(str(value))
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot be used as a file of CA certificates in PEM: {error.strerror}") from error
    return value


def _nats_file(read: Callable[[ModuleType, str], object]) -> AfterValidator:
    """A file that is read at each connection, and now once to see whether it can be."""

    def check(value: str) -> str:
        if value:
            # Here, as below: who does without NATS need not load what is for it.
            from relay.bus import access

            try:
                read(access, value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    return AfterValidator(check)


def _inbox_prefix(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value):
        raise ValueError("must be tokens of letters, digits, _ and - with dots between, such as _INBOX.relay")
    return value


def _queue_url(value: object) -> object:
    if value:
        url = urlsplit(str(value))
        if url.scheme not in {"https", "http"} or not url.hostname or not url.path.strip("/"):
            raise ValueError("must be the queue's URL: https://sqs.<region>.amazonaws.com/<account>/<queue>")
    return value


def _token(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_-]{0,64}", value):
        raise ValueError("may hold only A-Z a-z 0-9 _ -, at most 64 (Amazon's rule)")
    return value


Boolean = Annotated[bool, BeforeValidator(_boolean)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Domains = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_domains)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


def _row(group: Group, default: object, meaning: str, why: str = "", **bounds: Any) -> Any:
    return Field(default=default, description=meaning, json_schema_extra={"group": group, "why": why}, **bounds)


class Settings(BaseSettings):
    """The settings of one process, read once. Use ``load_settings``; it words the errors."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # -- the relay
    email_enabled: Boolean = _row(
        Group.RELAY,
        False,
        "Send mail. When false, requests are answered with success and empty ids and nothing is sent.",
    )
    port: Port = _row(Group.RELAY, 8080, "Port of the health page: `/livez`, `/readyz`, `/metrics`.")
    relay_http_host: str = _row(
        Group.RELAY, "0.0.0.0", "Address the health page listens on.", "probes come from outside the container"
    )
    relay_send_workers: int = _row(
        Group.RELAY, 2, "Send workers on this host.", "one per core of a small machine", ge=1, le=64
    )
    relay_status_workers: int = _row(
        Group.RELAY,
        1,
        "Status workers on this host; the first serves the health page.",
        "one answers thousands of small questions a second, also while large groups are being read",
        ge=1,
        le=64,
    )
    relay_state_dir: Path = _row(
        Group.RELAY, Path("var"), "Directory for supervisord's socket, logs and the development stack's data."
    )
    send_timeout_seconds: Seconds = _row(
        Group.RELAY, 30, "Bounds an attempt up to the final dot: queueing, dialling, the transaction.", "as lfx"
    )
    drain_seconds: Seconds = _row(
        Group.RELAY, 25, "How long a worker that is told to stop may finish what is in flight.", "as lfx"
    )
    backlog_limit: int = _row(
        Group.RELAY,
        5000,
        "Requests one worker holds at a time; more are answered `overloaded`, as are those that it does not expect to"
        " serve in time.",
        ge=1,
        le=1_000_000,
    )
    backlog_limit_bytes: int = _row(
        Group.RELAY, 64_000_000, "Bytes of requests one worker holds at a time.", ge=1_000_000
    )
    request_id_ttl_hours: float = _row(
        Group.RELAY,
        24,
        "How long the answer to a `request_id` is remembered, when Relay makes the bucket `email-requests`.",
        "longer than anybody tries again; each id costs NATS about 430 bytes of memory for as long",
        ge=1,
        le=8760,
    )
    relay_reply_prefixes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_reply_prefixes)] = _row(
        Group.RELAY,
        ("_INBOX", "_R_"),
        "First tokens that a reply subject may have; a request that wants its reply elsewhere is dropped.",
        "clients' inboxes and service imports; anything else could make the relay write records or facts",
    )

    # -- NATS
    nats_url: Annotated[str, BeforeValidator(_nats_url)] = _row(
        Group.NATS, "nats://localhost:4222", "NATS servers, separated by commas; may hold `user:password@`."
    )
    nats_creds: Annotated[str, _nats_file(lambda access, path: access.read_creds(path))] = _row(
        Group.NATS, "", "File with the user's JWT and seed, as `nsc generate creds` writes it."
    )
    nats_nkey_seed_file: Annotated[str, _nats_file(lambda access, path: access.read_seed(path))] = _row(
        Group.NATS, "", "File with the seed of the user's nkey (`SU…`)."
    )
    nats_user: str = _row(Group.NATS, "", "User name, instead of one in `NATS_URL`.")
    nats_password: SecretStr = _row(Group.NATS, SecretStr(""), "Password of `NATS_USER`.")
    nats_password_file: Annotated[str, _nats_file(lambda access, path: access.read_line(path))] = _row(
        Group.NATS,
        "",
        "File that holds the password, instead of `NATS_PASSWORD`; a line end at its end is no part of it.",
    )
    nats_token_file: Annotated[str, _nats_file(lambda access, path: access.read_line(path))] = _row(
        Group.NATS, "", "File that holds a token, for servers that ask for one."
    )
    nats_ca: Annotated[str, _nats_file(lambda access, path: access.tls_context(path, "", ""))] = _row(
        Group.NATS,
        "",
        "File of CA certificates in PEM instead of the system's; set, nothing is said to NATS but over TLS.",
    )
    nats_cert: str = _row(Group.NATS, "", "File with our own certificate in PEM, for servers that ask for one.")
    nats_key: str = _row(Group.NATS, "", "File with the key of `NATS_CERT`, without a passphrase.")
    nats_tls_first: Boolean = _row(
        Group.NATS, False, "Begin with TLS before NATS has said anything: for servers with `handshake_first`."
    )
    nats_inbox_prefix: Annotated[str, AfterValidator(_inbox_prefix)] = _row(
        Group.NATS,
        "_INBOX",
        "Beneath it arrive the answers to what Relay asks NATS: give its user a prefix of its own (`_INBOX.relay`).",
        "as every client; whoever may subscribe to `_INBOX.>` hears what others are answered",
    )
    nats_trust_request_info: Boolean = _row(
        Group.NATS,
        False,
        "Take the caller from `Nats-Request-Info`: request ids are then each caller's own, and records name it.",
        "only true where every caller comes through a service import with `share`: others could write the header",
    )
    object_store_buckets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_buckets)] = _row(
        Group.NATS,
        (),
        "Object Store buckets that requests may refer to; empty: none.",
        "the relay reads them on a caller's behalf: whoever may send a mail may have what lies there sent",
    )

    # -- the smarthost
    smtp_host: Annotated[str, BeforeValidator(_smtp_hosts)] = _row(
        Group.SMTP,
        "localhost",
        "Host name of the smarthost; or several, separated by commas, of which the first that works is used."
        " Each may have a port of its own: `host:port`.",
    )
    smtp_port: Port = _row(Group.SMTP, 587, "Port of the hosts that name none.")
    smtp_username: str = _row(Group.SMTP, "", "User name; AUTH is used when user name and password are both set.")
    smtp_password: SecretStr = _row(Group.SMTP, SecretStr(""), "Password.")
    smtp_password_file: Annotated[str, AfterValidator(_secret_file)] = _row(
        Group.SMTP,
        "",
        "File that holds the password, instead of `SMTP_PASSWORD`; a line end at its end is no part of it.",
    )
    smtp_tls: Literal["auto", "starttls", "implicit", "off"] = _row(
        Group.SMTP,
        "auto",
        "`auto`: implicit TLS on ports 465 and 2465, else STARTTLS when offered, and required when credentials are"
        " set and the host is not loopback. `starttls`, `implicit`: required. `off`: never.",
    )
    smtp_tls_verify: Boolean = _row(Group.SMTP, True, "Verify the smarthost's certificate and name.")
    smtp_ca_file: Annotated[str, AfterValidator(_ca_file)] = _row(
        Group.SMTP, "", "File of CA certificates in PEM instead of the system's."
    )
    smtp_helo_name: str = _row(
        Group.SMTP, "", "Name given in EHLO; empty: this host's name.", pattern=r"^[A-Za-z0-9.\-:\[\]]*$"
    )
    smtp_pool_size: int = _row(
        Group.SMTP, 20, "Connections one send worker keeps open at most, dialling ones included.", ge=1, le=1000
    )
    smtp_idle_seconds: Seconds = _row(
        Group.SMTP, 5, "Idle connections are closed after this long.", "SES hangs up at about 10 s"
    )
    smtp_max_connection_age_seconds: Seconds = _row(
        Group.SMTP, 300, "Connections are replaced at this age.", "a smarthost behind a load balancer moves"
    )
    smtp_max_messages_per_connection: int = _row(
        Group.SMTP, 1000, "Mails sent over one connection before it is replaced.", ge=1
    )
    smtp_max_recipients_per_second: float = _row(
        Group.SMTP,
        0,
        "Recipients a second that this host's send workers hand over together; 0: what the smarthost takes"
        " (it is slowed down for when the smarthost says 454).",
        "an Amazon SES account's own sending rate is the right value there",
        ge=0,
        le=1_000_000,
    )
    smtp_max_message_bytes: int = _row(
        Group.SMTP,
        40_000_000,
        "Size of a mail with options (attachments in base64) above which its request is refused.",
        "what Amazon SES takes; above 10 MB it takes them slowly",
        ge=10_000,
        le=1_000_000_000,
    )
    smtp_connect_timeout_seconds: Seconds = _row(
        Group.SMTP, 10, "Resolving the name, and connecting.", "RFC 5321 §4.5.3.2 allows minutes a phase; callers wait"
    )
    smtp_banner_timeout_seconds: Seconds = _row(Group.SMTP, 10, "The first 220.")
    smtp_ehlo_timeout_seconds: Seconds = _row(Group.SMTP, 10, "The reply to EHLO.")
    smtp_starttls_timeout_seconds: Seconds = _row(Group.SMTP, 10, "The reply to STARTTLS, and the TLS handshake.")
    smtp_auth_timeout_seconds: Seconds = _row(Group.SMTP, 10, "Each reply while logging in.")
    smtp_mail_timeout_seconds: Seconds = _row(Group.SMTP, 10, "The reply to MAIL.")
    smtp_rcpt_timeout_seconds: Seconds = _row(Group.SMTP, 20, "The reply to each RCPT.", "servers look things up here")
    smtp_data_timeout_seconds: Seconds = _row(Group.SMTP, 20, "The reply to DATA.")
    smtp_content_timeout_seconds: Seconds = _row(Group.SMTP, 60, "Handing the content to the network.")
    smtp_dot_timeout_seconds: Seconds = _row(
        Group.SMTP,
        120,
        "The reply to the final dot. The caller is told `in_doubt` after SEND_TIMEOUT_SECONDS; the record is"
        " settled when the reply comes.",
        "the RFC's 10 minutes would keep a hung server's connections taken for as long",
    )
    smtp_rset_timeout_seconds: Seconds = _row(Group.SMTP, 5, "The reply to RSET, and to NOOP.")
    smtp_quit_timeout_seconds: Seconds = _row(Group.SMTP, 1, "The reply to QUIT.", "nothing depends on it")
    smtp_wait_exit: Boolean = _row(
        Group.SMTP,
        False,
        "Exit 75 when the smarthost did not answer 11 pings at start, instead of going on trying.",
        "supervisord has no back-off; orchestrators have",
    )

    # -- senders and recipients
    default_smtp_from: Annotated[str, AfterValidator(_mailbox)] = _row(
        Group.POLICY,
        "noreply@lfx.linuxfoundation.org",
        "Envelope sender and From address when a request names none.",
    )
    smtp_from: Annotated[str, AfterValidator(_mailbox)] = _row(
        Group.POLICY, "", "Older name of `DEFAULT_SMTP_FROM`, used when that is not set."
    )
    default_smtp_from_display_name: str = _row(Group.POLICY, "LFX Self Serve", "Display name of the From header.")
    smtp_allowed_from_domains: Domains = _row(
        Group.POLICY, ("lfx.linuxfoundation.org",), 'Domains a request\'s `from` may have, exactly; `""`: none.'
    )
    smtp_allowed_reply_to_domains: Domains = _row(
        Group.POLICY, ("linuxfoundation.org",), 'Domains, with their subdomains, a `reply_to` may have; `""`: none.'
    )
    smtp_allowed_recipient_domains: Domains = _row(
        Group.POLICY, (), 'Domains, with their subdomains, that get mail at all; `""`: every domain.'
    )

    smtp_max_recipients: int = _row(
        Group.POLICY,
        50,
        "Recipients one request may name, `to`, `cc` and `bcc` together.",
        "what Amazon SES takes a mail",
        ge=1,
        le=100,
    )
    smtp_allowed_headers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_header_names)] = _row(
        Group.POLICY,
        DEFAULT_ALLOWED_HEADERS,
        "Header fields that a request's `headers` may set; a `*` at the end stands for any rest. Never `X-SES-*`,"
        ' `X-LFX-*`, nor what says who gets a mail and how it is read. `""`: none.',
    )

    # -- tracking
    tracking_ack_seconds: Seconds = _row(
        Group.TRACKING, 1, "How long a reply waits for the record to be stored; then it goes out untracked."
    )
    tracking_replicas: int = _row(
        Group.TRACKING, 1, "Replicas of Relay's buckets and streams, when Relay makes them.", ge=1, le=5
    )
    tracking_ttl_days: int = _row(
        Group.TRACKING, 0, "Days that records and facts are kept, when Relay makes bucket and log; 0: for ever.", ge=0
    )
    tracking_storage: Literal["file", "memory"] = _row(Group.TRACKING, "file", "Where JetStream keeps them.")

    # -- Amazon SES
    ses_configuration_set: Annotated[str, BeforeValidator(_token)] = _row(
        Group.SES, "", "Configuration set named in every mail, so that SES publishes its events; empty: no header."
    )
    ses_eventing_enabled: Boolean = _row(
        Group.SES,
        False,
        "Run the engagement worker: it reads what SES tells of mails (delivered, opened, bounced …) from a queue.",
    )
    ses_engagement_sqs_queue_url: Annotated[str, BeforeValidator(_queue_url)] = _row(
        Group.SES,
        "",
        "URL of that SQS queue; required when `SES_EVENTING_ENABLED` is true. Credentials are found as by every program"
        " that uses boto3.",
    )
    aws_region: str = _row(
        Group.SES,
        "",
        "Region of a queue whose URL does not name it; empty: boto3's own (`AWS_DEFAULT_REGION`, its files).",
        pattern=r"^[a-z0-9-]*$",
    )
    engagement_pollers: int = _row(
        Group.SES,
        4,
        "How many batches of up to 10 events are received and handled at the same time.",
        "those that wait at the same time share writes, so an event costs less than with two; more bring little",
        ge=1,
        le=64,
    )
    engagement_early_seconds: float = _row(
        Group.SES,
        60,
        "How old a mail must be before an event for which there is no record is no longer taken for merely early.",
        "a mail's first event may be faster than its record; minutes without a record mean that there is none",
        ge=0,
        le=43_200,
    )
    engagement_receive_failures: int = _row(
        Group.SES,
        3,
        "The engagement worker exits 1, and is started again, after so many failed receives one after the other;"
        " 0: it goes on trying.",
        "as lfx",
        ge=0,
    )

    # -- logs
    log_level: Literal["debug", "info", "warn", "error"] = _row(Group.LOGS, "info", "Least level that is logged.")
    log_format: Literal["auto", "json", "text"] = _row(
        Group.LOGS,
        "auto",
        "One JSON object a line, or text; `auto`: text in the foreground on a terminal.",
    )
    log_add_source: Boolean = _row(Group.LOGS, False, "Add file and line to every log line.")

    # -- traces; text, since a value that OpenTelemetry does not know must not keep mail from being sent
    otel_traces_exporter: str = _row(
        Group.TRACES,
        "",
        "`otlp`, `console` or `none`; unset: `otlp` when one of the endpoints is set. Needs the extra `otel`."
        " `docs/tracing.md` names the other `OTEL_*` variables.",
        "traces cost CPU time, and somebody must take them",
    )
    otel_exporter_otlp_endpoint: str = _row(
        Group.TRACES, "", "URL of a collector for OTLP over HTTP, such as `http://collector:4318`."
    )
    otel_exporter_otlp_traces_endpoint: str = _row(
        Group.TRACES, "", "The same for traces alone, with its path: `http://collector:4318/v1/traces`."
    )
    otel_exporter_otlp_protocol: str = _row(
        Group.TRACES, "", "`http/protobuf`, which is also used when it is unset; `grpc` does not go with gevent."
    )
    otel_exporter_otlp_traces_protocol: str = _row(Group.TRACES, "", "The same for traces alone.")
    otel_sdk_disabled: str = _row(Group.TRACES, "", "`true`: no traces, whatever else is set.")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in values.items() if value != "" or name.lower() in ALLOWED_LISTS}

    @model_validator(mode="after")
    def _one_password(self) -> Settings:
        if self.smtp_password_file and self.smtp_password.get_secret_value():
            raise ValueError("both SMTP_PASSWORD and SMTP_PASSWORD_FILE are set; unset one of them")
        return self

    @model_validator(mode="after")
    def _one_nats_login(self) -> Settings:
        is_set = {
            "NATS_CREDS": bool(self.nats_creds),
            "NATS_NKEY_SEED_FILE": bool(self.nats_nkey_seed_file),
            "NATS_USER": bool(self.nats_user),
            "NATS_TOKEN_FILE": bool(self.nats_token_file),
            "a user in NATS_URL": "@" in self.nats_url,
        }
        ways = [name for name in is_set if is_set[name]]
        if len(ways) > 1:
            raise ValueError(f"both {ways[0]} and {ways[1]} are set, and there is one login; unset one of them")
        password, file = self.nats_password.get_secret_value(), self.nats_password_file
        if password and file:
            raise ValueError("both NATS_PASSWORD and NATS_PASSWORD_FILE are set; unset one of them")
        if self.nats_user and not (password or file):
            raise ValueError("NATS_USER is set without NATS_PASSWORD or NATS_PASSWORD_FILE; set one of them")
        if not self.nats_user and (password or file):
            name = "NATS_PASSWORD" if password else "NATS_PASSWORD_FILE"
            raise ValueError(f"{name} is set without NATS_USER; set it, or unset {name}")
        return self

    @model_validator(mode="after")
    def _whole_nats_certificate(self) -> Settings:
        if bool(self.nats_cert) != bool(self.nats_key):
            there, missing = ("NATS_CERT", "NATS_KEY") if self.nats_cert else ("NATS_KEY", "NATS_CERT")
            raise ValueError(f"{there} is set without {missing}; set both or none")
        if self.nats_cert:
            from relay.bus.access import tls_context

            try:
                tls_context(self.nats_ca, self.nats_cert, self.nats_key)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _inbox_gets_replies(self) -> Settings:
        prefix = self.nats_inbox_prefix
        if "nats_inbox_prefix" not in self.model_fields_set:
            return self
        if not any(f"{prefix}.".startswith(f"{allowed}.") for allowed in self.relay_reply_prefixes):
            raise ValueError(
                f"NATS_INBOX_PREFIX {prefix} is under none of RELAY_REPLY_PREFIXES, so `relayctl` would get no reply;"
                " begin it with one of them"
            )
        return self

    @model_validator(mode="after")
    def _eventing_has_a_queue(self) -> Settings:
        if self.ses_eventing_enabled and not self.ses_engagement_sqs_queue_url:
            raise ValueError("SES_EVENTING_ENABLED is true and SES_ENGAGEMENT_SQS_QUEUE_URL is not set; set it")
        return self

    @property
    def smtp_hosts(self) -> tuple[tuple[str, int], ...]:
        """The smarthost's hosts with their ports, in order of preference."""
        return tuple((name, port or self.smtp_port) for name, port in map(_host_and_port, self.smtp_host.split(",")))

    @property
    def smarthost(self) -> str:
        """The smarthost's hosts in one line, for people."""
        return ", ".join(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name, port in self.smtp_hosts)

    @property
    def smtp_secret(self) -> str:
        """The password, wherever it comes from. Raises ``ConfigError`` when its file cannot be read any more."""
        if not self.smtp_password_file:
            return self.smtp_password.get_secret_value()
        try:
            return _read_secret(self.smtp_password_file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"SMTP_PASSWORD_FILE cannot be read: {error}") from error

    @property
    def sender(self) -> str:
        """The default envelope sender, its older name considered."""
        if "default_smtp_from" in self.model_fields_set:
            return self.default_smtp_from
        return self.smtp_from or self.default_smtp_from


ALLOWED_LISTS = frozenset(name for name in Settings.model_fields if name.startswith("smtp_allowed_"))


def load_settings(defaults: Mapping[str, str] | None = None) -> Settings:
    """Reads the environment; ``defaults`` (by environment name) stand in for what it leaves unset.

    Raises ``ConfigError`` whose text names every bad setting and what is wrong with it.
    """
    unset = {name.lower(): value for name, value in (defaults or {}).items() if not os.environ.get(name)}
    try:
        return Settings(**unset)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(_in_words(error)) from None


def child_environment(defaults: Mapping[str, str], **fixed: str) -> dict[str, str]:
    """The environment for the programs: this one, ``defaults`` where it sets nothing, and ``fixed`` in any case."""
    unset = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    return {**os.environ, **unset, **fixed}


def captured(defaults: Mapping[str, str], **fixed: str) -> dict[str, str]:
    """What this environment says, of Relay's settings and of what its libraries read (AWS_*, OTEL_*), by name.

    ``defaults`` where it sets nothing, ``fixed`` in any case; what is set to nothing is ''. Not RELAY_STATE_DIR, which
    says where what is captured is kept. Raises ``ConfigError`` when a value is no text, which nothing can keep.
    """
    found = {_name_of(name): value for name, value in os.environ.items() if _is_handed_on(name)}
    if unfit := [name for name, value in found.items() if any("\ud800" <= letter <= "\udfff" for letter in value)]:
        raise ConfigError(f"the value of {', '.join(sorted(unfit))} is not text in UTF-8; set it to something that is")
    return found | {name: value for name, value in defaults.items() if not found.get(name)} | fixed


def adopt(values: Mapping[str, str]) -> None:
    """Makes ``values``, as they were ``captured``, all that this environment says of them."""
    for name in [name for name in os.environ if _is_handed_on(name)]:
        del os.environ[name]
    os.environ.update(values)


def is_set(name: str, value: str) -> bool:
    """Whether that is more than the default: an empty variable counts as unset, but for the lists SMTP_ALLOWED_…."""
    return bool(value) or name.lower() in ALLOWED_LISTS


SECRET_WORDS = ("PASSWORD", "URL", "ENDPOINT", "CREDS", "SEED", "TOKEN", "KEY")
"""In the names of settings whose wrong values are not shown: what belongs into a file may stand in the file's place."""


def is_secret(name: str, *, is_wrong: bool = False) -> bool:
    """Whether the value of a variable is never shown; of one that ``is_wrong`` less is."""
    field = Settings.model_fields.get(name.lower())
    if field is None or field.annotation is SecretStr:
        return True
    return is_wrong and any(word in name.upper() for word in SECRET_WORDS)


def without_login(name: str, value: str) -> str:
    """A setting's value as it may be shown when it is no secret: of URLs not user and password, whatever they hold."""
    if "//" not in value and name.upper().endswith(("_URL", "_ENDPOINT")):
        return value.rpartition("@")[2]
    # Several URLs are separated by commas, which a password may hold as well.
    return re.sub(r"//(?:(?!,\s*\w+://).)*@", "//", value, flags=re.DOTALL)


def _is_handed_on(name: str) -> bool:
    is_ours = name.lower() in Settings.model_fields and name.lower() != "relay_state_dir"
    return is_ours or name.startswith(FOREIGN_PREFIXES)


def _name_of(variable: str) -> str:
    return variable.upper() if variable.lower() in Settings.model_fields else variable


FOREIGN_PREFIXES = ("AWS_", "OTEL_")
"""Of variables that boto3 and OpenTelemetry read by themselves."""


def apply_env_file(path: str) -> None:
    """Puts what the file sets (``NAME=value`` lines) into the environment, where that has it not already.

    Raises ``ConfigError`` when the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            bindings = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error}") from error
    for name, value, original, is_broken in bindings:
        if is_broken:
            raise ConfigError(f"{path} line {original.line} is not NAME=value: {original.string.strip()[:60]!r}")
        if name is None:
            continue
        is_set = name in os.environ if name.lower() in ALLOWED_LISTS else bool(os.environ.get(name))
        if value is not None and not is_set:
            os.environ[name] = value
            _from_file[name] = path


def source_of(name: str) -> str:
    """Where a setting that is set comes from: ``environment``, or the file's path."""
    return _from_file.get(name, "environment")


_from_file: dict[str, str] = {}


NAMES_OF_CONF = frozenset({"RELAY_NATS_PASSWORD", "RELAY_NKEY"})
"""What the files in ``conf/nats`` have nats-server take from an environment, which may be ours as well."""


def unknown_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """Variables that look like ours and are not: a typing error, or an orchestrator's injection. For a warning."""
    names = os.environ if environ is None else environ
    known = {name.upper() for name in Settings.model_fields} | NAMES_OF_CONF
    ours = ("RELAY_", "SMTP_", "SES_", "ENGAGEMENT_")
    return sorted(name for name in names if name.startswith(ours) and name not in known)


def rows() -> list[tuple[str, FieldInfo, Group, str]]:
    """The table: environment name, field, group, why; in the order of this file."""
    table = []
    for name, field in Settings.model_fields.items():
        extra = cast(dict[str, Any], field.json_schema_extra)
        table.append((name.upper(), field, Group(extra["group"]), str(extra["why"])))
    return table


def _in_words(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_input=True, include_url=False):
        name = str(problem["loc"][0]).upper() if problem["loc"] else "settings"
        told = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        # A rule about several settings is given all of them, the secrets too; it has no name, so it is secret.
        shown = "" if "@" in str(given) or is_secret(name, is_wrong=True) else f" (it is {str(given)[:60]!r})"
        hint = ""
        if isinstance(given, str) and given.startswith("tcp://"):
            hint = "; Kubernetes injected this for a service of that name: set enableServiceLinks: false"
        told = told if told[:2].isupper() else told[:1].lower() + told[1:]  # a variable's name stays as it is
        problems.append(f"  {name}: {told}{shown}{hint}")
    count = f"{len(problems)} settings are" if len(problems) > 1 else "1 setting is"
    return "\n".join([f"{count} wrong", *problems])
