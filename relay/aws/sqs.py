"""One SQS queue: receive by long polling, delete, extend or give back what was received, look at its attributes.

Owns boto3, which is imported nowhere else, and the translation of its errors. One client for a process: clients may
be shared by greenlets. Credentials and AWS_ENDPOINT_URL are found by boto3's own chains. gevent must have patched the
process before this module is imported, or every TLS connection ends in a RecursionError; the calls then block their
greenlet only.

Sources: the Amazon SQS API reference (ReceiveMessage, DeleteMessageBatch, ChangeMessageVisibilityBatch,
GetQueueAttributes); boto3's "Credentials" and "Retries" guides.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import orjson
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from relay import __version__
from relay.errors import ConfigError, QueueUnavailable, RelayError

log = logging.getLogger("relay.sqs")

BATCH = 10
"""The most messages that one call takes or gives."""
LONGEST_VISIBILITY_SECONDS = 43_200
"""Counted from when a message was received, however often it is extended."""
LEAST_VISIBILITY_SECONDS = 2
"""Whatever the queue says: less would hand a message to the next one while the first still reads it."""
CONNECT_SECONDS = 5
ANSWER_SECONDS = 15
"""Beyond the time that a long poll may last."""
DELETE_TRIES = 4
DELETE_PAUSE_SECONDS = 0.1

CONNECTION_ERRORS = (ConnectionClosedError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError, SSLError)
"""Of the connection itself; they name the endpoint."""

PERMISSIONS = ("sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes")
"""What the credentials must allow on the queue."""

MISSING_QUEUE = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"})
DENIED = frozenset(
    {"AccessDenied", "AccessDeniedException", "AuthorizationError", "KmsAccessDenied", "KMS.AccessDenied"}
)
BAD_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidIdentityToken",
        "InvalidSecurity",
        "MissingAuthenticationToken",
        "OptInRequired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
NO_LONGER_OURS = frozenset({"MessageNotInflight", "ReceiptHandleIsInvalid", "InvalidParameterValue"})
"""Of a message that is to be extended: its time ran out, it was deleted, or 12 hours are over."""
NO_CREDENTIALS = (
    "no AWS credentials were found; give this process a role (instance profile, task role, IRSA), or set"
    " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)
NO_REGION = (
    "the AWS region is not known; set AWS_REGION, or give SES_ENGAGEMENT_SQS_QUEUE_URL as Amazon shows it"
    " (https://sqs.<region>.amazonaws.com/<account>/<queue>)"
)
# sqs.<region>.amazonaws.com, sqs-fips.…, …sqs.<region>.vpce.amazonaws.com, sqs.<region>.api.aws; the older form
# is <region>.queue.amazonaws.com.
REGION_IN_HOST = re.compile(
    r"(?:^|\.)(?:sqs(?:-fips)?\.(?P<after>[a-z]{2,}(?:-[a-z]+)+-\d+)|(?P<before>[a-z]{2,}(?:-[a-z]+)+-\d+)\.queue)\."
)


class SqsMessage(NamedTuple):
    """A message as it was received once."""

    sqs_message_id: str
    receipt_handle: str
    """Of this receipt; deleting needs the latest one."""
    body: str
    received_count: int
    """How often it was received, this time included."""
    sent_at: float
    """When it came into the queue, epoch seconds."""


class QueueConfig(NamedTuple):
    """Which queue, and how it is polled."""

    queue_url: str
    region: str = ""
    """For a URL that names none; '': boto3's own."""
    pollers: int = 2
    """How many receive at the same time."""
    wait_seconds: int = 20
    """How long one receive waits for a message; 20 is the most and costs the fewest requests."""


class Backlog(NamedTuple):
    """How many messages the queue holds, approximately."""

    waiting: int
    in_flight: int
    """Received by somebody, and not yet deleted or visible again."""
    delayed: int


class QueueLook(NamedTuple):
    """How the queue is set up."""

    visibility_seconds: int
    """The queue's own visibility timeout."""
    max_receives: int
    """After so many receives SQS itself moves a message to another queue; 0: never."""


