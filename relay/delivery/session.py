"""One SMTP session: mail transactions over an open connection (RFC 5321 §3.3, §4.1.1, §4.5.4; RFC 2920).

Owns the order of commands, pipelining and the pairing of replies with commands. ``wire`` has their syntax;
``dialling`` opens sessions; ``trouble`` says what a refusal means; ``pool`` decides how long a session lives.

A transaction always ends in outcomes. After it the session is reusable only when every command has its reply and
nothing else has arrived: a reply too many or too few would be taken for the answer to the next mail.

A caller may have the last word: its ``commit`` is asked between the 354 and the first octet of the content, and when it
says no the connection is closed without the final dot, so that the peer has no mail (RFC 5321 §4.1.1.4).

A caller does not wait for the final dot's reply beyond its deadline: the transaction then ends in doubt for it, and
whoever has the session goes on with ``await_dot`` until the smarthost has spoken.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from relay.delivery.channel import Channel, ChannelTimeout
from relay.delivery.config import Host, SmarthostConfig
from relay.delivery.outcome import Outcome, Phase, SaidBy, State
from relay.delivery.reply import Extensions, Reply, ReplyBuffer, plain_250, remote_id_in
from relay.delivery.trouble import (
    LocalFailure,
    Radius,
    Remedy,
    Trouble,
    classify_local,
    classify_reply,
    failed_here,
    is_goodbye,
    refused,
)
from relay.delivery.wire import (
    END_OF_CONTENT,
    are_plain_paths,
    dot_stuffed,
    dot_stuffed_pieces,
    is_safe_path,
    mail_command,
    plain_commands,
    rcpt_command,
)
from relay.errors import ProtocolViolation

MAX_GROUP_BYTES: Final = 16384
"""Commands in one pipelined write: more might fill both directions' buffers and block for ever (RFC 2920 §3.1)."""

WAITED_SECONDS: Final = 1.0
"""A connection whose first mail comes later than this has waited, and may have been given up by the peer meanwhile."""

LARGE_CONTENT_BYTES: Final = 65536
"""More than that is still being sent when a server that has read its beginning refuses it; it is made ready piece by
piece, for the sake of memory."""

# The usual answer to MAIL, one RCPT and DATA; anything else goes the long way.
_GO_AHEAD: Final = re.compile(rb"250 [^\r\n]*\r\n25[01] [^\r\n]*\r\n354 [^\r\n]*\r\n")
_OPEN: Final = Outcome(State.DEFERRED)
"""Stands in a list of results for a recipient whose outcome is not known yet."""

Commit = Callable[[Sequence[int]], bool]
"""Asked whether the content may go out now, and given the places of those forward-paths that it goes to. It may block;
it must not raise."""


class Ending(NamedTuple):
    """How a transaction ended that met with trouble."""

    trouble: Trouble
    """The widest in it."""
    again: Mapping[int, Remedy]
    """Places in the outcomes, and what may be tried at once for those who stand there."""
    reason: str
    """What was said, or happened, in the trouble."""
    is_awaiting_dot: bool
    """Whether it has not ended for the session: ``await_dot`` must follow."""
    is_kept: bool
    """Whether the session was not to be given back but used again at once: for ``await_dot``, or for another
    transaction for the rest of the recipients, which is all that there is to do about the trouble."""
    is_stale: bool
    """Whether it failed on its first command because the peer had already hung up on this connection, which was reused
    or had waited for a mail: nothing has been tried yet, so the mail may go out again at once."""


class _NotCommitted(Exception):
    """The caller does not want the content to be sent after all."""


class _NoReplyYet(Exception):
    """The caller's time is over while the final dot's reply may still come."""


