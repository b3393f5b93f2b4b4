"""Preflight: can a relay with these settings run here? Each question asked for real, each answer with its remedy.

Owns the list of questions. Asks NATS, JetStream, the smarthost and the queue of events as the workers would, and
changes nothing but for making the buckets and the log when they are missing (as the first worker would), and that one
message of the queue may count as received once more.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from relay import contract
from relay.bus.client import Bus, without_password
from relay.bus.jetstream import JetStream, old_server_problem
from relay.bus.kv import Bucket
from relay.delivery.config import SmarthostConfig
from relay.delivery.readiness import ping
from relay.errors import BusRefused, BusUnavailable, ConfigError, EgressUnavailable, QueueUnavailable, RelayError
from relay.idempotency.claims import Claims, ClaimsConfig
from relay.ops.parts import queue_config, smarthost_config, storage_config
from relay.ops.supervision import Supervision, check_port_free
from relay.settings import Settings, unknown_names
from relay.tracking.inspection import inspect
from relay.tracking.log import Log
from relay.tracking.storage import why_unusable

if TYPE_CHECKING:  # it brings boto3, which only a relay with a queue of events needs
    from relay.aws.sqs import Queue

CONNECT_SECONDS = 3.0
LEAST_VISIBILITY_SECONDS = 30
"""More than a batch takes while NATS is slow."""
LEAST_MAX_RECEIVES = 20
"""More than the 10 after which Relay itself parks a message, where an operator can look at it."""


class Finding(NamedTuple):
    """The answer to one question."""

    what: str
    ok: bool
    detail: str
    """What was found, or what is wrong and what to do."""
    is_warning: bool = False
    """Not ok, and still the relay would run."""


def findings(settings: Settings) -> Iterator[Finding]:
    """Every answer, as it is found. Takes up to about 15 s where something does not answer."""
    unknown = unknown_names()
    detail = f"no effect: {', '.join(unknown)}; check the spelling" if unknown else "all known"
    yield Finding("settings", not unknown, detail, is_warning=bool(unknown))
    yield from _this_host(settings)
    yield from _nats(settings)
    yield from _smarthost(settings)
    if settings.ses_eventing_enabled:
        yield from _events(settings)


def _this_host(settings: Settings) -> Iterator[Finding]:
    supervision = Supervision(settings.relay_state_dir)
    try:
        supervision.state_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=supervision.state_dir):
            pass
        yield Finding("state directory", True, f"{supervision.state_dir} can be written")
    except OSError as error:
        detail = f"{supervision.state_dir}: {error.strerror}; set RELAY_STATE_DIR to a directory that can be written"
        yield Finding("state directory", False, detail)
    if supervision.is_running():
        yield Finding("port", True, f"{settings.port}: a relay is running here")
        return
    try:
        check_port_free(settings.relay_http_host, settings.port, "PORT")
        yield Finding("port", True, f"{settings.port} is free")
    except RelayError as error:
        yield Finding("port", False, str(error))


def _nats(settings: Settings) -> Iterator[Finding]:
    url = without_password(settings.nats_url)
    bus = Bus(settings.nats_url, "relayctl check")
    bus.start()
    try:
        if not bus.wait_connected(CONNECT_SECONDS):
            yield Finding("NATS", False, f"{url}: {bus.last_error or 'no answer'}; start it, or set NATS_URL")
            return
        yield Finding("NATS", True, f"{url}, server {bus.server_version}")
        if (problem := old_server_problem(bus.server_version)) != "":
            yield Finding("NATS version", False, problem)
        yield _jetstream(bus, settings)
        yield _request_ids(bus, settings)
    finally:
        bus.close()


def _jetstream(bus: Bus, settings: Settings) -> Finding:
    """Asks what the workers ask: the storage, a record, a group's counts; and what would lose data."""
    jetstream = JetStream(bus, timeout_seconds=CONNECT_SECONDS)
    losing = []
    try:
        problem = why_unusable(jetstream, storage_config(settings))
        if not problem:
            Bucket(jetstream, contract.RECIPIENTS_BUCKET).get("no-such-mail")
            Log(jetstream).counts("no-such-group")
            losing = [each for each in inspect(jetstream, storage_config(settings)).remarks if each.loses]
    except (BusRefused, BusUnavailable) as error:
        problem = f"{error}; the user needs permission for $JS.API.> and $KV.{contract.RECIPIENTS_BUCKET}.>"
    if problem:
        return Finding("JetStream", False, f"mail will go out untracked: {problem}", is_warning=True)
    if losing:
        told = "; ".join(f"{each.store} {each.text}" for each in losing)
        return Finding("JetStream", False, f"{told} (`relayctl buckets` says what to do)", is_warning=True)
    return Finding("JetStream", True, f"bucket {contract.RECIPIENTS_BUCKET} and log {contract.LOG_STREAM} are there")


