"""``relayctl events`` and ``export``: what was logged, and the records of a group."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC
from functools import partial
from typing import Any, NoReturn, Protocol

import click
import orjson

from relay import contract
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.cli.part_file import Mark, PartFile
from relay.cli.progress import progress_bar
from relay.cli.request import tracking_storage
from relay.cli.stopping import command_line, stoppable
from relay.cli.terminal import Interrupted, current_settings, fail, interruptible, nats_config, plain, say
from relay.errors import EXIT_FAILED, BusRefused, BusUnavailable, RelayError, SubmissionRejected
from relay.tracking.cursors import Place, decode_cursor, encode_cursor
from relay.tracking.export import FORMATS, Rows, look, rows
from relay.tracking.feed import LoggedFact, facts, logged_fact, sequence_at, subject_filter
from relay.tracking.groups import SHARED_TOKEN, group_token
from relay.tracking.pages import GroupReader
from relay.tracking.record import is_email_id, parse_record, parse_time
from relay.tracking.storage import patiently

LATELY_SECONDS = 600.0
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _moment(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """A time before now (``10m``, ``1h30m``, ``2d``), or a time in RFC 3339, as epoch seconds."""
    if value is None:
        return None
    if re.fullmatch(r"(?:\d{1,9}[smhdw])+", value):
        parts = re.findall(r"(\d+)([smhdw])", value)
        return max(0.0, time.time() - sum(int(count) * UNIT_SECONDS[unit] for count, unit in parts))
    at = parse_time(value)
    if at is None:
        raise click.BadParameter(f"{value!r} is neither a duration (10m, 2h, 1h30m) nor a time (2025-01-15T10:30:00Z)")
    return at.timestamp()


# -- events -----------------------------------------------------------------------------------------------------------
@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on; Ctrl-C ends it.")
@click.option("--group", "group_id", default="", help="Only the facts of this group.")
@click.option(
    "--since",
    metavar="TIME",
    callback=_moment,
    help="Begin so long ago (10m, 2h, 3d), or at a time. Default: 10m; with -f, now.",
)
@click.option("--json", "as_json_", is_flag=True, help="Print one JSON object a line instead of text.")
def events(follow: bool, group_id: str, since: float | None, as_json_: bool) -> None:
    """Shows what was logged of mails: time (UTC), fact, email_id, group.

    Facts are sent, delivered, opened (the first time), open (each time), clicked, click, failed, bounced, complained,
    delayed, rejected and unsubscribed. With -f it goes on over restarts of NATS. Exits 1 when there is no such group.

    Example: relayctl events -f --group spring-newsletter --since 1h
    """
    show = _show_json if as_json_ else _show_text
    link = _Link() if follow else None
    try:
        with interruptible(), tracking_storage(nats_config(current_settings()), link) as jetstream:
            token, only = _where(jetstream, group_id, must_exist=not follow)
            found = _followed(jetstream, token, since) if follow else _kept(jetstream, token, since)
            count = 0
            for each in found:
                if not only or each.email_id == only:
                    show(each)
                    count += 1
            if not count:
                say("nothing was logged in that time; --since looks further back")
    except Interrupted:
        if not follow:
            raise


def _where(jetstream: JetStream, group_id: str, *, must_exist: bool) -> tuple[str, str]:
    """The token of the group's facts ('': all), and the one mail they are of where it was sent without a group."""
    if not group_id:
        return "", ""
    token = group_token(group_id)
    if patiently(partial(jetstream.count_by_subject, contract.LOG_STREAM, subject_filter(token))):
        return token, ""
    if is_email_id(group_id):
        entry = patiently(partial(Bucket(jetstream, contract.RECIPIENTS_BUCKET).get, group_id))
        record = parse_record(entry.value) if entry is not None else None
        if record is not None and record.get("group_id") == group_id:
            return SHARED_TOKEN, group_id
    if must_exist:
        fail(RelayError(f"group {plain(group_id)}: {contract.NOT_FOUND} in the log"))
    return token, ""