class _Goodbye(Exception):
    """The peer said that this connection is of no more use."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.text)
        self.reply = reply


class Session:
    """A connection on which EHLO, TLS and AUTH are done. One greenlet at a time may use it."""

    def __init__(self, channel: Channel, extensions: Extensions, config: SmarthostConfig, default_sender: str) -> None:
        self._channel = channel
        self._replies = ReplyBuffer()
        self._extensions = extensions
        self._most_plain_bytes = min(extensions.size_limit_bytes or sys.maxsize, LARGE_CONTENT_BYTES)
        timeouts = self._timeouts = config.timeouts
        self._limit_seconds = {
            Phase.RSET: timeouts.rset_seconds,
            Phase.MAIL: timeouts.mail_seconds,
            Phase.RCPT: timeouts.rcpt_seconds,
            Phase.DATA: timeouts.data_seconds,
        }
        self._default_sender = default_sender
        self._phase = Phase.MAIL
        self._reverse_path = ""
        self._needs_rset = False
        self._is_broken = False
        self._has_reply = False
        self._undecided: list[Outcome] = []
        self._was_broken = False
        self._is_large = False
        self.is_reusable = True
        """Whether another transaction may follow; not while one is under way."""
        self.host: Host | None = None
        """Whose it is; kept by the dialler."""
        self.opened_at = time.monotonic()
        self.idle_since = self.opened_at
        """Kept by the pool."""
        self.transactions = 0
        """Begun so far."""
        self.began_at = self.opened_at
        """When the last one began; later by as long as ``commit`` took, which says nothing of the smarthost."""
        self.dot_at = 0.0
        """When the last final dot was sent."""
        self.ending: Ending | None = None
        """How the last one ended; None when it met with no trouble."""
        self._trouble: Trouble | None = None
        self._reason = ""
        self._again: dict[int, Remedy] = {}
        self.is_awaiting_dot = False
        """Whether the final dot was sent, its reply is outstanding, and ``await_dot`` must follow."""
        self.is_kept = False
        """As in ``ending``."""
        self._is_stale = False

    @property
    def extensions(self) -> Extensions:
        """What the smarthost offered in its last EHLO answer."""
        return self._extensions

    def transact(
        self,
        reverse_path: str,
        forward_paths: tuple[str, ...],
        content: bytes,
        deadline: float,
        commit: Commit | None = None,
    ) -> list[Outcome]:
        """Hand one mail over; return one outcome per forward-path, in the same order.

        Blocks until ``deadline`` (``time.monotonic()``) at most, or longer if ``commit`` does. Never raises for what
        the peer or the network does. ``content`` has CRLF line ends; it is dot-stuffed here.
        """
        if self._trouble is not None:
            self._forget_trouble()
        self._reverse_path = reverse_path
        results = [_OPEN] * len(forward_paths)
        is_plain = (
            len(content) <= self._most_plain_bytes
            and content.isascii()
            and b"\0" not in content
            and are_plain_paths(reverse_path + "".join(forward_paths))
        )
        is_ascii = is_7bit = True
        if not is_plain:
            is_7bit = content.isascii()
            # RFC 6531 §3.4: header fields in UTF-8 need SMTPUTF8 too (a local part in Reply-To, say).
            is_ascii = reverse_path.isascii() and (is_7bit or _has_ascii_header(content))
            failure = self._reason_not_to_send((reverse_path, *forward_paths), content, is_ascii, is_7bit)
            if failure is not None:
                self._end(results, self._local_outcome(Phase.MAIL, failure))
            elif not self._extensions.smtputf8:
                self._fail_non_ascii(forward_paths, results)
            places = _open_places(results)
            if not places:
                self._end_transaction()
                return results
            is_ascii = is_ascii and all(forward_paths[place].isascii() for place in places)
        # Until this is taken back, an exception that passes through (a killed greenlet) leaves an unusable session.
        self.is_reusable = False
        self._has_reply = False
        self.transactions += 1
        size_bytes = len(content) if self._extensions.size else None
        try:
            if is_plain and len(forward_paths) == 1 and self._extensions.pipelining and not self._needs_rset:
                self._send_plain_mail(
                    plain_commands(reverse_path, forward_paths[0], size_bytes), content, deadline, results, commit
                )
            else:
                is_8bitmime = not is_7bit and self._extensions.eightbitmime
                mail = mail_command(reverse_path, size_bytes, is_smtputf8=not is_ascii, is_8bitmime=is_8bitmime)
                rcpts = {place: rcpt_command(forward_paths[place]) for place in _open_places(results)}
                self._send_mail(mail, rcpts, content, deadline, results, commit)
        except _NoReplyYet:
            # The session stays in its transaction: being in doubt makes it unusable, until ``await_dot`` knows more.
            self.is_awaiting_dot = True
            self._undecided = results.copy()
            self._was_broken = self._is_broken
            self._end(results, self._local_outcome(Phase.DOT, LocalFailure.NO_REPLY_YET))
        except _NotCommitted:
            # Not for those either who were to be served apart: what holds for the mail holds for all of it.
            self._again.clear()
            self._end(results, self._local_outcome(Phase.CONTENT, LocalFailure.NOT_COMMITTED))
        except (_Goodbye, OSError, ProtocolViolation) as error:
            self._break_off(error, results, deadline)
        self._end_transaction()
        return results

    def await_dot(self) -> list[Outcome]:
        """Go on waiting for the final dot's reply; return the transaction's outcomes anew.

        Blocks up to the time limit for the dot, counted from when it was sent, or until ``close``.
        """
        results, self._undecided = self._undecided, []
        # That there was no reply yet spoils nothing; a refusal before it that forbids reuse still does.
        self._is_broken = self._was_broken
        self._forget_trouble()
        until = self.dot_at + self._timeouts.dot_seconds
        try:
            self._take_dot_reply(until, results)
        except (_Goodbye, OSError, ProtocolViolation) as error:
            self._break_off(error, results, until)
        self._end_transaction()
        return results

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open with nothing said: what arrived unasked answers no command."""
        if self._channel.read_available() is None:
            return True
        self._is_broken = True
        self.is_reusable = False
        return False

    def noop(self) -> Reply:
        """Ask for nothing and return the reply. Raises ``OSError`` or ``ProtocolViolation``."""
        reply = self._ask(Phase.NOOP, b"NOOP\r\n", time.monotonic() + self._timeouts.rset_seconds)
        self._expect_silence()
        return reply

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
        self.is_reusable = False
        self._channel.close()

    def _send_plain_mail(
        self, commands: bytes, content: bytes, deadline: float, results: list[Outcome], commit: Commit | None
    ) -> None:
        """Do the usual transaction, as ``_send_mail`` does any: one recipient, and all ``commands`` in one write.

        Three replies that say yes are known at a glance; anything else is taken reply by reply.
        """
        self._phase = Phase.MAIL
        self._is_large = False
        now = self.began_at = time.monotonic()
        until = min(deadline, now + self._timeouts.mail_seconds)
        self._expect_silence()
        self._channel.write(commands, until)
        chunk = self._channel.read(until)
        if not _GO_AHEAD.fullmatch(chunk):
            self._feed(chunk)
            if not self._open_transaction(b"", {0: b""}, results, until, deadline, is_pipelined=True):
                return
        self._send_content(content, deadline, results, commit)

    def _send_mail(
        self,
        mail: bytes,
        rcpts: Mapping[int, bytes],
        content: bytes,
        deadline: float,
        results: list[Outcome],
        commit: Commit | None,
    ) -> None:
        """Do the transaction; what it leaves ``_OPEN`` in ``results`` is settled by the exception that it raises.

        ``rcpts`` has the commands of those who are to be in it, by their places in ``results``.
        """
        self._phase = Phase.RSET if self._needs_rset else Phase.MAIL
        self._is_large = len(content) > LARGE_CONTENT_BYTES
        self.began_at = time.monotonic()
        until = min(deadline, self.began_at + self._limit_seconds[self._phase])
        is_pipelined = False
        if self._extensions.pipelining:
            group = b"".join((b"RSET\r\n" if self._needs_rset else b"", mail, *rcpts.values(), b"DATA\r\n"))
            if len(group) <= MAX_GROUP_BYTES:
                is_pipelined = True
                self._expect_silence()
                self._channel.write(group, until)
        if self._open_transaction(mail, rcpts, results, until, deadline, is_pipelined):
            self._send_content(content, deadline, results, commit)

    def _open_transaction(
        self,
        mail: bytes,
        rcpts: Mapping[int, bytes],
        results: list[Outcome],
        until: float,
        deadline: float,
        is_pipelined: bool,
    ) -> bool:
        """Take the commands up to DATA one by one; return whether the peer waits for content that we want to send.

        ``until`` is the first reply's limit, part of which may be over. When pipelined they are already sent, so every
        reply is read, whatever the ones before it said.
        """

        def ask(phase: Phase, command: bytes) -> Reply:
            nonlocal until
            limit = until or min(deadline, time.monotonic() + self._limit_seconds[phase])
            until = 0.0
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
        is_any_accepted = False
        for place, rcpt in rcpts.items():
            reply = ask(Phase.RCPT, rcpt)
            if is_mail_accepted and reply.code == 503:
                raise _Goodbye(reply)  # In the middle of a transaction: the peer is out of step with us.
            if is_mail_accepted and reply.is_positive:
                is_any_accepted = True
            elif is_mail_accepted:
                results[place], trouble = self._refusal(_no_intermediate(reply))
                # To be served apart from others there must be others.
                if trouble.remedy is not None and (is_any_accepted or trouble.remedy is not Remedy.APART):
                    self._again[place] = trouble.remedy
        if not is_any_accepted and not is_pipelined:
            self._needs_rset = True
            return False
        reply = ask(Phase.DATA, b"DATA\r\n")
        if not reply.is_intermediate:
            if reply.is_positive:
                raise ProtocolViolation("DATA was answered with 2yz")
            if is_any_accepted:
                # Else a 503 only says that nothing came before it, which we know.
                self._settle(reply, results)
            self._needs_rset = is_mail_accepted
        elif is_any_accepted:
            self._phase = Phase.CONTENT
            self._expect_silence()
            return True
        else:
            self._end_empty_content(deadline)
        return False

    def _send_content(self, content: bytes, deadline: float, results: list[Outcome], commit: Commit | None) -> None:
        """Send the content with its final dot and settle every recipient that is still open.

        Every command so far must have its reply, and nothing else may have come.
        """
        self._has_reply = True
        self._phase = Phase.CONTENT
        if commit is not None:
            self._commit(commit, results)
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError
        until = min(deadline, now + self._timeouts.content_seconds)
        try:
            if self._is_large:
                for piece in dot_stuffed_pieces(content):
                    self._channel.write(piece, until)
            else:
                self._channel.write(dot_stuffed(content), until)
        except OSError:
            self._read_last_words(results)
            raise
        self._phase = Phase.DOT
        self.dot_at = time.monotonic()
        until = self.dot_at + self._timeouts.dot_seconds
        try:
            self._take_dot_reply(min(deadline, until), results)
        except ChannelTimeout:
            if time.monotonic() < until:
                raise _NoReplyYet from None
            raise

    def _commit(self, commit: Commit, results: list[Outcome]) -> None:
        """Ask whether the content may be sent. Raises what ends the transaction if not, or if the peer has not waited.

        It may have taken long, and the peer may have tired of waiting: what it said answers no content, and content
        must not follow it.
        """
        asked_at = time.monotonic()
        if not commit(_open_places(results)):
            raise _NotCommitted
        self.began_at += time.monotonic() - asked_at
        last_words = self._channel.read_available()
        if last_words is not None:
            self._feed(last_words)
            self._take_last_words(results)
            self._expect_silence()
            raise ProtocolViolation("a reply to content that was not sent")

    def _take_dot_reply(self, until: float, results: list[Outcome]) -> None:
        """Read the reply to the final dot and settle every recipient that is still open."""
        if self._replies.is_empty:
            chunk = self._channel.read(until)
            usual = plain_250(chunk)
            if usual is not None:
                code, text = usual
                relayed = Outcome(State.RELAYED, text, 250, code, SaidBy.PEER, Phase.DOT, 1, remote_id_in(text))
                if len(results) == 1:
                    results[0] = relayed  # It is open, or there would be no dot.
                else:
                    _fill(results, relayed)
                return
            self._feed(chunk)
        reply = self._read_reply(until)
        if not reply.is_positive:
            if not self._replies.is_empty:
                # Which of them is the dot's nobody can tell, and the next may be yes.
                raise ProtocolViolation("more than one reply to the final dot")
            if is_goodbye(reply) or reply.code == 503:
                raise _Goodbye(reply)
            self._settle(reply, results)
            if reply.is_permanent and self._is_large:
                # It may have been said before the content was over, and be said again for the dot.
                self._is_broken = True
            return
        code = reply.enhanced_code
        relayed = Outcome(State.RELAYED, reply.text, reply.code, code, SaidBy.PEER, Phase.DOT, 1, reply.remote_id)
        _fill(results, relayed)

    def _end_empty_content(self, deadline: float) -> None:
        """Answer a 354 that came although nobody is left to receive: one dot, and its reply means nothing to us."""
        until = min(deadline, time.monotonic() + self._timeouts.rset_seconds)
        self._channel.write(END_OF_CONTENT, until)
        self._read_reply(until)

    def _read_last_words(self, results: list[Outcome]) -> None:
        """A server that refuses the content half-way says so (552) before it hangs up: take that as the reason."""
        last_words = self._channel.read_available()
        if last_words:
            self._replies.feed(last_words)
            self._take_last_words(results)

    def _take_last_words(self, results: list[Outcome]) -> None:
        """What was said before the final dot: a refusal is the outcome, and a goodbye one for this connection."""
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
        self._end(results, self._refusal(_no_intermediate(reply)))
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

    def _fail_non_ascii(self, forward_paths: tuple[str, ...], results: list[Outcome]) -> None:
        """Give those their outcome whom a smarthost without SMTPUTF8 cannot serve; it can still serve the others."""
        for place, path in enumerate(forward_paths):
            if not path.isascii():
                results[place], _ = self._local_outcome(Phase.MAIL, LocalFailure.NEEDS_SMTPUTF8)

    def _reason_not_to_send(
        self, paths: tuple[str, ...], content: bytes, is_ascii: bool, is_7bit: bool
    ) -> LocalFailure | None:
        """Look closely at what is not plain or may be too big; ``paths`` begins with the reverse-path.

        ``is_ascii``: whether the reverse-path and the content's header are.
        """
        if not all(map(is_safe_path, paths)):
            return LocalFailure.BAD_PATH
        # No mail may have one, and where NULs are dropped a dot after one begins a line: it could end the mail.
        if b"\0" in content:
            return LocalFailure.NUL
        if not is_ascii and not self._extensions.smtputf8:
            return LocalFailure.NEEDS_SMTPUTF8
        # RFC 6531 §3.1: who offers SMTPUTF8 must offer 8BITMIME, so it is not asked for twice.
        if not (is_7bit or self._extensions.eightbitmime or self._extensions.smtputf8):
            return LocalFailure.NEEDS_8BITMIME
        limit_bytes = self._extensions.size_limit_bytes
        return LocalFailure.TOO_BIG if limit_bytes and len(content) > limit_bytes else None

    def _refusal(self, reply: Reply) -> tuple[Outcome, Trouble]:
        sender = self._default_sender if self._reverse_path == self._default_sender else ""
        trouble = classify_reply(self._phase, reply, default_sender=sender)
        self._note(trouble, reply.text)
        return refused(trouble, self._phase, reply), trouble

    def _local_outcome(self, phase: Phase, failure: LocalFailure, detail: str = "") -> tuple[Outcome, Trouble]:
        trouble = classify_local(phase, failure)
        outcome = failed_here(trouble, phase, failure, detail)
        self._note(trouble, outcome.detail)
        return outcome, trouble

    def _break_off(
        self, error: _Goodbye | OSError | ProtocolViolation, results: list[Outcome], deadline: float
    ) -> None:
        """The connection is of no more use: that ends the transaction for everyone who is still in it."""
        # One that nobody needed after all waits for its first mail as others do for their next.
        has_waited = self.transactions > 1 or self.began_at - self.idle_since >= WAITED_SECONDS
        is_untouched = has_waited and not self._has_reply
        if isinstance(error, _Goodbye):
            self._is_broken = True
            self._is_stale = is_untouched
            ending = self._refusal(error.reply)
        else:
            failure = local_failure(error)
            self._is_stale = is_untouched and failure is LocalFailure.LOST
            detail = str(error) if failure is LocalFailure.GARBAGE else ""
            outcome, trouble = ending = self._local_outcome(self._phase, failure, detail)
            if failure is LocalFailure.TIMEOUT:
                self._again.clear()  # A slow server is not asked again, for nobody.
                if outcome.state is State.DEFERRED and time.monotonic() >= deadline:
                    ending = outcome._replace(is_late=True), trouble
        self._end(results, ending)

    def _end(self, results: list[Outcome], ending: tuple[Outcome, Trouble]) -> None:
        """Give everyone who is still open the outcome that ends the transaction for all of them."""
        outcome, trouble = ending
        if trouble.remedy is not None:
            self._again |= dict.fromkeys(_open_places(results), trouble.remedy)
        _fill(results, outcome)

    def _end_transaction(self) -> None:
        if not self._replies.is_empty:
            self._is_broken = True
        self.is_reusable = not self._is_broken
        if self._trouble is not None:
            is_rest_all = self._trouble.radius <= Radius.TRANSACTION and set(self._again.values()) == {Remedy.APART}
            self.is_kept = self.is_awaiting_dot or (is_rest_all and self.is_reusable)
            self.ending = Ending(
                self._trouble, self._again, self._reason, self.is_awaiting_dot, self.is_kept, self._is_stale
            )

    def _forget_trouble(self) -> None:
        self.ending = None
        self._trouble = None
        self._again = {}
        self.is_awaiting_dot = False
        self.is_kept = False
        self._is_stale = False

    def _note(self, trouble: Trouble, reason: str) -> None:
        if self._trouble is None or trouble.radius > self._trouble.radius:
            self._trouble = trouble
            self._reason = reason
        if not trouble.is_reusable:
            self._is_broken = True


def local_failure(error: OSError | ProtocolViolation) -> LocalFailure:
    """Name what an exception from an open connection means."""
    if isinstance(error, ProtocolViolation):
        return LocalFailure.GARBAGE
    return LocalFailure.TIMEOUT if isinstance(error, TimeoutError) else LocalFailure.LOST


def _has_ascii_header(content: bytes) -> bool:
    end = content.find(b"\r\n\r\n")
    return end >= 0 and content[:end].isascii()


def _open_places(results: Sequence[Outcome]) -> list[int]:
    return [place for place, result in enumerate(results) if result is _OPEN]


def _fill(results: list[Outcome], outcome: Outcome) -> None:
    for index, result in enumerate(results):
        if result is _OPEN:
            results[index] = outcome


def _no_intermediate(reply: Reply) -> Reply:
    """Refuse 3yz where only yes or no can be said."""
    if reply.is_intermediate:
        raise ProtocolViolation(f"{reply.code} where it is not expected")
    return reply
