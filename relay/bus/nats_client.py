"""nats-py's client, made fit for callers that nobody can choose, and its errors put into words.

Owns what has to be mended in the library; every mend says what it is for. The connection is ``connection``'s.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import nats.aio.client
import nats.errors
import nats.protocol.parser
from nats.aio.client import Client

from relay.bus.access import Access
from relay.bus.config import BusConfig, without_password
from relay.bus.messages import NO_HEADERS, FixedHeaders, Msg, Publication, header_block
from relay.errors import BusRefused, BusUnavailable, ConfigError

__all__ = ["AccessUnusable", "TamedClient", "in_words", "is_hangup", "is_refusal", "without_password"]

T = TypeVar("T")

log = logging.getLogger("relay.bus")

CONNECT_TIMEOUT_SECONDS = 5

READ_BYTES = 256 * 1024
"""At a time. nats-py's 32 KiB hold eight mails: each piece costs a turn of the loop, and mostly cuts a mail in two."""

nats.aio.client.DEFAULT_BUFFER_SIZE = READ_BYTES  # it is no option; whatever else it sizes there reads as well

LONGEST_LINE_BYTES = 1024 * 1024
"""Of the server's own: it lists a whole cluster in INFO."""

_MSG = re.compile(rb"MSG ([^ \r\n]+) (\d+) (?:([^ \r\n]+) )?(\d+)\r\n")
"""``MSG subject sid [reply] size``; a space alone parts two words."""

_HMSG = re.compile(rb"HMSG ([^ \r\n]+) (\d+) (?:([^ \r\n]+) )?(\d+) (\d+)\r\n")
"""``HMSG subject sid [reply] header-size size``; the size is that of header fields and payload together."""

_PERMISSIONS = "permissions violation"
"""In an error of the server's that does not end the connection, in nats-py's lower case."""

_NO_TEXT = "dropped a message on %.100r that cannot be decoded: %s"


