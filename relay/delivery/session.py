"""One SMTP session: mail transactions over an open connection (RFC 5321 §3.3, §4.1.1, §4.5.4; RFC 2920).

Owns the order of commands, pipelining and the pairing of replies with commands. ``wire`` has their syntax;
``dialling`` opens sessions; ``trouble`` says what a refusal means; ``pool`` decides how long a session lives.

A transaction always ends in outcomes. After it the session is reusable only when every command has its reply and
nothing else has arrived: a reply too many or too few would be taken for the answer to the next mail.
"""

from __future__ import annotations

import re
import time
from typing import Final

from relay.delivery.channel import Channel
from relay.delivery.config import SmarthostConfig
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Extensions, Reply, ReplyBuffer
from relay.delivery.trouble import (
    LocalFailure,
    Trouble,
    classify_local,
    classify_reply,
    failed_here,
    is_goodbye,
    refused,
)
from relay.delivery.wire import END_OF_CONTENT, dot_stuffed, is_plain_path, is_safe_path, mail_command, rcpt_command
from relay.errors import ProtocolViolation

MAX_GROUP_BYTES: Final = 16384
"""Commands in one pipelined write: more might fill both directions' buffers and block for ever (RFC 2920 §3.1)."""

# The usual answer to MAIL, one RCPT and DATA; anything else goes the long way.
_GO_AHEAD: Final = re.compile(rb"250 [^\r\n]*\r\n25[01] [^\r\n]*\r\n354 [^\r\n]*\r\n")
_OPEN: Final = Outcome(State.DEFERRED)
"""Stands in a list of results for a recipient whose outcome is not known yet."""


