"""nats-py's client, made fit for callers that nobody can choose, and its errors put into words.

Owns what has to be mended in the library; every mend says what it is for. The connection is ``connection``'s.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable

import nats.errors
import nats.protocol.parser
from nats.aio.client import Client

from relay.bus.messages import NO_HEADERS, Msg, Publication
from relay.errors import BusRefused, BusUnavailable

log = logging.getLogger("relay.bus")

CONNECT_TIMEOUT_SECONDS = 5

PASSWORD_REFUSED = "user name or password was refused; check NATS_URL"


LONGEST_LINE_BYTES = 1024 * 1024
"""Of the server's own: it lists a whole cluster in INFO."""


class _Parser(nats.protocol.parser.Parser):
    """nats-py's parser, which it leaves everything but messages to.

    It tries one regular expression after the other at the head of a buffer that it shortens with every message; this
    walks along the buffer, and splits the control line where the server ends a token: at a space only. (Any white space
    ends one in nats-py, and a reply subject with a vertical tab, which any caller may send, breaks the connection.)
    """

    def reset(self) -> None:
        super().reset()
        self._rest = bytearray()
        self._needed_bytes = 0
        """Before there is anything to be done with what is there."""
        self._resets = getattr(self, "_resets", 0) + 1

    async def parse(self, data: bytes = b"") -> None:
        """Takes what was read, hands on what is whole, keeps the rest. Raises nats-py's ``ProtocolError``."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed_bytes:
                return
            data = bytes(self._rest)
            self._rest.clear()
        here, end, resets = 0, len(data), self._resets
        self._needed_bytes = 0
        while here < end:
            line_end = data.find(b"\r\n", here)
            if line_end < 0:
                if end - here > LONGEST_LINE_BYTES:
                    raise nats.errors.ProtocolError("nats: a control line without an end")
                break
            has_headers = data.startswith(b"HMSG ", here)
            if has_headers or data.startswith(b"MSG ", here):
                args = data[here:line_end].split(b" ")
                begin = line_end + 2
                try:
                    size_bytes = int(args[-1])
                    headers_end = begin + int(args[-2]) if has_headers else begin
                    sid = int(args[2])
                    reply = args[3] if len(args) == (6 if has_headers else 5) else b""
                except (ValueError, IndexError) as error:
                    raise nats.errors.ProtocolError("nats: malformed MSG") from error
                if begin + size_bytes + 2 > end:
                    self._needed_bytes = begin + size_bytes + 2 - here
                    break
                here = begin + size_bytes + 2
                headers = data[begin:headers_end] if has_headers else b""
                await self.nc._process_msg(sid, args[1], reply, data[headers_end : here - 2], headers)
            else:
                self.buf += data[here : line_end + 2]
                here = line_end + 2
                await super().parse()
            if self._resets != resets:  # the connection ended meanwhile
                return
        self._rest += data[here:]


class TamedClient(Client):
    """nats-py's client, but one message that cannot be decoded costs only itself, and none takes a detour.

    nats-py decodes reply subjects and headers strictly, outside any handler: a caller who sends a byte that is no
    UTF-8 ends its read loop, and the client stays "connected" and deaf until pings are missed. It puts each message
    into a queue for a task of its subscription, and makes coroutines of each publication; here a handler gets the
    message as it is read, and a publication is bytes in the list that nats-py's flusher writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps = _Parser(self)
        self._handlers: dict[int, Callable[[Msg], None]] = {}

    def hand_over(self, sid: int, handler: Callable[[Msg], None]) -> None:
        """From now on ``handler`` gets a subscription's messages at once; it must not block."""
        self._handlers[sid] = handler

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        if sid not in self._subs:
            self._handlers.pop(sid, None)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self._handlers.get(sid)
        try:
            if handler is None:
                await super()._process_msg(sid, subject, reply, data, headers)
                return
            found = await self._process_headers(headers) if headers else None
            msg = Msg(subject.decode(), reply.decode(), data, found or NO_HEADERS)
        except (OSError, nats.errors.Error):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one message, whatever is in it
            log.warning("dropped a message on %.100r that cannot be decoded: %s", subject, error)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            handler(msg)
        except Exception:
            log.exception("a message on %.100r could not be handed over", subject)

    def put(self, publication: Publication, reply_subject: str) -> None:
        """Queues a publication for the next ``send``. Raises ``BusUnavailable``, ``BusRefused`` (413: too large)."""
        if not self.is_connected:
            raise BusUnavailable("NATS: not connected")
        nats_subject, payload, headers = publication
        if headers:
            lines = [f"{name}: {value}" for name, value in headers.items()]
            if any("\n" in line or "\r" in line for line in lines):
                raise BusRefused(f"a header field of a message to {nats_subject} holds a line end", 400)
            block = "\r\n".join(["NATS/1.0", *lines, "\r\n"]).encode()
            size_bytes = len(block) + len(payload)
            command = f"HPUB {nats_subject} {reply_subject} {len(block)} {size_bytes}\r\n".encode() + block
        else:
            size_bytes = len(payload)
            command = f"PUB {nats_subject} {reply_subject} {size_bytes}\r\n".encode()
        if size_bytes > self._max_payload:
            raise BusRefused(
                f"a message of {size_bytes} bytes exceeds the server's max_payload of {self._max_payload}", 413
            )
        command = b"%b%b\r\n" % (command, payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size_bytes

    async def send(self) -> None:
        """Has what was put written soon. Does not wait for it."""
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

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