def _request_ids(bus: Bus, settings: Settings) -> Finding:
    """Makes the bucket as a send worker would."""
    config = ClaimsConfig(settings.request_id_ttl_hours, storage_config(settings))
    claims = Claims(JetStream(bus, timeout_seconds=CONNECT_SECONDS), config, "relayctl check")
    try:
        claims.start()
        problem = claims.off_reason
    finally:
        claims.close(0)
    if problem:
        return Finding("request ids", False, f"mail with a request_id will be deferred: {problem}", is_warning=True)
    return Finding("request ids", True, f"bucket {contract.REQUESTS_BUCKET} is there")


def _smarthost(settings: Settings) -> Iterator[Finding]:
    if not settings.email_enabled:
        detail = f"{settings.smarthost} not asked: EMAIL_ENABLED is false, so no mail is sent"
        yield Finding("SMTP", False, detail, is_warning=True)
        return
    problems: dict[str, str] = {}
    try:
        config = smarthost_config(settings)
        for host in config.hosts:
            problems[str(host)] = _ping_problem(dataclasses.replace(config, hosts=(host,)))
    except ConfigError as error:
        yield Finding("SMTP", False, str(error))
        return
    login = f"logged in as {settings.smtp_username}" if settings.smtp_username else "without login"
    # As long as one works mail goes out.
    is_warning = not all(problems.values())
    for where, problem in problems.items():
        what = "SMTP" if len(problems) == 1 else f"SMTP {where}"
        yield Finding(what, not problem, problem or f"{where} takes mail, {login}", bool(problem) and is_warning)


def _ping_problem(config: SmarthostConfig) -> str:
    try:
        ping(config)
    except EgressUnavailable as error:
        return str(error)
    return ""


def _events(settings: Settings) -> Iterator[Finding]:
    if not settings.ses_configuration_set:
        detail = "no event will come: SES_CONFIGURATION_SET is empty; set it to the one that publishes to the queue"
        yield Finding("SES events", False, detail, is_warning=True)
    from relay.aws.sqs import Queue

    try:
        queue = Queue(queue_config(settings))
        yield from _queue(queue)
        yield from _other_pollers(queue, settings)
    except (ConfigError, QueueUnavailable) as error:
        yield Finding("SQS", False, str(error))


def _queue(queue: Queue) -> Iterator[Finding]:
    look = queue.look()
    if missing := queue.missing_permissions():
        yield Finding("SQS", False, f"{queue.url}: the credentials may not {', '.join(missing)}; allow that")
        return
    yield Finding("SQS", True, f"{queue.url} can be read; nothing else may poll it, lfx's own poller least of all")
    if look.visibility_seconds < LEAST_VISIBILITY_SECONDS:
        detail = (
            f"the queue's visibility timeout is {look.visibility_seconds} s: messages come again while they are being"
            f" handled; set it to {LEAST_VISIBILITY_SECONDS} s or more (60 is good)"
        )
        yield Finding("SQS visibility", False, detail, is_warning=True)
    if 0 < look.max_receives < LEAST_MAX_RECEIVES:
        detail = (
            f"the queue gives messages up after {look.max_receives} receives, before Relay has parked what it cannot"
            f" handle; set maxReceiveCount of its redrive policy to {LEAST_MAX_RECEIVES} or more"
        )
        yield Finding("SQS redrive", False, detail, is_warning=True)


def _other_pollers(queue: Queue, settings: Settings) -> Iterator[Finding]:
    """Where no relay runs here, messages in flight are somebody else's."""
    if not Supervision(settings.relay_state_dir).is_running() and (taken := queue.backlog().in_flight):
        detail = (
            f"{taken} messages of the queue are in somebody's hands, and no relay runs here: another relay's, or those"
            " of lfx's own poller, which must be off (SES_EVENTING_ENABLED=false there): it would take Relay's fields"
            " out of the records"
        )
        yield Finding("SQS pollers", False, detail, is_warning=True)