class _Goodbye(Exception):
    """The peer said that it closes the connection."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class Session:
    """A connection on which EHLO, TLS and AUTH are done. One greenlet at a time may use it."""

    def __init__(self, channel: Channel, extensions: Extensions, config: SmarthostConfig, default_sender: str) -> None:
        self._channel = channel
        self._replies = ReplyBuffer()
        self._extensions = extensions
        self._config = config
        self._default_sender = default_sender
        self._phase = Phase.MAIL
        self._reverse_path = ""
        self._needs_rset = False
        self._is_broken = False
        self._is_in_transaction = False
        self._has_reply = False
        self.opened_at = time.monotonic()
        self.idle_since = self.opened_at
        """Kept by the pool."""
        self.transactions = 0
        """Begun so far."""
        self.trouble: Trouble | None = None
        """The widest trouble of the last transaction."""
        self.is_stale = False
        """Whether the last transaction failed on its first command because the peer had already hung up on this
        reused connection: nothing has been tried yet, so the mail may go out again at once."""

    @property
    def extensions(self) -> Extensions:
        """What the smarthost offered in its last EHLO answer."""
        return self._extensions

    @property
    def is_reusable(self) -> bool:
        """Whether another transaction may follow."""
        return not (self._is_broken or self._is_in_transaction)

    def transact(
        self, reverse_path: str, forward_paths: tuple[str, ...], content: bytes, deadline: float
    ) -> list[Outcome]:
        """Hand one mail over; return one outcome per forward-path, in the same order.

        Blocks until ``deadline`` (``time.monotonic()``) at most up to the final dot, and ``dot_timeout_seconds`` after
        it. Never raises for what the peer or the network does. ``content`` has CRLF line ends; it is dot-stuffed here.
        """
        self.trouble = None
        self.is_stale = False
        self._reverse_path = reverse_path
        is_ascii = True
        limit_bytes = self._extensions.size_limit_bytes
        if (limit_bytes and len(content) > limit_bytes) or not (
            is_plain_path(reverse_path) and all(map(is_plain_path, forward_paths))
        ):
            is_ascii = reverse_path.isascii() and all(map(str.isascii, forward_paths))
            failure = self._reason_not_to_send((reverse_path, *forward_paths), len(content), is_ascii)
            if failure is not None:
                return [self._local_outcome(Phase.MAIL, failure)] * len(forward_paths)
        results = [_OPEN] * len(forward_paths)
        size_bytes = len(content) if self._extensions.size else None
        mail = mail_command(reverse_path, size_bytes, is_smtputf8=not is_ascii)
        rcpts = [rcpt_command(path) for path in forward_paths]
        # Until this is taken back, an exception that passes through (a killed greenlet) leaves an unusable session.
        self._is_in_transaction = True
        self._has_reply = False
        self.transactions += 1
        try:
            self._send_mail(mail, rcpts, content, deadline, results)
        except _Goodbye as goodbye:
            self._is_broken = True
            self.is_stale = self.transactions > 1 and not self._has_reply
            _fill(results, self._refusal(goodbye.reply))
        except (OSError, ProtocolViolation) as error:
            failure = local_failure(error)
            self.is_stale = self.transactions > 1 and not self._has_reply and failure is LocalFailure.LOST
            detail = str(error) if failure is LocalFailure.GARBAGE else ""
            _fill(results, self._local_outcome(self._phase, failure, detail))
        self._is_in_transaction = False
        if not self._replies.is_empty:
            self._is_broken = True
        return results

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open with nothing said: what arrived unasked answers no command."""
        if self._channel.read_available() is None:
            return True
        self._is_broken = True
        return False

    def noop(self) -> Reply:
        """Ask for nothing and return the reply. Raises ``OSError`` or ``ProtocolViolation``."""
        return self._ask(Phase.NOOP, b"NOOP\r\n", time.monotonic() + self._config.command_timeout_seconds)

    def quit(self, wait_seconds: float = 0.0) -> None:
        """Say goodbye when that is possible and close; waits for the answer at most ``wait_seconds``."""
        until = time.monotonic() + wait_seconds
        try:
            if self.is_reusable:
                self._channel.write(b"QUIT\r\n", until)
                if wait_seconds:
                    self._channel.read(until)
        except OSError:
            pass  # It is closed either way, and nothing is lost by it.
        finally:
            self.close()

    def close(self) -> None:
        """Close without a word; a transaction in another greenlet ends at once as if the connection were lost."""
        self._is_broken = True
        self._channel.close()

    def _send_mail(
        self, mail: bytes, rcpts: list[bytes], content: bytes, deadline: float, results: list[Outcome]
    ) -> None:
        """Do the transaction; what it leaves ``_OPEN`` in ``results`` is settled by the exception that it raises."""
        until = min(deadline, time.monotonic() + self._config.command_timeout_seconds)
        self._phase = Phase.MAIL
        is_pipelined = False
        if self._extensions.pipelining:
            group = b"".join((b"RSET\r\n" if self._needs_rset else b"", mail, *rcpts, b"DATA\r\n"))
            if len(group) <= MAX_GROUP_BYTES:
                is_pipelined = True
                self._channel.write(group, until)
                chunk = self._channel.read(until)
                if len(rcpts) == 1 and _GO_AHEAD.fullmatch(chunk) and not self._needs_rset:
                    self._send_content(content, deadline, results)
                    return
                self._feed(chunk)
        if self._open_transaction(mail, rcpts, results, deadline, is_pipelined):
            self._send_content(content, deadline, results)

    def _open_transaction(
        self, mail: bytes, rcpts: list[bytes], results: list[Outcome], deadline: float, is_pipelined: bool
    ) -> bool:
        """Take the commands up to DATA one by one; return whether the peer waits for content that we want to send.

        When pipelined they are already sent, so every reply is read, whatever the ones before it said.
        """

        def ask(phase: Phase, command: bytes) -> Reply:
            limit = min(deadline, time.monotonic() + self._config.command_timeout_seconds)
            reply = self._ask(phase, b"" if is_pipelined else command, limit)
            if is_goodbye(reply):
                raise _Goodbye(reply)
            self._has_reply = True
            return reply

        if self._needs_rset:
            if not ask(Phase.RSET, b"RSET\r\n").is_positive:
                raise ProtocolViolation("RSET was refused")
            self._needs_rset = False
        reply = ask(Phase.MAIL, mail)
        is_mail_accepted = self._settle(reply, results)
        if not is_mail_accepted and not is_pipelined:
            return False
        for index, rcpt in enumerate(rcpts):
            reply = ask(Phase.RCPT, rcpt)
            if is_mail_accepted and not reply.is_positive:
                results[index] = self._refusal(_no_intermediate(reply))
        is_any_accepted = any(result is _OPEN for result in results)
        if not is_any_accepted and not is_pipelined:
            self._needs_rset = True
            return False
        reply = ask(Phase.DATA, b"DATA\r\n")
        if not reply.is_intermediate:
            if reply.is_positive:
                raise ProtocolViolation("DATA was answered with 2yz")
            self._settle(reply, results)
            self._needs_rset = is_mail_accepted
        elif not is_any_accepted:
            self._end_empty_content(deadline)
        return reply.is_intermediate and is_any_accepted

    def _send_content(self, content: bytes, deadline: float, results: list[Outcome]) -> None:
        """Send the content with its final dot and settle every recipient that is still open."""
        self._has_reply = True
        self._phase = Phase.CONTENT
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError
        self._expect_silence()
        try:
            self._channel.write(dot_stuffed(content), min(deadline, now + self._config.content_timeout_seconds))
        except TimeoutError:
            raise
        except OSError:
            self._read_last_words(results)
            raise
        self._phase = Phase.DOT
        reply = self._read_reply(time.monotonic() + self._config.dot_timeout_seconds)
        if not reply.is_positive:
            if is_goodbye(reply):
                raise _Goodbye(reply)
            self._settle(reply, results)
            return
        code, _, enhanced_code = reply
        _fill(
            results,
            Outcome(State.RELAYED, reply.text, code, enhanced_code, SaidBy.PEER, Phase.DOT, 1, reply.remote_id),
        )

    def _end_empty_content(self, deadline: float) -> None:
        """Answer a 354 that came although nobody is left to receive: one dot, and its reply means nothing to us."""
        until = min(deadline, time.monotonic() + self._config.command_timeout_seconds)
        self._channel.write(END_OF_CONTENT, until)
        self._read_reply(until)

    def _read_last_words(self, results: list[Outcome]) -> None:
        """A server that refuses the content half-way says so (552) before it hangs up: take that as the reason."""
        last_words = self._channel.read_available()
        if not last_words:
            return
        self._replies.feed(last_words)
        reply = self._replies.take()
        if reply is None:
            return
        if is_goodbye(reply):
            raise _Goodbye(reply)
        if not reply.is_positive:
            self._settle(reply, results)

    def _settle(self, reply: Reply, results: list[Outcome]) -> bool:
        """Give every open recipient the refusal in ``reply``; return whether it is none."""
        if reply.is_positive:
            return True
        _fill(results, self._refusal(_no_intermediate(reply)))
        return False

    def _ask(self, phase: Phase, command: bytes, until: float) -> Reply:
        """Send ``command`` (b'' when it has been sent) and read its reply."""
        self._phase = phase
        if command:
            self._expect_silence()
            self._channel.write(command, until)
        return self._read_reply(until)

    def _expect_silence(self) -> None:
        """Refuse a reply to no command: it would be taken for the answer to what is sent next."""
        if not self._replies.is_empty:
            raise ProtocolViolation("a reply to no command")

    def _read_reply(self, until: float) -> Reply:
        while (reply := self._replies.take()) is None:
            self._feed(self._channel.read(until))
        return reply

    def _feed(self, chunk: bytes) -> None:
        if not chunk:
            raise ConnectionError("the peer hung up")
        self._replies.feed(chunk)

    def _reason_not_to_send(self, paths: tuple[str, ...], content_bytes: int, is_ascii: bool) -> LocalFailure | None:
        """Look closely at what is not plain or may be too big; ``paths`` begins with the reverse-path."""
        if not all(map(is_safe_path, paths)):
            return LocalFailure.BAD_PATH
        if not is_ascii and not self._extensions.smtputf8:
            return LocalFailure.NEEDS_SMTPUTF8
        limit_bytes = self._extensions.size_limit_bytes
        return LocalFailure.TOO_BIG if limit_bytes and content_bytes > limit_bytes else None

    def _refusal(self, reply: Reply) -> Outcome:
        sender = self._default_sender if self._reverse_path == self._default_sender else ""
        trouble = classify_reply(self._phase, reply, default_sender=sender)
        self._note(trouble)
        return refused(trouble, self._phase, reply)

    def _local_outcome(self, phase: Phase, failure: LocalFailure, detail: str = "") -> Outcome:
        trouble = classify_local(phase, failure)
        self._note(trouble)
        return failed_here(trouble, phase, failure, detail)

    def _note(self, trouble: Trouble) -> None:
        if self.trouble is None or trouble.radius > self.trouble.radius:
            self.trouble = trouble
        if not trouble.is_reusable:
            self._is_broken = True


def local_failure(error: OSError | ProtocolViolation) -> LocalFailure:
    """Name what an exception from an open connection means."""
    if isinstance(error, ProtocolViolation):
        return LocalFailure.GARBAGE
    return LocalFailure.TIMEOUT if isinstance(error, TimeoutError) else LocalFailure.LOST


def _fill(results: list[Outcome], outcome: Outcome) -> None:
    for index, result in enumerate(results):
        if result is _OPEN:
            results[index] = outcome


def _no_intermediate(reply: Reply) -> Reply:
    """Refuse 3yz where only yes or no can be said."""
    if reply.is_intermediate:
        raise ProtocolViolation(f"{reply.code} where it is not expected")
    return reply
