"""What SES tells of a drill's mails, by a seed, and what the tracking must make of it: a plain model.

The model knows the tables of ``docs/log.md`` and SES's spelling, and shares no line with ``relay.tracking.folding``:
where both are wrong, they are wrong in two ways. It looks at all events of a mail at once, so order and repetition
cannot matter to it. Which event was first it cannot know; it says which ones may have been.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import orjson

from relay.tracking.groups import group_token
from tests.support.ses_events import OBJECTS, ses_event

DAY_MILLISECONDS = 86_400_000
SHARE_TWICE = 0.3
SHARE_EARLY = 0.2
SHARE_WITHOUT_HEADER = 0.1
UNTIMED = frozenset({"Send", "Reject", "Rendering Failure"})
"""Kinds without a time of their own: SNS's counts, or with raw delivery the mail's."""


class Way(Enum):
    """How a notification comes into the queue."""

    RAW = auto()
    """By a topic with raw delivery: the message is SES's event, and its id is a hash of it."""
    ENVELOPED = auto()
    """By a topic without: SNS gives it an id and a time, which only the queue hears of."""
    PUT = auto()
    """Enveloped by the drill, so that it knows the time."""


@dataclass
class Happening:
    """One event of one mail, or a second copy of its notification."""

    kind: str
    way: Way
    is_twice: bool
    """Its notification comes a second time."""
    is_early: bool
    """It comes before the relay knows that the mail was taken."""
    after_milliseconds: int
    """Since the mail."""
    has_header: bool
    told: dict[str, Any]
    """In SES's words."""
    kept: dict[str, Any]
    """In the record's."""
    states: bool = True
    """False: nothing is to be counted."""
    message: str = ""
    """SES's JSON."""
    event_id: str = ""
    """'' until SNS has given it one."""
    at: str = ""

    @property
    def body(self) -> str:
        """Of the SQS message, for what is put there by the drill."""
        return self.message if self.way is Way.RAW else enveloped(self.message, self.event_id, self.at)

    def copy(self) -> Happening:
        """A second copy of the same notification, put into the queue: SNS would give it another id."""
        return replace(self, way=Way.PUT if self.way is Way.ENVELOPED else self.way, is_twice=False)


@dataclass
class Mail:
    """One mail and all that happens to it; its ids are known once the smarthost has it."""

    number: int
    group_id: str
    """'': sent without one."""
    happenings: list[Happening] = field(default_factory=list)
    email_id: str = ""
    remote_id: str = ""

    @property
    def to(self) -> str:
        """Its recipient."""
        return f"user{self.number}@example.com"

    @property
    def subject_header(self) -> str:
        """Like no other's of its seed."""
        return f"Mail {self.number} of a drill"

    @property
    def token(self) -> str:
        """Under which its facts are logged."""
        return group_token(self.group_id) if self.group_id else "-"

    @property
    def payload(self) -> bytes:
        """The request that has it sent."""
        mail = {"to": self.to, "subject": self.subject_header, "text": "Hello.\n" * 20, "html": "<p>Hello.</p>\n" * 20}
        return json.dumps(mail | ({"group_id": self.group_id} if self.group_id else {})).encode()

    def begin(self, email_id: str, remote_id: str, sent_at: float) -> None:
        """SES has the mail: what is told of it gets its messages. ``sent_at`` is epoch seconds."""
        self.email_id, self.remote_id = email_id, remote_id
        for each in self.happenings:
            event = ses_event(
                each.kind,
                email_id,
                group_id=self.group_id or email_id,
                at=sent_at + each.after_milliseconds / 1000,
                sent_at=sent_at,
                has_header=each.has_header,
            )
            event["mail"]["messageId"] = remote_id
            about = event[OBJECTS[each.kind][0]]
            about |= each.told
            each.at = about.get("timestamp") or event["mail"]["timestamp"]
            each.message = json.dumps(event)
            if each.way is Way.RAW:
                each.event_id = hashlib.sha256(orjson.dumps(event, option=orjson.OPT_SORT_KEYS)).hexdigest()
            elif each.way is Way.PUT:
                each.event_id = f"{email_id}-{each.after_milliseconds}"


def enveloped(message: str, notification_id: str, at: str) -> str:
    """A message as SNS delivers it to a queue unless raw delivery is on."""
    envelope = {
        "Type": "Notification",
        "MessageId": notification_id,
        "TopicArn": "arn:aws:sns:us-east-1:123456789012:events",
        "Message": message,
        "Timestamp": at,
    }
    return json.dumps(envelope)


# -- what happens ------------------------------------------------------------------------------------------------------
Told = tuple[dict[str, Any], dict[str, Any]]


