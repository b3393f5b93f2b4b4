"""The client: what a service that sends mail through Relay imports. ``docs/client.md`` shows its use.

It needs nats-py and nothing of Relay but the contract: no gevent, no boto3, no settings. It keeps no global state and
logs no address.
"""

from relay.client.blocking import BlockingRelayClient
from relay.client.errors import (
    Deferred,
    Failed,
    InDoubt,
    InvalidMail,
    NoAnswer,
    NoResponders,
    NotConnected,
    NotFound,
    NotHandedOver,
    NotPermitted,
    ObjectFailed,
    QuestionFailed,
    Refused,
    RelayClientError,
    RequestTooLarge,
)
from relay.client.mail import Attachment, Mail, MailFields, ObjectRef, StoredMail
from relay.client.many import Progress, Result
from relay.client.relay_client import RelayClient
from relay.client.replies import Analytics, MailRecord, Page, RecipientResult, Sent
from relay.client.retry import Retry

__all__ = [
    "Analytics",
    "Attachment",
    "BlockingRelayClient",
    "Deferred",
    "Failed",
    "InDoubt",
    "InvalidMail",
    "Mail",
    "MailFields",
    "MailRecord",
    "NoAnswer",
    "NoResponders",
    "NotConnected",
    "NotFound",
    "NotHandedOver",
    "NotPermitted",
    "ObjectFailed",
    "ObjectRef",
    "Page",
    "Progress",
    "QuestionFailed",
    "RecipientResult",
    "Refused",
    "RelayClient",
    "RelayClientError",
    "RequestTooLarge",
    "Result",
    "Retry",
    "Sent",
    "StoredMail",
]
