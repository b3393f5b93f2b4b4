"""Notifications as Amazon SNS puts them into a queue: SES events of a mail, enveloped or raw."""

from __future__ import annotations

import json
import time
from typing import Any

from relay import contract
from relay.tracking.batch import Notification
from relay.tracking.groups import tracking_id
from relay.tracking.record import rfc3339

OBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Send": ("send", {}),
    "Delivery": ("delivery", {"smtpResponse": "250 2.0.0 OK", "recipients": ["user@example.com"]}),
    "Open": ("open", {"ipAddress": "192.0.2.1", "userAgent": "Mozilla/5.0"}),
    "Click": ("click", {"ipAddress": "192.0.2.1", "link": "https://example.com/a", "linkTags": None}),
    "Bounce": (
        "bounce",
        {
            "bounceType": "Permanent",
            "bounceSubType": "General",
            "bouncedRecipients": [{"emailAddress": "user@example.com", "diagnosticCode": "smtp; 550 5.1.1 unknown"}],
        },
    ),
    "Complaint": ("complaint", {"complainedRecipients": [{"emailAddress": "user@example.com"}]}),
    "Reject": ("reject", {"reason": "Bad content"}),
    "Rendering Failure": ("failure", {"errorMessage": "an attribute is missing", "templateName": "t"}),
    "DeliveryDelay": ("deliveryDelay", {"delayType": "MailboxFull", "delayedRecipients": []}),
    "Subscription": ("subscription", {"source": "UnsubscribeHeader", "newTopicPreferences": {"unsubscribeAll": True}}),
}
"""Per event type: the name of its object, and what stands there beside the time."""


def ses_event(
    kind: str,
    email_id: str,
    *,
    group_id: str = "spring",
    at: float = 0.0,
    sent_at: float = 0.0,
    has_header: bool = True,
) -> dict[str, Any]:
    """One event of one mail. Times are epoch seconds; 0: now. Without our header only the tag names the mail."""
    name, told = OBJECTS[kind]
    headers = [{"name": "Subject", "value": "Hello"}]
    if has_header:
        headers.append({"name": contract.TRACKING_HEADER, "value": tracking_id(group_id, email_id)})
    timed = {} if kind in {"Send", "Reject", "Rendering Failure"} else {"timestamp": rfc3339(at or time.time())}
    return {
        "eventType": kind,
        "mail": {
            "timestamp": rfc3339(sent_at or time.time()),
            "messageId": f"ses-{email_id}",
            "source": "no-reply@example.org",
            "destination": ["user@example.com"],
            "headersTruncated": False,
            "headers": headers,
            "commonHeaders": {"to": ["user@example.com"], "subject": "Hello"},
            "tags": {contract.SES_EMAIL_ID_TAG: [email_id]},
        },
        name: {**told, **timed},
    }


def enveloped(event: dict[str, Any], notification_id: str) -> str:
    """The event as SNS delivers it to a queue unless raw delivery is on."""
    return json.dumps(
        {
            "Type": "Notification",
            "MessageId": notification_id,
            "TopicArn": "arn:aws:sns:us-east-1:123456789012:events",
            "Message": json.dumps(event),
            "Timestamp": rfc3339(time.time()),
        }
    )


def notification(body: str, received_count: int = 1, sent_at: float = 0.0) -> Notification:
    """A body as it was received; ``sent_at`` 0: now."""
    return Notification(body, f"sqs-{abs(hash(body))}", received_count, sent_at or time.time())