def _bounce(chance: random.Random) -> Told:
    kind, subkind = chance.choice(
        [("Permanent", "NoEmail"), ("Transient", "MailboxFull"), ("Undetermined", "Undetermined")]
    )
    diagnostic = f"smtp; 550 5.1.{chance.randrange(10)} user unknown"
    recipient = {"emailAddress": "user@example.com", "action": "failed", "diagnosticCode": diagnostic}
    told = {"bounceType": kind, "bounceSubType": subkind, "bouncedRecipients": [recipient]}
    return told, {"type": kind, "subtype": subkind, "diagnostic": diagnostic}


def _complaint(chance: random.Random) -> Told:
    kind = chance.choice(["abuse", "fraud", "virus", "a type of next year"])
    return {"complaintFeedbackType": kind, "complaintSubType": None}, {"type": kind}


def _delay(chance: random.Random) -> Told:
    kind = chance.choice(["MailboxFull", "SpamDetected", "TransientCommunicationFailure"])
    return {"delayType": kind}, {"type": kind}


def _reject(chance: random.Random) -> Told:
    reason = f"Bad content {chance.randrange(100)}"
    return {"reason": reason}, {"reason": reason}


def _failure(chance: random.Random) -> Told:
    reason = f"Attribute {chance.randrange(100)} is missing"
    return {"errorMessage": reason}, {"reason": reason}


def _click(chance: random.Random) -> Told:
    link = f"https://example.com/{chance.randrange(1000)}?" + "q=1&" * chance.randrange(40)
    return {"link": link}, {"link": link}


def _subscription(chance: random.Random) -> Told:
    source = chance.choice(["UnsubscribeHeader", "EmailClient"])
    return {"source": source}, {"source": source}


def _nothing(_chance: random.Random) -> Told:
    return {}, {}


KINDS: dict[str, Callable[[random.Random], Told]] = {
    "Send": _nothing,
    "Delivery": _nothing,
    "Open": _nothing,
    "Click": _click,
    "Bounce": _bounce,
    "Complaint": _complaint,
    "Reject": _reject,
    "Rendering Failure": _failure,
    "DeliveryDelay": _delay,
    "Subscription": _subscription,
}
"""SES's ten, and what may be told of each."""


def plan(mails: int, events: int, group_ids: Sequence[str], seed: int) -> list[Mail]:
    """Mails with so many events in all. A share of exactly 30 % is told twice, some are told early."""
    chance = random.Random(seed)
    planned = [Mail(number, group_ids[number % len(group_ids)]) for number in range(mails)]
    twice = set(chance.sample(range(events), round(events * SHARE_TWICE)))
    late = [chance.randrange(mails) for _ in range(events)]
    for number, (mail, moment) in enumerate(zip(late, chance.sample(range(1, DAY_MILLISECONDS), events), strict=True)):
        kind = chance.choice(list(KINDS))
        told, kept = KINDS[kind](chance)
        # The model has to know each event's time.
        ways = [Way.RAW, Way.PUT] if kind in UNTIMED else [Way.RAW, Way.ENVELOPED]
        happening = Happening(
            kind=kind,
            way=chance.choice(ways),
            is_twice=number in twice,
            is_early=chance.random() < SHARE_EARLY,
            after_milliseconds=moment,
            has_header=chance.random() >= SHARE_WITHOUT_HEADER,
            told=told,
            kept=kept,
        )
        if kind == "Subscription" and chance.random() < 0.3:
            happening.told |= {"newTopicPreferences": {"unsubscribeAll": False, "topicSubscriptionStatus": []}}
            happening.states = False
        planned[mail].happenings.append(happening)
    return planned


# -- what must come of it ----------------------------------------------------------------------------------------------
ONCE: dict[str, frozenset[str]] = {
    "delivered": frozenset({"Delivery"}),
    "opened": frozenset({"Open"}),
    "clicked": frozenset({"Click"}),
    "failed": frozenset({"Bounce", "Complaint"}),
    "bounced": frozenset({"Bounce"}),
    "complained": frozenset({"Complaint"}),
    "delayed": frozenset({"DeliveryDelay"}),
    "rejected": frozenset({"Reject", "Rendering Failure"}),
    "unsubscribed": frozenset({"Subscription"}),
}
"""Facts that are stated once for a mail, and the kinds of events that state them."""

EACH = {"open": "Open", "click": "Click"}
"""Facts that are stated for each event."""

TIMED = ("delivered", "failed", "bounced", "complained", "delayed", "rejected", "unsubscribed")
"""Of these the record has the earliest time, as ``<fact>_at``."""