def _kept(jetstream: JetStream, token: str, since: float | None) -> Iterator[LoggedFact]:
    """What is in the log now."""
    end = patiently(partial(jetstream.last_sequence, contract.LOG_STREAM))
    begin = sequence_at(jetstream, time.time() - LATELY_SECONDS if since is None else since)
    for page in facts(jetstream, subject_filter(token), begin, end):
        yield from page


def _followed(jetstream: JetStream, token: str, since: float | None) -> Iterator[LoggedFact]:
    """What is in the log, and what comes, for ever."""
    begin = None if since is None else sequence_at(jetstream, since)
    follow = partial(
        jetstream.follow, contract.LOG_STREAM, subject_filter(token), from_sequence=begin, on_gap=_tell_of_gap
    )
    with patiently(follow) as follower:
        for msg in follower:
            yield logged_fact(msg)
            if not msg.pending:
                sys.stdout.flush()


def _tell_of_gap(expected: int, found: int) -> None:
    if found > expected:
        say(f"the log no longer has what stood at {expected} to {found - 1}")
    else:
        say("the log was made anew, or its server lost the newest; going on with what it has")


class _Link:
    """Tells on standard error when NATS goes away and comes back."""

    def __init__(self) -> None:
        self._was_connected: bool | None = None

    def __call__(self, is_connected: bool, why: str) -> None:
        if self._was_connected is not None and is_connected != self._was_connected:
            say("NATS is back" if is_connected else f"NATS is away ({why}); waiting for it")
        if is_connected or self._was_connected is not None:
            self._was_connected = is_connected


def _show_text(fact: LoggedFact) -> None:
    group_id = fact.group_id
    group = "(no group)" if group_id == "" else fact.token if group_id is None else group_id
    line = f"{_utc(fact.at):<19} {fact.fact:<12} {fact.email_id[:64]:<36} {group}"
    sys.stdout.write(f"{plain(line.replace(chr(10), ' ').replace(chr(9), ' '))}\n")


def _utc(text: str) -> str:
    """A time as it is shown; what is none, as it was written."""
    at = parse_time(text)
    try:
        return at.astimezone(UTC).isoformat(" ", "seconds")[:19] if at else plain(text)[:19]
    except OverflowError:  # in UTC it is before the year 1 or after 9999
        return plain(text)[:19]


def _show_json(fact: LoggedFact) -> None:
    shown: dict[str, Any] = {"sequence": fact.sequence, "at": fact.at, "fact": fact.fact, "email_id": fact.email_id}
    shown |= {"group_id": fact.group_id or None, "group_token": fact.token}
    if fact.event_id:
        shown["event_id"] = fact.event_id
    sys.stdout.write(orjson.dumps(shown).decode() + "\n")


# -- export -----------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("group_id", metavar="GROUP")
@click.option("--format", "format_name", type=click.Choice(sorted(FORMATS)), default="csv", show_default=True,
              help="CSV for spreadsheets, or the records as they are, one JSON object a line.")  # fmt: skip
@click.option("--output", type=click.Path(), help="Write to this file, which appears when it is complete.")
@click.option("--cursor", default="", help="Go on where an export of this group stopped.")
def export(group_id: str, format_name: str, output: str | None, cursor: str) -> None:
    """Writes the records of every mail of a GROUP, however large, to standard output or a file.

    With --output everything goes to FILE.part first, readable by you alone; it becomes FILE at the end. Exits 1 when
    there is no such group, or when it had to stop (Ctrl-C and SIGTERM stop it): it then says the command that goes on.
    That may be repeated, also when it was killed itself.

    Example: relayctl export spring-newsletter --format csv --output spring.csv
    """
    with stoppable(), tracking_storage(nats_config(current_settings())) as jetstream:
        reader = GroupReader(jetstream)
        glance = look(reader, group_id)
        place, mark = _where_it_stopped(cursor, group_id, glance.log_made_at, must_have_mark=output is not None)
        found = rows(reader, group_id, FORMATS[format_name], place)
        first = next(found, None)
        if first is None:
            fail(RelayError(f"group {plain(group_id)}: {contract.NOT_FOUND}"))
        words = ["relayctl", "export", "--format", format_name, *(["--output", output] if output is not None else [])]
        run = _Run(group_id, glance.log_made_at, place or Place(), words)
        header = FORMATS[format_name].header if place is None else b""
        with progress_bar("exporting", glance.mails if place is None else None) as advance:
            if output is None:
                run.copy(first, found, _StandardOutput(), header, advance)
            else:
                with PartFile(output, mark) as file:
                    run.copy(first, found, file, header, advance)
    where = f" to {output}" if output is not None else ""
    lacking = f"; {run.without_record:,} have no record (any more)" if run.without_record else ""
    say(f"{run.written:,} records written{where}{lacking}")


