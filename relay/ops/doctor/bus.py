"""NATS and JetStream: reachable, new enough, allowed, with room and of one time with this host?

``nats`` with ``may_make`` makes the buckets and the log when they are missing, as the first worker would
(``relayctl check``); else nothing is changed, and nothing is written that could stay.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import gevent
import orjson

from relay import __version__, contract
from relay.bus.client import Bus, Msg, Publication, without_password
from relay.bus.jetstream import EXPECTED_STREAM, STREAM_NOT_FOUND, WRONG_STREAM, JetStream, old_server_problem
from relay.bus.kv import Bucket
from relay.bus.micro import NAME
from relay.errors import BusRefused, BusUnavailable, ConfigError
from relay.idempotency.claims import Claims, ClaimsConfig
from relay.ops.doctor.clock import Watch, epoch
from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.doctor.granted import lacking, refused, user_info
from relay.ops.doctor.network import Reach, Trouble, reach
from relay.ops.parts import bus_config, storage_config
from relay.ops.permissions import ASKED, Need, needs, needs_of_operators
from relay.settings import Settings
from relay.tracking.inspection import FACTS, FULL_SHARE, INDEX, RECORDS, REQUESTS, Condition, duration, inspect
from relay.tracking.log import Log
from relay.tracking.record import is_email_id, last_event_at, parse_time
from relay.tracking.storage import DAY_SECONDS, NO_JETSTREAM, NO_JETSTREAM_CODES, why_unusable

CONNECT_SECONDS = 3.0
ASK_SECONDS = 2.0
FLEET_SECONDS = 0.4
DEFAULT_NATS_PORT = 4222
LEAST_PAYLOAD_BYTES = 256 * 1024
"""A record, or the claim of a request to many, may have 64 KiB, and requests are mails."""
NEWEST_MAILS = 200
RECENT_SECONDS = 3600.0
PROBED = {
    RECORDS: f"$KV.{contract.RECIPIENTS_BUCKET}.probe",
    FACTS: f"{contract.LOG_PREFIX}.probe.probe",
    REQUESTS: f"$KV.{contract.REQUESTS_BUCKET}.probe",
}
UNTRACKED = "mail will go out untracked"
IN_A_CONTAINER = "; in a container localhost is the container itself"
NO_ANSWER_REMEDY = (
    "in a cluster more than half of its servers must run: `nats server report jetstream` shows them; else look into the"
    " NATS server's log (a full or slow disk)"
)


Programs = Mapping[int, str]
"""The workers that run here, by pid."""
NOTHING_RUNS: Programs = {}


def nats(settings: Settings, *, may_make: bool = True, running: Programs = NOTHING_RUNS) -> Iterator[Finding]:
    """The questions, as they are answered. Each takes some seconds at most."""
    try:
        bus = Bus(bus_config(settings), "relayctl")
    except ConfigError as error:
        yield failed("NATS", str(error), "mend the setting that it names")
        return
    url = without_password(settings.nats_url)
    bus.start()
    try:
        if not bus.wait_connected(CONNECT_SECONDS):
            yield failed("NATS", *_why_not(settings.nats_url, url, bus.last_error))
            return
        yield well("NATS", f"{url}, server {bus.server_version}")
        if old := old_server_problem(bus.server_version):
            problem, _, _ = old.rpartition("; ")
            yield failed("NATS version", problem, "update the server")
        if may_make:
            yield _storage_as_a_worker(bus, settings)
            yield _request_ids(bus, settings)
        else:
            yield from _thorough(bus, settings, running)
    finally:
        bus.close()


# -- can it be reached -------------------------------------------------------------------------------------------
def _why_not(urls: str, shown: str, said: str) -> tuple[str, str]:
    """Why there is no connection: what the network says, else what NATS says."""
    reached = _reach_all(urls)
    if reached and all(each.trouble is not Trouble.NONE for each in reached):
        worst = reached[0]
        remedy = worst.remedy("NATS_URL", "NATS_URL")
        if worst.trouble is Trouble.REFUSED:
            remedy = "start it, or set NATS_URL" + (IN_A_CONTAINER if worst.is_loopback else "")
        return f"{shown}: {'; '.join(each.problem for each in reached)}", remedy
    problem, _, remedy = (said or "no answer").partition("; ")
    if not remedy:
        remedy = "check that NATS_URL is a NATS server's client port (4222), and whether it asks for TLS or a login"
    return f"{shown}: {problem}", remedy


def _reach_all(urls: str) -> list[Reach]:
    parsed = [urlsplit(part.strip()) for part in urls.split(",")]
    asked = [gevent.spawn(reach, url.hostname or "", url.port or DEFAULT_NATS_PORT) for url in parsed]
    gevent.joinall(asked)
    return [each.get() for each in asked]


def _unreachable(urls: str) -> Iterator[Finding]:
    """Servers of several that cannot be reached: the others are connected to, until they fail."""
    if "," not in urls:
        return
    for each in _reach_all(urls):
        if each.trouble is not Trouble.NONE:
            detail = f"of the servers in NATS_URL one cannot be used: {each.problem}"
            yield warning("NATS servers", detail, each.remedy("NATS_URL", "NATS_URL"))


# -- as a worker would ask ---------------------------------------------------------------------------------------
def _storage_as_a_worker(bus: Bus, settings: Settings) -> Finding:
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
        problem = str(error)
    if problem:
        return warning("JetStream", f"{UNTRACKED}: {problem}", _storage_remedy(problem))
    if losing:
        told = "; ".join(f"{each.store} {each.text}" for each in losing)
        return warning("JetStream", told, "`relayctl buckets` says what to do")
    return well("JetStream", f"bucket {contract.RECIPIENTS_BUCKET} and log {contract.LOG_STREAM} are there")


def _storage_remedy(problem: str) -> str:
    if problem.startswith(NO_JETSTREAM[:20]):
        return "start nats-server with -js and -sd DIRECTORY, or give the account JetStream"
    if "may not publish" in problem:
        return f"the user needs permission for $JS.API.> and $KV.{contract.RECIPIENTS_BUCKET}.> (docs/security.md)"
    if "did not answer" in problem or "no leader" in problem.lower() or "unavailable" in problem:
        return NO_ANSWER_REMEDY
    return "`relayctl buckets` shows what is there; the NATS server's log says more"


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
        return warning("request ids", f"mail with a request_id will be deferred: {problem}", _storage_remedy(problem))
    return well("request ids", f"bucket {contract.REQUESTS_BUCKET} is there")


# -- without a trace ---------------------------------------------------------------------------------------------
def _thorough(bus: Bus, settings: Settings, running: Programs) -> Iterator[Finding]:
    yield from _unreachable(settings.nats_url)
    watch = Watch()
    told = user_info(bus)
    their_time = epoch(told.server_time) if told is not None else None
    if their_time is not None:
        yield watch.compare(their_time, "the NATS server")
    wanted = needs(settings)
    missing = lacking(told.permissions, wanted) if told is not None else refused(bus, wanted)
    if told is not None and _is_operators(told.permissions, wanted, missing, settings.nats_inbox_prefix):
        detail = f"the NATS user {told.user} is an operator's, not the workers': theirs were not looked at"
        yield well("permissions", detail)
    else:
        yield from _permissions(missing, told.user if told is not None else "")
    yield from _payload(bus, settings)
    yield from _versions(bus, running)
    jetstream = JetStream(bus, timeout_seconds=ASK_SECONDS)
    try:
        yield from _account(jetstream, is_allowed=not _is_refused(missing, "$JS.API.STREAM.INFO"))
        yield from _stores(jetstream, settings)
        yield from _lfx(jetstream, settings)
    except (BusRefused, BusUnavailable) as error:
        no_jetstream = isinstance(error, BusRefused) and error.code in NO_JETSTREAM_CODES
        problem = NO_JETSTREAM.partition("; ")[0] if no_jetstream else str(error)
        remedy = _storage_remedy(NO_JETSTREAM if no_jetstream else problem)
        yield warning("JetStream", f"{UNTRACKED}: {problem}", remedy)


def _is_refused(missing: list[Need], prefix: str) -> bool:
    return any(need.subject.startswith(prefix) for need in missing)


def _is_operators(permissions: Mapping[str, Any], wanted: Iterable[Need], missing: list[Need], inbox: str) -> bool:
    """Whether it may do all that ``relayctl`` does, and nothing of what serving begins and ends with."""
    serving = [need for need in wanted if need.subject in ASKED or "RELAY_REPLY_PREFIXES" in need.settings]
    return all(need in missing for need in serving) and not lacking(permissions, needs_of_operators(inbox))


def _permissions(missing: list[Need], user: str) -> Iterator[Finding]:
    who = f"the NATS user {user}" if user else "this NATS user"
    if not missing:
        yield well("permissions", f"{who} may do all that a relay does")
        return
    for group, effect, is_fatal in (
        ([need for need in missing if need.verb == "subscribe" and need.subject in ASKED], "no request arrives", True),
        ([need for need in missing if "RELAY_REPLY_PREFIXES" in need.settings], "callers get no reply", True),
    ):
        if group:
            yield _not_allowed(who, group, effect, is_fatal=is_fatal)
            missing = [need for need in missing if need not in group]
    if missing:
        yield _not_allowed(who, missing, missing[0].why, is_fatal=False)


def _not_allowed(who: str, lacked: list[Need], effect: str, *, is_fatal: bool) -> Finding:
    listed = ", ".join(map(str, lacked[:4])) + (f" and {len(lacked) - 4} more" if len(lacked) > 4 else "")
    detail = f"{who} may not {listed} ({effect})"
    return (failed if is_fatal else warning)("permissions", detail, "grant it; conf/nats has a user with all of them")


def _payload(bus: Bus, settings: Settings) -> Iterator[Finding]:
    most = bus.max_payload_bytes
    if most < LEAST_PAYLOAD_BYTES:
        detail = f"the NATS server takes messages of {most:,} bytes: larger mails and their records are refused"
        yield warning("NATS max_payload", detail, "set max_payload: 1MB (its default) or more in the server's file")
    elif most < settings.smtp_max_message_bytes and settings.object_store_buckets:
        listed = ", ".join(settings.object_store_buckets)
        yield well("NATS max_payload", f"{most:,} bytes; larger requests come through {listed}")
    else:
        yield well("NATS max_payload", f"a request may have {most:,} bytes")


class _Instances:
    """Collects who answers as a worker of Relay."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def take(self, msg: Msg) -> bool:
        if msg.status:  # 503: nobody listens
            return True
        try:
            answer = orjson.loads(msg.payload)
        except orjson.JSONDecodeError:
            return False
        if isinstance(answer, dict) and isinstance(answer.get("metadata"), dict):
            self.told.append(answer)
        return False

    def fail(self, _error: BusUnavailable | BusRefused) -> None:
        """There is nobody to be counted."""


