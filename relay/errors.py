"""What stops a call. Expected results are values (``delivery.outcome``), not exceptions.

Every exception knows ``retryable`` as a fact of its class, says in one clear sentence what to
do, and keeps its cause with ``raise ... from``.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
"""Asked to stop, and stopped in order."""
EXIT_FAILED = 1
"""A command could not do what it was asked, or a worker could not go on: it may after a new start."""
EXIT_TEMPORARY = 75
"""Something that may pass by itself (EX_TEMPFAIL): start the process again later."""
EXIT_CONFIG = 78
"""The configuration is wrong (EX_CONFIG): starting again changes nothing."""


class RelayError(Exception):
    """Root of every exception that Relay raises on purpose."""

    retryable: ClassVar[bool] = False


class ConfigError(RelayError):
    """The settings are unusable; the text names every bad one."""


class SubmissionRejected(RelayError):
    """The request breaks the contract or the domain rules.

    ``error`` is the contract's error string, ``field`` the payload field at fault ('' for the
    payload as a whole), ``detail`` one line for the caller's developer ('' when there is nothing to add).
    """

    def __init__(self, error: str, field: str = "", detail: str = "") -> None:
        super().__init__(f"{error}: {detail}" if detail else error)
        self.error = error
        self.field = field
        self.detail = detail


class AddressInvalid(RelayError):
    """The text is no RFC 5321 mailbox; ``str()`` says what is wrong with it."""


class EgressUnavailable(RelayError):
    """No connection to the smarthost could be had; nothing was sent."""

    retryable = True


class ConnectFailed(EgressUnavailable):
    """Connecting, the TLS handshake or the greeting failed."""


class AuthenticationRefused(EgressUnavailable):
    """The smarthost refused the credentials: every mail would meet the same."""


class PoolTimeout(EgressUnavailable):
    """No connection became free before the deadline."""


class RateTimeout(EgressUnavailable):
    """The sending rate leaves no room before the deadline."""


class PoolClosed(EgressUnavailable):
    """The pool is shutting down."""


class ProtocolViolation(RelayError):
    """The peer said something that RFC 5321 does not allow; the connection is unusable."""

    retryable = True


class BusUnavailable(RelayError):
    """NATS is not connected, or did not answer before the deadline."""

    retryable = True


class BusRefused(RelayError):
    """NATS answered with an error; ``code`` is the JetStream error code, or the status code."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class QueueUnavailable(RelayError):
    """SQS did not answer, or refused the call as a whole; what was asked may or may not have been done."""

    retryable = True


class RevisionConflict(BusRefused):
    """The key was changed by someone else since it was read."""

    retryable = True