DETAILED = {
    "bounced": "bounce",
    "complained": "complaint",
    "delayed": "delayed",
    "rejected": "rejected",
    "unsubscribed": "unsubscribed",
}
"""And of these, under another name, what was told at that time."""

Fact = tuple[str, str, str, str]
"""Kind, email_id, the event's id where there is one for each event, the time."""


class Wanted:
    """What the tracking must hold of one mail."""

    def __init__(self, mail: Mail) -> None:
        self.mail = mail
        # Two events of SES that do not differ in anything are one.
        events = {each.event_id: each for each in mail.happenings if each.states}
        self.of = {
            fact: {event_id: each for event_id, each in events.items() if each.kind in kinds}
            for fact, kinds in ONCE.items()
        }
        self.facts = {fact: events for fact, events in self.of.items() if events}

    def problem(self, record: dict[str, Any] | None) -> str:
        """What is wrong with the record; '' when nothing is."""
        if record is None:
            return "there is none"
        left = dict(record)
        first, folded_at, sent_at = left.pop("first", {}), left.pop("folded_at", {}), left.pop("sent_at", "")
        wanted = self.record()
        if left != wanted:
            return "; ".join(
                f"{name} is {left.get(name)}, not {wanted.get(name)}"
                for name in sorted(left.keys() | wanted.keys())
                if left.get(name) != wanted.get(name)
            )
        if not sent_at:
            return "sent_at is missing"
        if first.keys() != self.facts.keys() or any(first[fact] not in self.facts[fact] for fact in first):
            return f"first is {first}"
        counted = {event_id for fact in ("opened", "clicked") for event_id in self.of[fact]}
        # One that was stated again stands there with the fact, too.
        known = {event_id for event_id in folded_at if event_id.rpartition("--")[2] not in (*ONCE, *EACH)}
        if known != counted | set(first.values()):
            return f"folded_at is {folded_at}"
        return ""

    def record(self) -> dict[str, Any]:
        """All that it holds but for the times at which the relay did something, and which event was first."""
        mail, opens, clicks = self.mail, _listed(self.of["opened"]), _listed(self.of["clicked"])
        record = {
            "email_id": mail.email_id,
            "group_id": mail.group_id or mail.email_id,
            "to": mail.to,
            "subject": mail.subject_header,
            "remote_id": mail.remote_id,
            "open_count": len(opens),
            "delivered": bool(self.of["delivered"]),
            "opened": bool(opens),
            "failed": bool(self.of["failed"]),
        }
        if opens:
            record["opened_at_list"] = [{"event_id": event_id, "opened_at": each.at} for event_id, each in opens]
            record["last_opened_at"] = opens[-1][1].at
        if clicks:
            record |= {"clicked": True, "click_count": len(clicks), "last_clicked_at": clicks[-1][1].at}
            record["clicks"] = [{"event_id": event_id, "clicked_at": each.at} | each.kept for event_id, each in clicks]
        for fact in TIMED:
            if told := self.of[fact].values():
                earliest = min(told, key=lambda each: (each.at, orjson.dumps(each.kept, option=orjson.OPT_SORT_KEYS)))
                record[f"{fact}_at"] = earliest.at
                if fact in DETAILED:
                    record[DETAILED[fact]] = earliest.kept
        return record

    def stated(self, record: dict[str, Any] | None) -> Counter[Fact]:
        """Its facts but for ``sent``; the time of one that is stated once is that of the event that was first."""
        first = (record or {}).get("first", {})
        once = [
            (fact, self.mail.email_id, "", of[first[fact]].at if first.get(fact) in of else "")
            for fact, of in self.facts.items()
        ]
        each = [
            (fact, self.mail.email_id, event_id, happening.at)
            for fact, kind in EACH.items()
            for event_id, happening in self.of[f"{kind.lower()}ed"].items()
        ]
        return Counter(once + each)


def _listed(events: dict[str, Happening]) -> list[tuple[str, Happening]]:
    return sorted(events.items(), key=lambda item: (item[1].at, item[0]))


def analytics_of(mails: Iterable[Mail]) -> dict[str, int]:
    """What is to be told of a group with these mails, but for times."""
    of_mails = [Wanted(mail) for mail in mails]
    total = Counter(fact for each in of_mails for fact in each.facts)
    return {
        "total_sent": len(of_mails),
        "delivered": total["delivered"],
        "opened": sum(len(each.of["opened"]) for each in of_mails),
        "unique_opened": total["opened"],
        "failed": total["failed"],
        "clicked": sum(len(each.of["clicked"]) for each in of_mails),
        "unique_clicked": total["clicked"],
        "bounced": total["bounced"],
        "complained": total["complained"],
        "delayed": total["delayed"],
        "rejected": total["rejected"],
    }