def _versions(bus: Bus, running: Programs) -> Iterator[Finding]:
    instances = _Instances()
    token = bus.request_stream(Publication(f"$SRV.INFO.{NAME}", b""), instances)
    gevent.sleep(FLEET_SECONDS)
    bus.forget(token)
    here: list[str] = []
    elsewhere: set[str] = set()
    for each in instances.told:
        version, metadata = str(each.get("version", "")), each["metadata"]
        if version == __version__:
            continue
        is_here = metadata.get("host") == platform.node() and str(metadata.get("pid", "")).isdigit()
        program = running.get(int(metadata["pid"])) if is_here else None
        if program is not None:
            here.append(f"{program} {version}")
        else:
            elsewhere.add(version)
    if here:
        detail = f"workers here run another version than this relayctl ({__version__}): {', '.join(sorted(here))}"
        yield warning("versions", detail, "after an update say `relayctl restart`")
    if elsewhere:
        detail = f"other workers of the queue group run {', '.join(sorted(elsewhere))}, here it is {__version__}"
        yield warning("versions", detail, "update those hosts too; all of them answer the same callers")


def _account(jetstream: JetStream, *, is_allowed: bool) -> Iterator[Finding]:
    """The account's own limits. Those of the server are known to its operators alone."""
    try:
        told = jetstream.api("INFO")
    except BusRefused as error:
        if error.code in NO_JETSTREAM_CODES or not is_allowed:
            raise
        return  # nothing that a relay needs
    limits = told.get("limits") or {}
    for figure, limit, unit in (
        ("storage", "max_storage", "bytes on disk"),
        ("memory", "max_memory", "bytes of memory"),
        ("streams", "max_streams", "streams"),
    ):
        most, used = int(limits.get(limit, -1)), int(told.get(figure, 0))
        if most > 0 and used >= most * FULL_SHARE:
            detail = f"the account has {most:,} {unit} for JetStream and uses {used / most:.0%}: then nothing is stored"
            yield warning("JetStream limits", detail, f"raise {limit} of the account, or delete what is not needed")