class _Parser(nats.protocol.parser.Parser):
    """nats-py's parser, which it leaves everything but messages to.

    It tries one regular expression after the other at the head of a buffer that it shortens with every message; this
    walks along the buffer, and splits the control line where the server ends a token: at a space only. (Any white space
    ends one in nats-py, and a reply subject with a vertical tab, which any caller may send, breaks the connection.)
    A message without header fields, as most are, goes to its handler without a coroutine.
    """

    nc: TamedClient

    def reset(self) -> None:
        super().reset()
        self._rest = bytearray()
        self._needed_bytes = 0
        """Before there is anything to be done with what is there."""
        self.line = b""
        """The control line that nats-py was given last."""
        self._resets = getattr(self, "_resets", 0) + 1

    async def parse(self, data: bytes = b"") -> None:
        """Takes what was read, hands on what is whole, keeps the rest. Raises nats-py's ``ProtocolError``."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed_bytes:
                return
            data = bytes(self._rest)
            self._rest.clear()
        here, end, resets, nc = 0, len(data), self._resets, self.nc
        match, handlers = _MSG.match, nc.handlers
        self._needed_bytes = 0
        while here < end:
            if (found := match(data, here)) is not None:
                nats_subject, sid, reply, size_bytes = found.groups()
                begin = found.end()
                payload_end = begin + int(size_bytes)
                if payload_end + 2 > end:
                    self._needed_bytes = payload_end + 2 - here
                    break
                here = payload_end + 2
                if (handler := handlers.get(int(sid))) is not None:
                    nc.pass_on(handler, nats_subject, reply, data[begin:payload_end], NO_HEADERS)
                    continue
                await nc._process_msg(int(sid), nats_subject, reply or b"", data[begin:payload_end], b"")
            elif (found := _HMSG.match(data, here)) is not None:
                nats_subject, sid, reply, headers_bytes, size_bytes = found.groups()
                begin = found.end()
                payload_at, payload_end = begin + int(headers_bytes), begin + int(size_bytes)
                if payload_at > payload_end:
                    raise nats.errors.ProtocolError("nats: malformed MSG")
                if payload_end + 2 > end:
                    self._needed_bytes = payload_end + 2 - here
                    break
                here = payload_end + 2
                headers, payload = data[begin:payload_at], data[payload_at:payload_end]
                await nc._process_msg(int(sid), nats_subject, reply or b"", payload, headers)
            else:
                line_end = data.find(b"\r\n", here) + 2
                if line_end < 2:
                    if end - here > LONGEST_LINE_BYTES:
                        raise nats.errors.ProtocolError("nats: a control line without an end")
                    break
                if data.startswith((b"MSG ", b"HMSG "), here):
                    raise nats.errors.ProtocolError("nats: malformed MSG")
                self.line = data[here:line_end]
                self.buf += self.line
                here = line_end
                await super().parse()
            if self._resets != resets:  # the connection ended meanwhile
                return
        self._rest += data[here:]


class AccessUnusable(nats.errors.Error):
    """What is to be presented to the server cannot be had, or the server does not offer TLS; the text says why."""


class TamedClient(Client):
    """nats-py's client, but one message that cannot be decoded costs only itself, and none takes a detour.

    nats-py decodes reply subjects and headers strictly, outside any handler: a caller who sends a byte that is no
    UTF-8 ends its read loop, and the client stays "connected" and deaf until pings are missed. It puts each message
    into a queue for a task of its subscription, and makes coroutines of each publication; here a handler gets the
    message as it is read, and publications are bytes that go to the transport in one write. nats-py's ``stats`` count
    neither.

    Credentials and certificates are read anew for each connection. nats-py goes on in clear text when the server does
    not ask for TLS, whatever the URL says: whoever is in between would get the password by leaving that out.
    """

    def __init__(self, access: Access | None = None) -> None:
        super().__init__()
        self._access = access or Access(BusConfig(""))
        self._ps: _Parser = _Parser(self)
        self.handlers: dict[int, Callable[[Msg], None]] = {}
        """Of which subscription, by nats-py's number for it."""
        self._unsent: list[bytes] = []

    def hand_over(self, sid: int, handler: Callable[[Msg], None]) -> None:
        """From now on ``handler`` gets a subscription's messages at once; it must not block."""
        self.handlers[sid] = handler

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        super()._remove_sub(sid, max_msgs)
        if sid not in self._subs:
            self.handlers.pop(sid, None)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self.handlers.get(sid)
        try:
            if handler is None:
                await super()._process_msg(sid, subject, reply, data, headers)
                return
            found = await self._process_headers(headers) if headers else None
        except (OSError, nats.errors.Error):
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of one message, whatever is in it
            log.warning(_NO_TEXT, subject, error)
            return
        self.pass_on(handler, subject, reply, data, found or NO_HEADERS)

    def pass_on(
        self,
        handler: Callable[[Msg], None],
        nats_subject: bytes,
        reply: bytes | None,
        payload: bytes,
        headers: Mapping[str, str],
    ) -> None:
        """Gives a handler its message; whatever comes of that, the connection goes on."""
        try:
            msg = Msg(nats_subject.decode(), reply.decode() if reply else "", payload, headers)
        except UnicodeDecodeError as error:
            log.warning(_NO_TEXT, nats_subject, error)
            return
        try:
            handler(msg)
        except Exception:
            log.exception("a message on %.100r could not be handed over", nats_subject)

    def put(self, publication: Publication, reply_subject: str) -> None:
        """Keeps a publication for the next ``send``; never switches greenlets.

        Raises ``BusUnavailable``, and ``BusRefused``: 413 when it is too large, 400 when it is no text.
        """
        if not self.is_connected:
            raise BusUnavailable("NATS: not connected")
        nats_subject, payload, headers = publication
        size_bytes = len(payload)
        try:
            if headers:
                block = headers.block if type(headers) is FixedHeaders else header_block(headers)
                size_bytes += len(block)
                command = f"HPUB {nats_subject} {reply_subject} {len(block)} {size_bytes}\r\n".encode() + block
            else:
                command = f"PUB {nats_subject} {reply_subject} {size_bytes}\r\n".encode()
        except ValueError as error:
            raise BusRefused(f"a message to {nats_subject!r} cannot be written: {error}", 400) from error
        if size_bytes > self._max_payload:
            raise BusRefused(
                f"a message of {size_bytes} bytes exceeds the server's max_payload of {self._max_payload}", 413
            )
        self._unsent += (command, payload, b"\r\n")

    def send(self) -> int:
        """Writes what was put, after what nats-py itself has to write. Never waits: the transport keeps what is left.

        How many publications are dropped, since the connection was lost meanwhile: none is for a later connection.
        A write that fails ends the connection, and nats-py's reader finds that out; one that the server does not take
        is found out by the pings that it does not answer.
        """
        unsent, self._unsent = self._unsent, []
        if not self.is_connected or self._transport is None:
            return len(unsent) // 3
        if self._pending:
            unsent = [*self._pending, *unsent]
            self._pending = []
            self._pending_data_size = 0
        if unsent:
            # Not ``writelines``: with Python 3.12's first releases that raises when the connection was just lost.
            self._transport.write(b"".join(unsent))
        return 0

    def login_options(self) -> dict[str, Any]:
        """What ``connect`` is to be told: functions, which it calls for each connection."""
        access, config = self._access, self._access.config
        options: dict[str, Any] = {"tls_handshake_first": config.tls_first}
        if config.creds_file:
            options |= {"user_jwt_cb": lambda: _usable(access.jwt), "signature_cb": self._sign}
        elif config.nkey_seed_file:
            options["signature_cb"] = self._sign
        elif config.user:
            options |= {"user": lambda: config.user, "password": lambda: _usable(access.password)}
        elif config.token_file:
            options["token"] = lambda: _usable(access.token)
        return options

    def _sign(self, nonce: str) -> bytes:
        signature = _usable(lambda: self._access.sign(nonce))
        self._public_nkey = signature.public_key  # it may be another one than at the last connection
        return signature.base64

    @property
    def ssl_context(self) -> ssl.SSLContext:
        return _usable(self._access.tls_context)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._access.config.requires_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise AccessUnusable("it offers no TLS, which our settings ask for; nothing was said to it")
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_err(self, err_msg: str) -> None:
        """A refused subject is told as it is written: nats-py has put the whole line into lower case."""
        if _PERMISSIONS not in err_msg:
            await super()._process_err(err_msg)
            return
        said = self._ps.line.removeprefix(b"-ERR").strip().decode("utf-8", "replace")
        self._err = nats.errors.Error(f"nats: {said}")
        await self._error_cb(self._err)

    async def _process_connect_init(self) -> None:
        """Leaves at once what could not be set up.

        nats-py would wait for its end, and where TLS has failed, asyncio tells that to nobody: for ever.
        """
        transport: Any = self._transport
        try:
            await super()._process_connect_init()
        except BaseException:
            self._abort()
            transport._io_reader = transport._io_writer = None
            raise
        if transport._io_writer.get_extra_info("ssl_object") is not None:  # or asyncio warns at every end of it
            transport._io_writer.transport.get_protocol()._over_ssl = True

    def _abort(self) -> None:
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _attempt_reconnect(self) -> None:
        """Reconnects at once. nats-py would first close politely, and wait until all is written to who may be gone."""
        self._abort()
        await super()._attempt_reconnect()

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """As nats-py's, for a third of its cost: that looks at every name letter by letter, and a record has seven."""
        found = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon and (name.startswith("Nats-") or (name.isascii() and len(name.split()) == 1)):
                found[name.strip()] = value.strip(" \t\r\n\v\f")
        return found


