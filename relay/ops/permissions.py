"""What Relay may have to do on NATS, subject by subject: who wants to give its users no more than that.

Pure data. ``conf/nats/permissions.conf`` says the same in nats-server's words, and a test holds the two together;
``relayctl doctor`` names those that a user lacks. A user who may publish to ``$JS.API.…`` can have JetStream publish
what is stored there to any subject, since JetStream's answers are nobody's publications: that is for Relay and its
operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from relay import contract
from relay.bus.micro import NAME
from relay.tracking.inspection import INDEX, RECORDS, REQUESTS

if TYPE_CHECKING:
    from relay.settings import Settings

Verb = Literal["publish", "subscribe"]

ASKED: Final = (contract.SEND_EMAIL, contract.GET_EMAIL_STATUS, contract.GET_EMAIL_ENGAGEMENT_ANALYTICS)


class Need(NamedTuple):
    """One permission."""

    verb: Verb
    subject: str
    """As it stands in a NATS server's configuration; may hold wildcards."""
    why: str
    queue_group: str = ""
    """The only one in which it is subscribed to; '' elsewhere."""
    settings: tuple[str, ...] = ()
    """The settings that it depends on, by environment name."""

    def __str__(self) -> str:
        """``publish $KV.email-recipients.>``; a queue group stands behind its subject, as in a configuration."""
        return f"{self.verb} {self.subject}{' ' + self.queue_group if self.queue_group else ''}"


def _serving(nats_subject: str) -> Need:
    return Need("subscribe", nats_subject, "requests arrive here", contract.QUEUE_GROUP)


def _asking(call: str, stream: str, why: str, *settings: str) -> Need:
    return Need("publish", f"$JS.API.{call.format(stream)}", why, settings=settings)


def _stream(stream: str, *settings: str) -> tuple[Need, ...]:
    return (
        _asking("STREAM.INFO.{}", stream, "whether it is there, and what is in it", *settings),
        _asking("STREAM.CREATE.{}", stream, "to make it when it is missing", *settings),
        _asking("STREAM.MSG.GET.{}", stream, "reads that must not be stale", *settings),
    )


def _direct(stream: str, keys: str = "") -> tuple[Need, ...]:
    why = "cheap reads; without it the stream's leader is asked instead"
    one = (_asking("DIRECT.GET.{}." + keys, stream, why),) if keys else ()
    return (_asking("DIRECT.GET.{}", stream, why), *one)


_OWN_INBOX: Final = Need("subscribe", "_INBOX.>", "answers of JetStream", settings=("NATS_INBOX_PREFIX",))
_WRITING: Final = (
    Need("publish", f"$KV.{contract.RECIPIENTS_BUCKET}.>", "a mail's record"),
    Need("publish", f"{contract.LOG_PREFIX}.*.*", "what happened to a mail"),
)
LOOKING: Final = (
    Need("publish", f"$SRV.STATS.{NAME}", "`relayctl status`"),
    Need("publish", f"$SRV.INFO.{NAME}", "`relayctl doctor`"),
    Need("publish", "$SYS.REQ.USER.INFO", "`relayctl doctor`: what this user may do"),
    Need("publish", "$JS.API.INFO", "`relayctl doctor`: how much room there is"),
)
"""What `relayctl` asks that no worker does; the shipped users of both have it."""
_SERVING: Final = (
    *map(_serving, ASKED),
    *(
        Need("subscribe", f"$SRV.*{suffix}", "questions of `relayctl status` and `nats micro`")
        for suffix in ("", f".{NAME}", f".{NAME}.*")
    ),
)
_READING: Final = (
    *_stream(RECORDS),
    *_direct(RECORDS, f"$KV.{contract.RECIPIENTS_BUCKET}.>"),
    *_stream(contract.LOG_STREAM),
    *_direct(contract.LOG_STREAM),
    _asking("STREAM.MSG.GET.{}", INDEX, "arrays that lfx wrote, where there are any"),
    *_stream(REQUESTS),
)
_EVENTS: Final = (
    Need("publish", contract.PARKED_SUBJECT, "events that cannot be read", settings=("SES_EVENTING_ENABLED",)),
    *(each for each in _stream(contract.PARKED_STREAM, "SES_EVENTING_ENABLED") if "MSG.GET" not in each.subject),
)


def _replying(prefix: str) -> Need:
    return Need("publish", f"{prefix}.>", "replies to callers", settings=("RELAY_REPLY_PREFIXES",))


def _objects(bucket: str) -> tuple[Need, ...]:
    stream = f"OBJ_{bucket}"
    why = "requests and attachments that lie in this bucket"
    calls = ("STREAM.MSG.GET.{}", "DIRECT.GET.{}")
    return tuple(_asking(call, stream, why, "OBJECT_STORE_BUCKETS") for call in calls)


def needs_of_workers(
    inbox_prefix: str, reply_prefixes: tuple[str, ...], object_buckets: tuple[str, ...], *, has_events: bool
) -> tuple[Need, ...]:
    """What the user of a relay's workers needs: one user for all of them, since they share their settings."""
    return (
        *_SERVING,
        _OWN_INBOX._replace(subject=f"{inbox_prefix}.>"),
        *map(_replying, reply_prefixes),
        *_WRITING,
        Need("publish", f"$KV.{contract.REQUESTS_BUCKET}.>", "who works on a request_id, and its answer"),
        *_READING,
        *(_EVENTS if has_events else ()),
        *(need for bucket in object_buckets for need in _objects(bucket)),
    )


def needs(settings: Settings) -> tuple[Need, ...]:
    """What a relay with these settings needs."""
    return needs_of_workers(
        settings.nats_inbox_prefix,
        settings.relay_reply_prefixes,
        settings.object_store_buckets,
        has_events=settings.ses_eventing_enabled,
    )


def needs_of_operators(inbox_prefix: str) -> tuple[Need, ...]:
    """What the user of ``relayctl`` needs: every command, nothing that serves callers."""
    deleting = (
        _asking("STREAM.MSG.DELETE.{}", contract.LOG_STREAM, "`relayctl repair`"),
        _asking("STREAM.PURGE.{}", RECORDS, "`relayctl erase`, where the bucket has a history"),
        _asking("STREAM.MSG.GET.{}", contract.PARKED_STREAM, "`relayctl parked`"),
        *_direct(contract.PARKED_STREAM),
        _asking("STREAM.MSG.DELETE.{}", contract.PARKED_STREAM, "`relayctl parked retry` and `drop`"),
        _asking("STREAM.PURGE.{}", contract.PARKED_STREAM, "`relayctl parked drop --all`"),
    )
    following = tuple(
        _asking(call, contract.LOG_STREAM, "`relayctl events --follow`")
        for call in ("CONSUMER.CREATE.{}.>", "CONSUMER.MSG.NEXT.{}.*", "CONSUMER.DELETE.{}.*")
    )
    return (
        _OWN_INBOX._replace(subject=f"{inbox_prefix}.>"),
        *(Need("publish", nats_subject, "`relayctl send`, `track`, `analytics`") for nats_subject in ASKED),
        *LOOKING,
        Need(
            "publish",
            f"$KV.{contract.REQUESTS_BUCKET}.probe",
            "`relayctl doctor`: whether it would be stored; it is not",
        ),
        *_WRITING,
        *_READING,
        _asking("STREAM.INFO.{}", INDEX, "`relayctl buckets`"),
        *_EVENTS,
        *deleting,
        *following,
    )
