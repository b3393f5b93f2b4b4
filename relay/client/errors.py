"""What a call of the client may end in, beside its result.

Every error knows the same few things, so that a caller may catch ``RelayClientError`` and look at ``outcome`` and
``retryable``, or catch what it cares about. ``str()`` may be logged: addresses in it are redacted. ``detail`` is what
the relay said, word for word, and may hold an address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from relay.redaction import without_addresses

if TYPE_CHECKING:
    from relay.client.replies import RecipientResult

REFUSED: Final = "refused"
FAILED: Final = "failed"
DEFERRED: Final = "deferred"
IN_DOUBT: Final = "in_doubt"
UNKNOWN: Final = "unknown"
"""The client's own: no answer came, so nothing is known."""


class RelayClientError(Exception):
    """Root of all errors of the client.

    ``error`` says what it is: the contract's error string where the relay answered. ``outcome`` is ``refused``,
    ``failed``, ``deferred``, ``in_doubt``, ``unknown``, or '' for a question. ``retryable`` says whether the same call
    may be made again without the risk of a second copy: with the same ``request_id``, where there is one.
    """

    retryable_as_a_class: ClassVar[bool] = False
    outcome_as_a_class: ClassVar[str] = ""
    settles: ClassVar[bool] = False
    """Whether it tells what became of the mail, also of tries before it that were not answered."""

    def __init__(
        self,
        error: str,
        *,
        detail: str = "",
        retryable: bool | None = None,
        reply_code: int | None = None,
        enhanced_code: str = "",
        email_id: str = "",
        group_id: str = "",
        recipients: tuple[RecipientResult, ...] = (),
        duplicate: bool = False,
    ) -> None:
        super().__init__(error)
        self.error = error
        self.detail = detail
        """One line for the caller's developer."""
        self.outcome = self.outcome_as_a_class
        self.retryable = self.retryable_as_a_class if retryable is None else retryable
        self.reply_code = reply_code
        """The smarthost's, when it said one."""
        self.enhanced_code = enhanced_code
        self.email_id = email_id
        """Of a mail in doubt: it has a record."""
        self.group_id = group_id
        self.recipients = recipients
        """What became of each recipient, when the relay says so."""
        self.duplicate = duplicate
        """It is the answer that this request_id had been given before."""
        self.request_id = ""
        """Under which the mail was sent; '' when it had none."""
        self.tries = 0
        """How often it was tried."""

    def __str__(self) -> str:
        said = f"{self.error}: {self.detail}" if self.detail else self.error
        return without_addresses(said)


class Refused(RelayClientError):
    """The relay will not send this mail: it breaks the contract or a rule of its operator. Nothing was sent."""

    outcome_as_a_class = REFUSED
    settles = True


class Failed(RelayClientError):
    """The mail was refused for good, by the smarthost or for its recipient's address. Trying again changes nothing."""

    outcome_as_a_class = FAILED
    settles = True


class Deferred(RelayClientError):
    """The relay could not send the mail now; nothing was sent. The client has tried again for as long as it may."""

    outcome_as_a_class = DEFERRED
    retryable_as_a_class = True


class InDoubt(RelayClientError):
    """The smarthost may have the mail: it was handed over and no reply came. Its record tells when more is known."""

    outcome_as_a_class = IN_DOUBT
    settles = True


class NoAnswer(RelayClientError):
    """No answer came in time, or none that can be read: the mail may have been sent, or not.

    ``retryable`` when it has a request_id: the relay sends a mail once under it, so the same call with that request_id
    is safe. Without one nobody can say.
    """

    outcome_as_a_class = UNKNOWN


class NotHandedOver(RelayClientError):
    """The request reached no relay; nothing was sent."""

    outcome_as_a_class = DEFERRED
    retryable_as_a_class = True


class NoResponders(NotHandedOver):
    """NATS says that nobody serves the subject at the moment."""


class NotConnected(NotHandedOver):
    """There is no connection to NATS, or the client is closed."""


class NotPermitted(RelayClientError):
    """NATS does not let this user ask, or hear the answer: its permissions are to be changed."""

    outcome_as_a_class = REFUSED


class InvalidMail(RelayClientError):
    """The mail cannot be made into a request."""

    outcome_as_a_class = REFUSED


class RequestTooLarge(InvalidMail):
    """The request exceeds what NATS takes in one message (``max_payload``): put large attachments into a bucket."""


class ObjectFailed(RelayClientError):
    """The object could not be put into its bucket, or deleted; ``detail`` says why."""


class QuestionFailed(RelayClientError):
    """The relay answered a question about a mail or a group with an error."""


class NotFound(QuestionFailed):
    """There is no record of it."""
