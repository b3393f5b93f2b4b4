"""All that a caller may rely on: NATS subjects, buckets, payload fields and error strings.

Owns the words of the interface and nothing else: no parsing, no policy. The subjects, the
bucket names, the fields and the error strings are those of ``lfx-v2-email-service``, so its
callers change nothing; a name in this file is never renamed and a field never retyped.
What Relay adds are optional fields which such callers ignore.
"""

from __future__ import annotations

from typing import Final

# -- NATS subjects ---------------------------------------------------------------------
SEND_EMAIL: Final = "lfx.email-service.send_email"
GET_EMAIL_STATUS: Final = "lfx.email-service.get_email_status"
GET_EMAIL_ENGAGEMENT_ANALYTICS: Final = "lfx.email-service.get_email_engagement_analytics"
QUEUE_GROUP: Final = "lfx.email-service.queue"

# -- where tracking is kept -------------------------------------------------------------
RECIPIENTS_BUCKET: Final = "email-recipients"
"""KV bucket: key ``email_id``, value the record of that mail as JSON."""

GROUP_INDEX_BUCKET: Final = "email-group-index"
"""KV bucket of ``lfx-v2-email-service``: key ``group_id``, value the array of its email_ids. Read, never written."""

LOG_STREAM: Final = "EMAIL_LOG"
LOG_PREFIX: Final = "lfx.email-service.log"
"""Facts are published to ``<LOG_PREFIX>.<group token>.<fact>``."""

PARKED_STREAM: Final = "EMAIL_PARKED"
PARKED_SUBJECT: Final = "lfx.email-service.parked"
"""Where notifications of events go that nobody could read: for operators (``relayctl parked``), not for callers."""

REQUESTS_BUCKET: Final = "email-requests"
"""KV bucket: key a hash of caller and request_id, value who works on the request, or how it was answered."""

# -- fields of a ``send_email`` request -------------------------------------------------
SEND_EMAIL_FIELDS: Final = (
    "to",
    "subject",
    "html",
    "text",
    "from",
    "from_display_name",
    "reply_to",
    "group_id",
)
SEND_EMAIL_OPTIONS: Final = (
    "cc",
    "bcc",
    "recipients_as",
    "request_id",
    "timeout_seconds",
    "message_id_header",
    "in_reply_to",
    "references",
    "headers",
    "tags",
    "attachments",
    "allow_single_part",
)
"""What a request may say besides; ``to`` may be a list then."""
OBJECT_FIELD: Final = "object"
"""A request that is nothing but this lies in an Object Store."""

DEADLINE_HEADER: Final = "Relay-Deadline"
"""Header of a NATS request: until when its caller waits, RFC 3339."""
REQUEST_INFO_HEADER: Final = "Nats-Request-Info"
"""Header that the NATS server adds where a service import has ``share``: who calls."""

STATUS_FIELDS: Final = ("email_id", "group_id", "cursor")
STATUS_LIMIT_FIELD: Final = "limit"
ANALYTICS_FIELDS: Final = ("group_id",)

MAX_PAGE_MAILS: Final = 1000
"""The most, and the usual, mails in one page of a group: ``limit``."""

# -- error strings ------------------------------------------------------------------------
INVALID_REQUEST_PAYLOAD: Final = "invalid request payload"
REQUIRED_FIELDS_MISSING: Final = "to, subject, html, and text are required"
INVALID_FROM: Final = "invalid from address"
FROM_DOMAIN_NOT_ALLOWED: Final = "from address domain not allowed"
INVALID_REPLY_TO: Final = "invalid reply_to address"
REPLY_TO_DOMAIN_NOT_ALLOWED: Final = "reply_to address domain not allowed"
DELIVERY_FAILED: Final = "email delivery failed"
REQUEST_ID_REUSED: Final = "request_id already used with a different payload"

EMAIL_ID_OR_GROUP_ID_REQUIRED: Final = "email_id or group_id is required"
ONLY_ONE_OF_EMAIL_ID_OR_GROUP_ID: Final = "only one of email_id or group_id may be set"
GROUP_ID_REQUIRED: Final = "group_id is required"
NOT_FOUND: Final = "not found"
INTERNAL_ERROR: Final = "internal error"
RESPONSE_TOO_LARGE: Final = "response too large; use limit and cursor"
INVALID_LIMIT: Final = f"limit must be a whole number from 1 to {MAX_PAGE_MAILS}"
INVALID_CURSOR: Final = "invalid cursor"
CURSOR_OF_ANOTHER_GROUP: Final = "the cursor belongs to another group_id"

# -- header fields of a mail ----------------------------------------------------------------
TRACKING_HEADER: Final = "X-LFX-TRACKING-ID"
"""``<group_id>/<email_id>``; what follows the last ``/`` is the email_id."""

SES_CONFIGURATION_SET_HEADER: Final = "X-SES-CONFIGURATION-SET"
SES_MESSAGE_TAGS_HEADER: Final = "X-SES-MESSAGE-TAGS"
SES_EMAIL_ID_TAG: Final = "email_id"