def _usable(read: Callable[[], T]) -> T:
    """As nats-py takes errors for it to try again after a while."""
    try:
        return read()
    except ConfigError as error:
        raise AccessUnusable(str(error)) from error


def in_words(error: BaseException) -> str:
    """One line for an error of nats-py or the operating system; several have an empty ``str``."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, nats.errors.OutboundBufferLimitError | nats.errors.ConnectionClosedError):
        return "not connected"
    if isinstance(error, nats.errors.AuthorizationError):
        return "authorization violation"
    if isinstance(error, ssl.SSLError):
        return _tls_in_words(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    text = str(error).removeprefix("nats: ").strip().strip("'")
    if "expecting INFO" in text:
        return "it closed the connection and said nothing; if it waits for TLS, set NATS_TLS_FIRST"
    return text or type(error).__name__


def _tls_in_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        told = error.verify_message.rstrip(".")
        told = told[:1].lower() + told[1:]
        if "mismatch" in told:
            return f"its certificate is another host's: {told}; NATS_URL has to name the server as the certificate does"
        if "expired" in told or "not yet valid" in told:
            return f"its certificate is not valid now: {told}; renew it on the server, and check this host's clock"
        return f"its certificate is not trusted: {told}; set NATS_CA to a file with the CA that signed it"
    reason = str(error.reason or "").upper()
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")):
        told = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return f"it does not accept our certificate ({told}); check NATS_CERT and NATS_KEY"
    if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}:
        return "it does not begin with TLS; unset NATS_TLS_FIRST, or set handshake_first on the server"
    return f"TLS failed: {reason.replace('_', ' ').lower() or 'no reason given'}"


_REFUSALS = re.compile(r"authorization violation|authentication (?:expired|revoked|timeout)", re.IGNORECASE)


def is_refusal(error: BaseException | None) -> bool:
    """Whether NATS refuses who we say we are."""
    return isinstance(error, nats.errors.AuthorizationError) or bool(_REFUSALS.search(str(error or "")))


def is_hangup(error: Exception) -> bool:
    """Whether it only says that the server hung up, as it does after a refusal that was already told."""
    if isinstance(error, ConnectionRefusedError):
        return False
    return isinstance(error, ConnectionError | nats.errors.UnexpectedEOF)