class Queue:
    """The queue. Calls block until SQS has answered: ``receive`` for ``wait_seconds``, each up to some tries more."""

    def __init__(self, config: QueueConfig) -> None:
        """Looks for credentials; asks nothing of SQS. Raises ``ConfigError``: what is missing, and what to set."""
        self._config = config
        self.visibility_seconds = 30
        """How long what was received stays hidden from others; the queue's own once ``look`` has asked."""
        try:
            session = boto3.session.Session()
            if (credentials := session.get_credentials()) is None:
                raise ConfigError(NO_CREDENTIALS)
            _check_credentials(credentials.get_frozen_credentials())
            self._client = session.client(
                "sqs",
                region_name=region_of(config.queue_url) or config.region or None,
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=config.wait_seconds + ANSWER_SECONDS,
                    retries={"mode": "standard"},
                    max_pool_connections=config.pollers + 2,
                    # Saves an eighth of botocore's CPU: it would make the header anew, and check what is typed here.
                    user_agent=f"Relay/{__version__} boto3/{boto3.__version__}",
                    parameter_validation=False,
                ),
            )
        except NoRegionError as error:
            raise ConfigError(NO_REGION) from error
        except (PartialCredentialsError, ProfileNotFound) as error:
            raise ConfigError(f"the AWS credentials cannot be used: {error}") from error
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"no client for SQS can be made: {error}; check the AWS_… variables") from error

    @property
    def url(self) -> str:
        """The queue's URL."""
        return self._config.queue_url

    def look(self) -> QueueLook:
        """How the queue is set up. Sets ``visibility_seconds``.

        Raises ``ConfigError`` when there is no such queue, or it may not be used; ``QueueUnavailable`` when SQS cannot
        be asked.
        """
        try:
            answer = self._ask("GetQueueAttributes", self._client.get_queue_attributes, AttributeNames=["All"])
        except QueueUnavailable as error:
            if (problem := self._config_problem(error.__cause__)) is not None:
                raise problem from error
            raise
        attributes = answer.get("Attributes", {})
        own_seconds = int(attributes.get("VisibilityTimeout", 30))
        self.visibility_seconds = max(LEAST_VISIBILITY_SECONDS, own_seconds)
        return QueueLook(own_seconds, _max_receives(attributes.get("RedrivePolicy", "")))

    def missing_permissions(self) -> list[str]:
        """Which of ``PERMISSIONS`` are lacking. Receives at most one message, and leaves it visible to all.

        Raises ``QueueUnavailable`` when SQS cannot be asked.
        """
        nobodys = [{"Id": "0", "ReceiptHandle": "none"}]
        tries: dict[str, Callable[[], Any]] = {
            "sqs:ReceiveMessage": lambda: self._client.receive_message(
                QueueUrl=self.url, MaxNumberOfMessages=1, VisibilityTimeout=0, WaitTimeSeconds=0
            ),
            "sqs:DeleteMessage": lambda: self._client.delete_message_batch(QueueUrl=self.url, Entries=nobodys),
            "sqs:ChangeMessageVisibility": lambda: self._client.change_message_visibility_batch(
                QueueUrl=self.url, Entries=[{**nobodys[0], "VisibilityTimeout": 0}]
            ),
            "sqs:GetQueueAttributes": lambda: self._client.get_queue_attributes(
                QueueUrl=self.url, AttributeNames=["QueueArn"]
            ),
        }
        missing = []
        for permission, attempt in tries.items():
            try:
                attempt()
            except ClientError as error:
                if code_of(error) in DENIED:
                    missing.append(permission)
                elif _status(error) >= 500:
                    raise QueueUnavailable(f"SQS: {in_one_line(error)}") from error
            except (BotoCoreError, ResponseParserError) as error:
                raise QueueUnavailable(f"SQS: {in_one_line(error)}") from error
        return missing

    def receive(self) -> list[SqsMessage]:
        """Up to 10 messages; waits up to ``wait_seconds`` for the first. Raises ``QueueUnavailable``."""
        answer = self._ask(
            "ReceiveMessage",
            self._client.receive_message,
            MaxNumberOfMessages=BATCH,
            WaitTimeSeconds=self._config.wait_seconds,
            # Said each time: what the queue is set to may be changed while this process counts on it.
            VisibilityTimeout=self.visibility_seconds,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        return [_sqs_message(each) for each in answer.get("Messages") or []]

    def delete(self, sqs_messages: Sequence[SqsMessage]) -> list[SqsMessage]:
        """Deletes; those that SQS would not delete, also when asked again, come back: they will be received again.

        Raises ``QueueUnavailable`` when the call fails altogether. May be repeated.
        """
        left = []
        for batch in _batches(sqs_messages):
            left += self._delete_batch(batch)
        return left

    def _delete_batch(self, batch: Sequence[SqsMessage]) -> list[SqsMessage]:
        hopeless: list[SqsMessage] = []
        for number in range(DELETE_TRIES):
            if number:
                time.sleep(DELETE_PAUSE_SECONDS * 2**number)
            entries = [{"Id": str(place), "ReceiptHandle": each.receipt_handle} for place, each in enumerate(batch)]
            answer = self._ask("DeleteMessageBatch", self._client.delete_message_batch, Entries=entries)
            failed = answer.get("Failed") or []
            for entry in failed:
                log.warning("a message could not be deleted from the queue: %s", _entry_told(entry))
            hopeless += [batch[int(entry["Id"])] for entry in failed if entry.get("SenderFault")]
            batch = [batch[int(entry["Id"])] for entry in failed if not entry.get("SenderFault")]
            if not batch:
                break
        return [*hopeless, *batch]

    def hide(self, sqs_messages: Sequence[SqsMessage], seconds: int) -> None:
        """Hides them from others for ``seconds`` from now; 0 gives them back at once.

        Never raises: what fails is logged, and the message is seen when its present time is over. One that is no
        longer ours is no failure.
        """
        seconds = max(0, min(seconds, LONGEST_VISIBILITY_SECONDS))
        for batch in _batches(sqs_messages):
            entries = [
                {"Id": str(place), "ReceiptHandle": each.receipt_handle, "VisibilityTimeout": seconds}
                for place, each in enumerate(batch)
            ]
            try:
                answer = self._ask(
                    "ChangeMessageVisibilityBatch", self._client.change_message_visibility_batch, Entries=entries
                )
            except QueueUnavailable as error:
                log.warning("messages could not be hidden for another %d s: %s", seconds, error)
                continue
            for entry in answer.get("Failed") or []:
                if str(entry.get("Code", "")).rpartition(".")[2] not in NO_LONGER_OURS:
                    log.warning("a message could not be hidden for another %d s: %s", seconds, _entry_told(entry))

    def backlog(self) -> Backlog:
        """How many messages there are. Raises ``QueueUnavailable``."""
        names = (
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        )
        answer = self._ask("GetQueueAttributes", self._client.get_queue_attributes, AttributeNames=list(names))
        attributes = answer.get("Attributes", {})
        return Backlog(*(int(attributes.get(name, 0)) for name in names))

    def _ask(self, call: str, method: Callable[..., Any], **arguments: object) -> dict[str, Any]:
        """One call, tried again by botocore where that may help. Raises ``QueueUnavailable``."""
        try:
            answer = method(QueueUrl=self.url, **arguments)
        except (ClientError, BotoCoreError, ResponseParserError) as error:
            raise QueueUnavailable(f"SQS: {call}: {in_one_line(error)}") from error
        return answer if isinstance(answer, dict) else {}

    def _config_problem(self, cause: BaseException | None) -> RelayError | None:
        """The error of a first call as one sentence that says what to do, None when it may pass by itself."""
        if isinstance(cause, NoCredentialsError):
            return ConfigError(NO_CREDENTIALS)
        if not isinstance(cause, ClientError):
            return None
        code = code_of(cause)
        if code in MISSING_QUEUE:
            return ConfigError(
                f"the queue {self.url} does not exist in {self._client.meta.region_name}; check"
                " SES_ENGAGEMENT_SQS_QUEUE_URL and AWS_REGION"
            )
        if code in DENIED:
            needed = ", ".join(PERMISSIONS)
            return ConfigError(f"the queue {self.url} may not be used ({in_one_line(cause)}); allow {needed} on it")
        if code in BAD_CREDENTIALS:
            return ConfigError(f"Amazon refuses the AWS credentials ({in_one_line(cause)}); check them, and AWS_REGION")
        return None


def _check_credentials(frozen: Any) -> None:
    """Raises ``ConfigError`` when one could not stand in a header line: secrets' files often end with a line end."""
    for variable, value in (
        ("AWS_ACCESS_KEY_ID", frozen.access_key),
        ("AWS_SECRET_ACCESS_KEY", frozen.secret_key),
        ("AWS_SESSION_TOKEN", frozen.token),
    ):
        if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value):
            raise ConfigError(
                f"the AWS credentials cannot be used: {variable} is empty, or holds white space or an end of line;"
                " set it without"
            )


