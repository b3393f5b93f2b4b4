"""Amazon SES's account, configuration sets and identities, as far as the credentials may ask. For diagnosis only.

Mail goes over SMTP, with credentials of its own; nothing here is needed for it. Changes nothing at Amazon. Credentials,
AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_SESV2 are found by boto3's own chains.

Sources: the Amazon SES API v2 reference (GetAccount, GetConfigurationSet, GetConfigurationSetEventDestinations,
GetEmailIdentity) and botocore's model of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from relay.aws.sqs import BAD_CREDENTIALS, DENIED, code_of, in_one_line
from relay.errors import RelayError

CONNECT_SECONDS = 3
ANSWER_SECONDS = 5
MISSING = "NotFoundException"
BAD_SIGNATURE = frozenset({"InvalidSignatureException", "RequestExpired", "RequestTimeTooSkewed"})


class SesNotAsked(RelayError):
    """There is no answer; ``is_denied``: Amazon does not give it to these credentials, or there are none."""

    def __init__(self, text: str, *, is_denied: bool) -> None:
        super().__init__(text)
        self.is_denied = is_denied


class Account(NamedTuple):
    """An account in one region."""

    is_sandboxed: bool
    """Only verified addresses get mail, 200 a day and 1 a second."""
    may_send: bool
    enforcement: str
    """``HEALTHY``, ``PROBATION``, ``SHUTDOWN``."""
    per_day: float
    """Recipients in 24 hours; -1: no limit."""
    per_second: float
    sent_last_day: float


class EventsDestination(NamedTuple):
    """Where a configuration set publishes events."""

    name: str
    topic: str
    """ARN of the SNS topic, '' for another kind of destination."""
    is_enabled: bool
    event_types: frozenset[str]
    """``SEND``, ``DELIVERY``, ``BOUNCE`` …"""


class Ses:
    """One region. Each call is one request, tried once; raises ``SesNotAsked``."""

    def __init__(self, region: str) -> None:
        """Looks for credentials; asks nothing of SES."""
        self.server_date = ""
        """What Amazon's last answer gave as its time (HTTP's Date)."""
        try:
            session = boto3.session.Session()
            if session.get_credentials() is None:
                raise SesNotAsked("there are no AWS credentials here", is_denied=True)
            self._client = session.client(
                "sesv2",
                region_name=region,
                config=Config(
                    connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS, retries={"total_max_attempts": 1}
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise SesNotAsked(f"the AWS credentials cannot be used: {in_one_line(error)}", is_denied=True) from error

    def account(self) -> Account:
        """What it may."""
        told = self._ask("ses:GetAccount", self._client.get_account)
        quota = told.get("SendQuota") or {}
        return Account(
            not told.get("ProductionAccessEnabled", False),
            bool(told.get("SendingEnabled", True)),
            str(told.get("EnforcementStatus", "")),
            float(quota.get("Max24HourSend", -1)),
            float(quota.get("MaxSendRate", -1)),
            float(quota.get("SentLast24Hours", 0)),
        )

    def may_send_with(self, configuration_set: str) -> bool | None:
        """Whether mail that names it may go out; None: there is no such set."""
        told = self._ask(
            "ses:GetConfigurationSet", self._client.get_configuration_set, ConfigurationSetName=configuration_set
        )
        if told is _NOTHING:
            return None
        return bool((told.get("SendingOptions") or {}).get("SendingEnabled", True))

    def destinations(self, configuration_set: str) -> list[EventsDestination]:
        """Where its events go; [] also where there is no such set."""
        told = self._ask(
            "ses:GetConfigurationSetEventDestinations",
            self._client.get_configuration_set_event_destinations,
            ConfigurationSetName=configuration_set,
        )
        return [
            EventsDestination(
                str(each.get("Name", "")),
                str((each.get("SnsDestination") or {}).get("TopicArn", "")),
                bool(each.get("Enabled")),
                frozenset(each.get("MatchingEventTypes") or ()),
            )
            for each in told.get("EventDestinations") or []
        ]

    def is_verified(self, sender: str) -> bool:
        """Whether mail may come from it: the address, its domain or one above is a verified identity."""
        for identity in _identities(sender):
            told = self._ask("ses:GetEmailIdentity", self._client.get_email_identity, EmailIdentity=identity)
            if told.get("VerifiedForSendingStatus"):
                return True
        return False

    def _ask(self, permission: str, method: Callable[..., Any], **arguments: object) -> dict[str, Any]:
        """The answer, ``_NOTHING`` where what is asked about does not exist."""
        try:
            answer: dict[str, Any] = method(**arguments)
        except ClientError as error:
            self._note_date(error.response)
            code = code_of(error)
            if code == MISSING:
                return _NOTHING
            if code in DENIED:
                raise SesNotAsked(f"the AWS credentials may not {permission}", is_denied=True) from error
            is_refused = code in BAD_CREDENTIALS or code in BAD_SIGNATURE
            told = in_one_line(error)
            text = f"Amazon refuses the AWS credentials ({told})" if is_refused else f"SES: {told}"
            raise SesNotAsked(text, is_denied=False) from error
        except (BotoCoreError, ResponseParserError) as error:
            raise SesNotAsked(f"SES: {in_one_line(error)}", is_denied=False) from error
        self._note_date(answer)
        return answer

    def _note_date(self, answer: Any) -> None:
        headers = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
        self.server_date = str(headers.get("date", ""))


_NOTHING: dict[str, Any] = {}


def _identities(sender: str) -> Iterator[str]:
    yield sender
    labels = sender.rpartition("@")[2].split(".")
    for start in range(len(labels) - 1):
        yield ".".join(labels[start:])
