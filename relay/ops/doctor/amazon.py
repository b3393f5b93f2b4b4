"""Amazon: the queue of events, and what SES itself says of the account, the sender and the configuration set.

Blocks as boto3 does: ask from a thread. That SES is not asked, for want of credentials or of a permission, is no fault:
mail goes over SMTP with credentials of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relay.errors import ConfigError, QueueUnavailable
from relay.ops.doctor.clock import Watch, epoch
from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.doctor.smtp import region_of
from relay.ops.parts import queue_config
from relay.ops.supervision import Supervision
from relay.settings import Settings

if TYPE_CHECKING:  # they bring boto3, which only a relay with a queue of events needs
    from relay.aws.ses import Account, Ses
    from relay.aws.sqs import Queue

LEAST_VISIBILITY_SECONDS = 30
"""More than a batch takes while NATS is slow."""
LEAST_MAX_RECEIVES = 20
"""More than the 10 after which Relay itself parks a message, where an operator can look at it."""
NEARLY_ALL = 0.8
WANTED_EVENTS = ("DELIVERY", "BOUNCE", "COMPLAINT")
SANDBOX = "in SES's sandbox: only verified addresses get mail, 200 a day, 1 a second"


def events(settings: Settings) -> Iterator[Finding]:
    """The queue. Where no relay runs here it is tried with one message, which then counts as received once more."""
    if not settings.ses_configuration_set:
        detail = "no event will come: SES_CONFIGURATION_SET is empty"
        yield warning("SES events", detail, "set it to the configuration set that publishes to the queue")
    from relay.aws.sqs import Queue

    try:
        queue = Queue(queue_config(settings)._replace(wait_seconds=0))
        yield from _queue(queue)
        yield from _other_pollers(queue, settings)
    except (ConfigError, QueueUnavailable) as error:
        problem, _, remedy = str(error).partition("; ")
        yield failed(
            "SQS", problem, remedy or "check the network's way to Amazon (a proxy, a VPC endpoint), then again"
        )


def _queue(queue: Queue) -> Iterator[Finding]:
    look = queue.look()
    if missing := queue.missing_permissions():
        yield failed("SQS", f"{queue.url}: the credentials may not {', '.join(missing)}", "allow that")
        return
    yield well("SQS", f"{queue.url} can be read; nothing else may poll it, lfx's own poller least of all")
    if look.visibility_seconds < LEAST_VISIBILITY_SECONDS:
        detail = (
            f"the queue's visibility timeout is {look.visibility_seconds} s: messages come again while they are being"
            " handled"
        )
        yield warning("SQS visibility", detail, f"set it to {LEAST_VISIBILITY_SECONDS} s or more (60 is good)")
    if 0 < look.max_receives < LEAST_MAX_RECEIVES:
        detail = (
            f"the queue gives messages up after {look.max_receives} receives, before Relay has parked what it cannot"
            " handle"
        )
        yield warning(
            "SQS redrive", detail, f"set maxReceiveCount of its redrive policy to {LEAST_MAX_RECEIVES} or more"
        )


def _other_pollers(queue: Queue, settings: Settings) -> Iterator[Finding]:
    """Where no relay runs here, messages in flight are somebody else's."""
    if not Supervision(settings.relay_state_dir).processes() and (taken := queue.backlog().in_flight):
        detail = (
            f"{taken} messages of the queue are in somebody's hands, and no relay runs here: another relay's, or those"
            " of lfx's own poller, which must be off: it would take Relay's fields out of the records"
        )
        yield warning("SQS pollers", detail, "set SES_EVENTING_ENABLED=false at lfx-v2-email-service, if it is that")