def region_of(queue_url: str) -> str:
    """The region that Amazon's own queue URLs name; '' for others. A queue is only ever found in its own."""
    found = REGION_IN_HOST.search(urlsplit(queue_url).hostname or "")
    return (found["after"] or found["before"]) if found else ""


def _batches(sqs_messages: Sequence[SqsMessage]) -> Iterator[Sequence[SqsMessage]]:
    for start in range(0, len(sqs_messages), BATCH):
        yield sqs_messages[start : start + BATCH]


def _sqs_message(received: dict[str, Any]) -> SqsMessage:
    attributes = received.get("Attributes", {})
    sent_ms = attributes.get("SentTimestamp")
    return SqsMessage(
        sqs_message_id=received.get("MessageId", ""),
        receipt_handle=received["ReceiptHandle"],
        body=received.get("Body", ""),
        received_count=int(attributes.get("ApproximateReceiveCount", 1)),
        sent_at=int(sent_ms) / 1000 if sent_ms else time.time(),
    )


def _max_receives(redrive_policy: str) -> int:
    try:
        return int(orjson.loads(redrive_policy)["maxReceiveCount"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return 0


def code_of(error: ClientError) -> str:
    """What Amazon calls its error; '' when it has no name."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def in_one_line(error: Exception) -> str:
    """One line: what Amazon says, or what botocore says of the connection."""
    if isinstance(error, ClientError):
        text = f"{code_of(error)}: {error.response.get('Error', {}).get('Message', '')}"
    elif isinstance(error, HTTPClientError) and not isinstance(error, CONNECTION_ERRORS):
        # Its text is that of any library below, and may hold a header line with the credentials.
        text = f"the request could not be sent ({type(error.__cause__ or error).__name__})"
    else:
        text = re.sub(r"//[^/@\s]*@", "//", str(error))  # user and password of an endpoint or a proxy
    return " ".join(text.split())[:300].rstrip(" :.")


def _entry_told(entry: dict[str, Any]) -> str:
    return " ".join(f"{entry.get('Code', '')}: {entry.get('Message', '')}".split())[:300]
