"""nats-py's client, made fit for callers that nobody can choose, and its errors put into words.

Owns what has to be mended in the library; every mend says what it is for. The connection is ``connection``'s.
"""

from __future__ import annotations

import logging
import os
import re

import nats.errors
import nats.protocol.parser
from nats.aio.client import Client

log = logging.getLogger("relay.bus")

CONNECT_TIMEOUT_SECONDS = 5

PASSWORD_REFUSED = "user name or password was refused; check NATS_URL"


# The server ends a token of a control line at a space or a tab only. nats-py ends it at any white space, and takes a
# reply subject with a vertical tab or a form feed, which any caller may send, for a broken protocol: it disconnects.
_TOKEN, _GAP = rb"([^ \t\r\n]+)", rb"[ \t]+"
nats.protocol.parser.MSG_RE = re.compile(
    rb"\AMSG" + _GAP + _TOKEN + _GAP + _TOKEN + _GAP + rb"(" + _TOKEN + _GAP + rb")?(\d+)\r\n"
)
nats.protocol.parser.HMSG_RE = re.compile(
    rb"\AHMSG" + _GAP + _TOKEN + _GAP + _TOKEN + _GAP + rb"(" + _TOKEN + _GAP + rb")?(\d+)" + _GAP + rb"(\d+)\r\n"
)


class TamedClient(Client):
    """nats-py's client, but one message that cannot be decoded costs only itself.

    nats-py decodes reply subjects and headers strictly, outside any handler: a caller who sends a byte that is no
    UTF-8 ends its read loop, and the client stays "connected" and deaf until pings are missed.
    """

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except (OSError, nats.errors.Error):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one message, whatever is in it
            log.warning("dropped a message on %.100r that cannot be decoded: %s", subject, error)

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """As nats-py's, for a third of its cost: that looks at every name letter by letter, and a record has seven."""
        found = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon and (name.startswith("Nats-") or (name.isascii() and len(name.split()) == 1)):
                found[name.strip()] = value.strip(" \t\r\n\v\f")
        return found


def in_words(error: BaseException) -> str:
    """One line for an error of nats-py or the operating system; several have an empty ``str``."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, nats.errors.OutboundBufferLimitError | nats.errors.ConnectionClosedError):
        return "not connected"
    if isinstance(error, nats.errors.AuthorizationError) or "authorization violation" in str(error).lower():
        return PASSWORD_REFUSED
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    text = str(error).removeprefix("nats: ").strip().strip("'")
    return text or type(error).__name__


def is_hangup(error: Exception) -> bool:
    """Whether it only says that the server hung up, as it does after a refusal that was already told."""
    if isinstance(error, ConnectionRefusedError):
        return False
    return isinstance(error, ConnectionError | nats.errors.UnexpectedEOF)


def without_password(url: str) -> str:
    """The URL, or several separated by commas, as it may be shown: user and password left out, whatever they hold."""
    return ",".join(re.sub(r"//.*@", "//", part) for part in url.split(","))