def _stores(jetstream: JetStream, settings: Settings) -> Iterator[Finding]:
    condition = inspect(jetstream, storage_config(settings))
    there = {store.stream for store in condition.stores if store.config is not None}
    missing = [store.name for store in condition.stores if store.stream in PROBED and store.stream not in there]
    probes = [(stream, nats_subject) for stream, nats_subject in PROBED.items() if stream in there]
    answers = jetstream.store([Publication(each, b"", {EXPECTED_STREAM: "none"}) for _, each in probes], ASK_SECONDS)
    is_fine = True
    for (stream, _), answer in zip(probes, answers, strict=True):
        if isinstance(answer, BusUnavailable) or (isinstance(answer, BusRefused) and answer.code != WRONG_STREAM):
            is_fine = False
            effect = "mail with a request_id is deferred" if stream == REQUESTS else UNTRACKED
            yield warning("JetStream", f"{stream}: {effect}: {answer}", _storage_remedy(str(answer)))
    for remark in condition.remarks:
        if remark.store not in missing:
            remedy = remark.command or "`relayctl buckets` shows it beside the others"
            yield warning("JetStream", f"{remark.store} {remark.text}", remedy)
    yield from _ages(condition, settings)
    yield from _copies(jetstream, there)
    if is_fine:
        told = f"not there yet, the first worker makes them: {', '.join(missing)}" if missing else "can be written"
        yield well("JetStream", f"buckets and log: {told}")