def _where_it_stopped(
    cursor: str, group_id: str, log_made_at: str, *, must_have_mark: bool
) -> tuple[Place | None, Mark | None]:
    """The place in the group, and how far the file's part was good by then; Nones to begin with."""
    if not cursor:
        return None, None
    place_text, _, mark_text = cursor.partition(".")
    mark = Mark.parse(mark_text)
    try:
        place = decode_cursor(group_id, place_text, log_made_at)
        if mark_text and mark is None:
            raise SubmissionRejected(contract.INVALID_CURSOR, "cursor")
    except SubmissionRejected as error:
        fail(RelayError(f"--cursor: {error.error}; it is good for one group, as long as its log is the same one"))
    if must_have_mark and mark is None:
        fail(RelayError("--cursor: this one is of an export to standard output; leave out --output as well"))
    return place, mark


class _Sink(Protocol):
    """Where an export goes."""

    @property
    def mark(self) -> object:
        """How far it is good, for who goes on with it; '' when it cannot say."""

    def write(self, octets: bytes) -> None:
        """Raises ``OSError``."""

    def keep(self) -> None:
        """What has been written so far is good."""

    def complete(self) -> None:
        """Everything has been written. Raises ``OSError``: nothing more than before is good."""


class _StandardOutput:
    mark = ""

    def write(self, octets: bytes) -> None:
        sys.stdout.buffer.write(octets)
        sys.stdout.buffer.flush()

    def keep(self) -> None:
        pass

    def complete(self) -> None:
        pass


class _Run:
    """One export: how far it came, and what to do when it stops."""

    def __init__(self, group_id: str, log_made_at: str, place: Place, words: list[str]) -> None:
        self._group_id = group_id
        self._log_made_at = log_made_at
        self._place = place
        self._words = words
        """The command without cursor and group."""
        self.written = 0
        self.without_record = 0

    def copy(
        self, first: Rows, rest: Iterator[Rows], sink: _Sink, header: bytes, advance: Callable[[int], None]
    ) -> None:
        """Copies all; exits 1 with the command that goes on when it has to stop."""
        current = first
        try:
            sink.write(header)
            sink.keep()
            while True:
                sink.write(current.lines)
                self.written += current.written
                self.without_record += current.covered - current.written
                advance(current.covered)
                if current.next_place is None:
                    break
                sink.keep()
                self._place = current.next_place
                current = next(rest)
            sink.complete()
        except (BusUnavailable, BusRefused, Interrupted) as error:
            self._stop(sink, "interrupted" if isinstance(error, Interrupted) else str(error))
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # or Python complains again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._stop(sink, str(error.strerror or error).lower())

    def _stop(self, sink: _Sink, why: str) -> NoReturn:
        say(f"stopped after {self.written:,} records: {plain(why)}; what is there is not complete")
        if self._place == Place():
            say(f"again: {command_line(*self._words, operand=self._group_id)}")
        else:
            cursor = ".".join(filter(None, (self._cursor(), str(sink.mark))))
            say(f"to go on: {command_line(*self._words, '--cursor', cursor, operand=self._group_id)}")
        sys.exit(EXIT_FAILED)

    def _cursor(self) -> str:
        return encode_cursor(self._group_id, self._place, self._log_made_at)