# -- SES ---------------------------------------------------------------------------------------------------------
def ses(settings: Settings) -> Iterator[Finding]:
    """What SES says, for a smarthost that is Amazon's; nothing for others."""
    region = next((found for name, _ in settings.smtp_hosts if (found := region_of(name))), "")
    if not region or not settings.email_enabled:
        return
    from relay.aws.ses import Ses, SesNotAsked

    watch = Watch()
    try:
        service = Ses(region)
    except SesNotAsked as error:
        yield well("SES", f"not asked: {error}; a new account is {SANDBOX}")
        return
    asked = [_account(service, settings), _sender(service, settings)]
    if settings.ses_configuration_set:
        asked.append(_configuration_set(service, settings))
    denied: list[str] = []
    has_clock = False
    for question in asked:
        try:
            findings = list(question)
        except SesNotAsked as error:
            findings = []
            if error.is_denied:
                denied.append(str(error))
            else:
                yield warning(
                    "SES", f"cannot be asked: {error}", "mail goes over SMTP all the same; see the SES console"
                )
                if not service.server_date:
                    return  # nobody answers
        if not has_clock and (their_time := epoch(service.server_date)) is not None:
            has_clock = True
            yield watch.compare(their_time, "Amazon")
        yield from findings
    if denied:
        yield well("SES", f"not asked: {'; '.join(denied)}; a new account is {SANDBOX}")


def _account(service: Ses, settings: Settings) -> Iterator[Finding]:
    account = service.account()
    if account.is_sandboxed:
        yield warning("SES", f"the account is {SANDBOX}", "ask for production access in the SES console")
    if not account.may_send:
        yield failed("SES", "sending is switched off for the account", "see the SES console, Account dashboard")
    if account.enforcement == "SHUTDOWN":
        yield failed(
            "SES", "Amazon has stopped the account's sending", "read its mail about that; appeal in the console"
        )
    elif account.enforcement not in {"HEALTHY", ""}:
        detail = f"Amazon has the account under {account.enforcement.lower()}: too many bounces or complaints"
        yield warning("SES", detail, "see Reputation metrics in the SES console before it stops the sending")
    yield from _quota(account, settings)


def _quota(account: Account, settings: Settings) -> Iterator[Finding]:
    is_fine = True
    if account.per_day > 0 and account.sent_last_day >= account.per_day * NEARLY_ALL:
        is_fine = False
        detail = f"{account.sent_last_day:,.0f} of {account.per_day:,.0f} recipients of 24 hours are used"
        is_over = account.sent_last_day >= account.per_day
        remedy = "ask for a higher sending quota (Service Quotas), or send less"
        yield (failed if is_over else warning)("SES quota", detail, remedy)
    if 0 < account.per_second < settings.smtp_max_recipients_per_second:
        is_fine = False
        wanted = settings.smtp_max_recipients_per_second
        detail = f"SES takes {account.per_second:g} recipients a second, SMTP_MAX_RECIPIENTS_PER_SECOND is {wanted:g}"
        yield warning(
            "SES rate", detail, f"set it to {account.per_second:g}, less what other senders of the account need"
        )
    if is_fine:
        yield well(
            "SES quota", f"{account.sent_last_day:,.0f} sent in 24 hours, {account.per_second:g} a second allowed"
        )


def _sender(service: Ses, settings: Settings) -> Iterator[Finding]:
    sender = settings.sender
    if service.is_verified(sender):
        yield well("SES sender", f"{sender} is verified")
        return
    detail = f"neither {sender} nor its domain is verified in this region: SES refuses its mail (554)"
    yield failed("SES sender", detail, "verify the domain in the SES console, or set DEFAULT_SMTP_FROM to one that is")


def _configuration_set(service: Ses, settings: Settings) -> Iterator[Finding]:
    name = settings.ses_configuration_set
    may_send = service.may_send_with(name)
    if may_send is None:
        detail = f"there is no configuration set {name} in this region: SES refuses every mail that names it (554)"
        yield failed("SES events", detail, "make it, or set SES_CONFIGURATION_SET to the right one")
        return
    if not may_send:
        yield failed(
            "SES events", f"sending is switched off in the configuration set {name}", "switch it on in the console"
        )
    destinations = [each for each in service.destinations(name) if each.topic]
    enabled = [each for each in destinations if each.is_enabled]
    if not enabled:
        which = (
            f"its destination {destinations[0].name} is disabled" if destinations else "it publishes to no SNS topic"
        )
        detail = f"no event comes from the configuration set {name}: {which}"
        yield warning("SES events", detail, "add an event destination: an SNS topic to which the queue is subscribed")
        return
    lacking = [each for each in WANTED_EVENTS if not any(each in known.event_types for known in enabled)]
    if lacking:
        detail = f"the configuration set {name} does not publish {', '.join(map(str.lower, lacking))}"
        yield warning("SES events", detail, "add these event types to its destination")
    else:
        yield well("SES events", f"configuration set {name} publishes to {enabled[0].topic}")