def _ages(condition: Condition, settings: Settings) -> Iterator[Finding]:
    """What is kept for less long than the settings say: they count only when Relay makes the stream."""
    wanted_seconds = settings.tracking_ttl_days * DAY_SECONDS
    for store in condition.stores:
        if store.stream in (RECORDS, FACTS) and store.config is not None and store.ttl_seconds:
            if wanted_seconds and store.ttl_seconds >= wanted_seconds:
                continue
            wish = f"{settings.tracking_ttl_days} days" if wanted_seconds else "for ever"
            detail = f"{store.name} keeps what it has for {duration(store.ttl_seconds)}; TRACKING_TTL_DAYS says {wish}"
            age = f"{settings.tracking_ttl_days + (store.stream == RECORDS)}d" if wanted_seconds else "0s"
            yield warning("JetStream", detail, f"nats stream edit {store.stream} --max-age={age} --force")


def _copies(jetstream: JetStream, there: set[str]) -> Iterator[Finding]:
    if FACTS not in there:
        return
    told = jetstream.api(f"STREAM.INFO.{FACTS}")
    cluster = told.get("cluster") or {}
    if cluster.get("name") and int(told["config"].get("num_replicas", 1)) == 1:
        detail = f"{FACTS} has one copy in the NATS cluster {cluster['name']}: tracking stops with that one server"
        remedy = f"set TRACKING_REPLICAS=3, and `nats stream edit {FACTS} --replicas=3 --force` (`relayctl buckets`)"
        yield warning("JetStream", detail, remedy)


# -- lfx's own service beside this one ---------------------------------------------------------------------------
def _lfx(jetstream: JetStream, settings: Settings) -> Iterator[Finding]:
    """Whether lfx's service still sends, and whether its poller takes events: it writes records, and nothing else does.

    A record that Relay sent and folded an event into says so (``folded_at``); lfx's poller writes the record anew with
    the fields that it knows.
    """
    try:
        index = jetstream.api(f"STREAM.INFO.{INDEX}")
    except BusRefused as error:
        if error.code != STREAM_NOT_FOUND:
            return  # it may not be asked
        index = {}
    written_at = parse_time(str((index.get("state") or {}).get("last_ts", "")))
    asked_at = parse_time(str(index.get("ts", "")))
    if written_at and asked_at and (asked_at - written_at).total_seconds() < RECENT_SECONDS:
        detail = (
            f"lfx-v2-email-service sends mail beside this relay (its index was written at {written_at:%H:%M:%S} UTC)"
        )
        yield well("lfx", detail)
    if not settings.ses_eventing_enabled or asked_at is None:
        return
    rewritten, newest = _rewritten(jetstream)
    newest_at = parse_time(newest)
    if rewritten and newest_at and (asked_at - newest_at).total_seconds() < RECENT_SECONDS:
        detail = (
            f"{rewritten} of the newest mails had their events written by lfx's own poller, the last at {newest}: it"
            " takes them from the queue, and Relay's fields out of the records"
        )
        yield failed("lfx's poller", detail, "set SES_EVENTING_ENABLED=false at lfx-v2-email-service and restart it")


def _rewritten(jetstream: JetStream) -> tuple[int, str]:
    """How many of the newest mails have events that Relay did not fold, and the time of the latest of these."""
    last = jetstream.last_sequence(FACTS)
    page = jetstream.page(FACTS, f"{contract.LOG_PREFIX}.*.sent", last - NEWEST_MAILS, NEWEST_MAILS)
    keys: list[str] = []
    for msg in page.msgs:
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):  # whoever may write there wrote it
            email_id = str(orjson.loads(msg.payload)["email_id"])
            if is_email_id(email_id):
                keys.append(f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}")
    count, newest = 0, ""
    for stored in jetstream.get_last_of_each(RECORDS, keys).values():
        try:
            record = orjson.loads(stored.payload)
        except orjson.JSONDecodeError:  # a deleted one
            continue
        if isinstance(record, dict) and "folded_at" not in record and (at := last_event_at(record)):
            count, newest = count + 1, max(newest, at)
    return count, newest
