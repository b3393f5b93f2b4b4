"""``relayctl buckets``, ``repair`` and ``erase``: what tracking keeps, and keeping it right."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from relay import contract
from relay.bus.jetstream import STREAM_NOT_FOUND, JetStream, Stored
from relay.bus.kv import Bucket
from relay.cli.progress import progress_bar
from relay.cli.request import tracking_storage
from relay.cli.stopping import command_line, stoppable
from relay.cli.terminal import (
    Interrupted,
    console,
    current_settings,
    fail,
    json_option,
    nats_config,
    plain,
    print_json,
    say,
)
from relay.errors import EXIT_FAILED, BusRefused, BusUnavailable, RelayError, RevisionConflict
from relay.ops.parts import storage_config
from relay.tracking.erasure import ERASED_AT, erasable, erased
from relay.tracking.facts import Fact
from relay.tracking.inspection import Condition, Remark, Store, duration, inspect
from relay.tracking.record import is_email_id, parse_record, parse_time, rfc3339
from relay.tracking.repair import EXAMPLES, MIN_AGE_SECONDS, Repair, Report
from relay.tracking.storage import NANOSECONDS, patiently

STORES_BESIDE = 3
"""In one table: as many as 80 columns take."""
ERASE_SECONDS = 10.0
ERASE_TRIES = 20
"""Against who changes the record at the same moment."""
ROLL_UP = {"Nats-Rollup": "sub"}
"""The message takes the place of all before it on its subject (ADR-8: how a KV purge does it)."""


# -- buckets ----------------------------------------------------------------------------------------------------------
@click.command()
@json_option
def buckets(as_json_: bool) -> None:
    """Shows every bucket and stream that Relay keeps, and lfx's index: figures, limits, and what they lack.

    What is there is used as it is, whoever made it; for what it lacks it says what that costs, and the command that
    changes it. Changes nothing. Exits 1 when something makes tracking lose data, or request ids be forgotten early.

    Example: relayctl buckets
    """
    settings = current_settings()
    with tracking_storage(nats_config(settings)) as jetstream:
        condition = inspect(jetstream, storage_config(settings))
    if as_json_:
        print_json(_condition_json(condition))
    else:
        for first in range(0, len(condition.stores), STORES_BESIDE):
            click.echo("\n" if first else "", nl=False)
            console().print(_stores_table(condition.stores[first : first + STORES_BESIDE]))
        for remark in condition.remarks:
            _show_remark(remark)
        if not condition.remarks:
            click.echo("\nnothing is lacking")
    if condition.loses:
        sys.exit(EXIT_FAILED)


def _condition_json(condition: Condition) -> dict[str, Any]:
    return {
        "loses_data": condition.loses,
        "stores": [_store_json(store) for store in condition.stores],
        "remarks": [
            {"name": each.store, "loses_data": each.loses, "text": each.text, "command": each.command}
            for each in condition.remarks
        ],
    }


def _store_json(store: Store) -> dict[str, Any]:
    config = store.config
    return {
        "name": store.name,
        "stream": store.stream,
        "exists": config is not None,
        "made_by": store.made_by,
        "created": store.created,
        "messages": store.messages,
        "bytes": store.size_bytes,
        "max_messages": store.number("max_msgs"),
        "max_bytes": store.number("max_bytes"),
        "max_message_bytes": store.number("max_msg_size"),
        "replicas": store.number("num_replicas"),
        "storage": str(config.get("storage", "")) if config is not None else "",
        "ttl_seconds": store.ttl_seconds,
        "allow_direct": bool(config.get("allow_direct")) if config is not None else False,
    }


def _stores_table(stores: list[Store]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for store in stores:
        table.add_column(store.name, overflow="fold")
    cells = [_cells(store) for store in stores]
    for name in cells[0]:
        table.add_row(Text(name, style="bold"), *(Text(plain(each[name])) for each in cells))
    return table


def _cells(store: Store) -> dict[str, str]:
    config = store.config or {}
    is_there = store.config is not None
    told = {
        "messages": f"{store.messages:,}",
        "bytes": f"{store.size_bytes:,}",
        "most messages": _limit(store.number("max_msgs")),
        "most bytes": _limit(store.number("max_bytes")),
        "largest value": _limit(store.number("max_msg_size")),
        "replicas": str(store.number("num_replicas")),
        "storage": str(config.get("storage")),
        "kept for": duration(store.ttl_seconds) if store.ttl_seconds else "ever",
        "direct get": "yes" if config.get("allow_direct") else "no",
        "made by": store.made_by,
        "made at": store.created[:19].replace("T", " "),
    }
    return {"": "there" if is_there else "missing"} | {name: value if is_there else "" for name, value in told.items()}


def _limit(most: int) -> str:
    return f"{most:,}" if most else "any"


def _show_remark(remark: Remark) -> None:
    mark, style = ("loses", "red") if remark.loses else ("note", "yellow")
    console().print(Text.assemble((f"\n{mark:<6}", style), (remark.store, "bold"), f" {plain(remark.text)}"))
    if remark.command:
        console().print(Text(f"      {plain(remark.command)}"), soft_wrap=True)


# -- repair -----------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("group_id", metavar="GROUP", required=False)
@click.option("--scan", is_flag=True, help="Every group, and the mails without one.")
@click.option("--dry-run", is_flag=True, help="Only show what is missing and what is surplus.")
@click.option("--yes", is_flag=True, help="Change it without asking.")
@click.option(
    "--min-age",
    default=float(MIN_AGE_SECONDS),
    type=click.FloatRange(min=0),
    show_default=True,
    help="Leave alone what was written less than so many seconds ago.",
)
@json_option
def repair(group_id: str | None, scan: bool, dry_run: bool, yes: bool, min_age: float, as_json_: bool) -> None:
    """Makes the log of a GROUP agree with its records: appends the facts it lacks, deletes those too many.

    Shows both by kind first, and asks. Reads the group's facts (--scan: the whole log) and every record of the bucket
    once, as only they say which group they belong to: some 10 s per 100,000 mails, longer where much is wrong. Takes
    some 200 MB of memory at most; what does not fit waits on disk, in a file without a name (TMPDIR). GROUP may be the
    id of a mail that was sent without a group. May run while mails are sent and events come; to run it again changes
    nothing. Ctrl-C and SIGTERM stop it; what was done by then is shown. Exits 1 when there is no such group, when it
    had to stop or was told not to go on, and when something could not be deleted.

    Example: relayctl repair spring-newsletter --dry-run
    """
    if (group_id is None) != scan:
        raise click.UsageError("give either a GROUP or --scan")
    if as_json_ and not dry_run and not yes:
        raise click.UsageError("--json asks nothing; say --dry-run or --yes as well")
    with stoppable():
        if dry_run or not yes:
            report = _walk(group_id, min_age, as_json_, is_changing=False)
            if dry_run or report.is_well:
                return
            click.confirm("Change it?", abort=True, err=True)
        _walk(group_id, min_age, as_json_, is_changing=True)


def _walk(group_id: str | None, min_age_seconds: float, as_json_: bool, *, is_changing: bool) -> Report:
    """Looks or mends, and shows what came of it; exits 1 when that is not all.

    Over a connection of its own: nobody keeps one alive while the operator thinks.
    """
    with tracking_storage(nats_config(current_settings())) as jetstream:
        work = Repair(jetstream, group_id, min_age_seconds=min_age_seconds)
        with progress_bar("repairing" if is_changing else "looking", work.total) as advance:
            stopped = _run_to_its_end(partial(work.mend if is_changing else work.look, advance))
    report = work.report
    if group_id is not None and not report.is_known and not stopped:
        fail(RelayError(f"group {plain(group_id)}: {contract.NOT_FOUND}"))
    if as_json_:
        print_json(_report_json(work, group_id, stopped, is_changed=is_changing))
    else:
        _show_report(work, group_id, is_changed=is_changing)
    if stopped:
        done = "what was done by then stands above" if is_changing else "what was found by then stands above"
        fail(RelayError(f"stopped: {plain(stopped)}; {done}; run it again"))
    if report.undeleted:
        sys.exit(EXIT_FAILED)
    return report


def _run_to_its_end(walk: Callable[[], Report]) -> str:
    """Why it stopped before, else ''."""
    try:
        walk()
    except Interrupted:
        return "interrupted"
    except (BusUnavailable, BusRefused) as error:
        return str(error)
    except OSError as error:
        return f"{tempfile.gettempdir()}: {str(error.strerror or error).lower()}; set TMPDIR to where there is room"
    return ""


def _report_json(work: Repair, group_id: str | None, stopped: str, *, is_changed: bool) -> dict[str, Any]:
    report = work.report
    return {
        "group_id": group_id,
        "changed": is_changed,
        "stopped": stopped,
        "mail_without_group": work.has_mail_without_group,
        "records": report.records,
        "facts": report.facts,
        "missing": dict(report.missing),
        "surplus": dict(report.surplus),
        "undeleted": dict(report.undeleted),
        "why_undeleted": report.why_undeleted,
        "left_alone": report.left_alone,
        "repeated": report.repeated,
        "facts_without_record": report.ownerless,
    }


def _show_report(work: Repair, group_id: str | None, *, is_changed: bool) -> None:
    report = work.report
    click.echo(f"{report.records:,} records, {report.facts:,} facts")
    if work.is_alone:
        click.echo(f"{plain(group_id)} is a mail that was sent without a group; no other mail was looked at")
    elif work.has_mail_without_group:
        click.echo(f"{plain(group_id)} is a group, and a mail that was sent without one: both were looked at")
    if report.is_well:
        click.echo("nothing is missing and nothing is surplus")
    else:
        console().print(_report_table(report, is_changed))
        if not is_changed:
            for example in report.examples:
                click.echo(f"  {plain(example)}")
            if sum(report.missing.values()) + sum(report.surplus.values()) > EXAMPLES:
                click.echo("  …")
    if report.undeleted:
        kinds = ", ".join(f"{count:,} {plain(fact)}" for fact, count in report.undeleted.items())
        say(f"could not be deleted, and are still counted: {kinds} ({plain(report.why_undeleted)})")
    if report.left_alone:
        click.echo(f"left alone, as written just now: {report.left_alone:,} mails; look again later")
    if report.repeated:
        click.echo(f"refused by NATS as repeated, as deleted just now: {report.repeated:,} facts; look again later")
    if report.ownerless:
        click.echo(f"kept, though without a record (any more): {report.ownerless:,} facts")


def _report_table(report: Report, is_changed: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("FACT")
    for heading in ("APPENDED", "DELETED") if is_changed else ("MISSING", "SURPLUS"):
        table.add_column(heading, justify="right")
    for fact in Fact:
        if report.missing[fact.value] or report.surplus[fact.value]:
            table.add_row(fact.value, f"{report.missing[fact.value]:,}", f"{report.surplus[fact.value]:,}")
    return table


# -- erase ------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("email_id")
@click.option("--yes", is_flag=True, help="Erase without asking.")
@json_option
def erase(email_id: str, yes: bool, as_json_: bool) -> None:
    """Takes personal data out of the record of the mail EMAIL_ID: recipient, subject, user agents, addresses.

    Ids, times and counts stay, so the figures of its group do too; events that come later are counted. The record
    says when it was erased (erased_at). Cannot be undone. Old values that a bucket with a history keeps of the record
    go with it. The log holds ids and times only; NATS frees the old bytes on its disks when it compacts them, and
    backups keep what they have. A reply that is kept for a request_id may name recipients until its time is over; no
    mail's id leads to it, so it stays, and is said. While a poller of lfx's still runs, it may write data back: erase
    again when it is gone. Exits 1 when there is no such mail, or when old values are still there.

    Example: relayctl erase 550e8400-e29b-41d4-a716-446655440000 --yes
    """
    if as_json_ and not yes:
        raise click.UsageError("--json asks nothing; say --yes as well")
    if not is_email_id(email_id):
        fail(RelayError(f"mail {plain(email_id)}: {contract.NOT_FOUND}"))
    with stoppable():
        fields = _fields_to_erase(email_id)
        if not yes and fields:
            click.confirm(f"Erase {plain(', '.join(fields))} of mail {email_id}?", abort=True, err=True)
        erased_at, reply_until = _erase(email_id)
    if reply_until:
        say(
            f"until {plain(reply_until)} the bucket {contract.REQUESTS_BUCKET} may keep the reply to this mail's"
            " request with recipients in it: if it had a request_id, and named several or the smarthost named one"
        )
    if as_json_:
        print_json({"email_id": email_id, "erased_at": erased_at, "fields": fields})
    else:
        click.echo(f"erased: {plain(', '.join(fields))}" if fields else f"erased before, at {plain(erased_at)}")


def _fields_to_erase(email_id: str) -> list[str]:
    with tracking_storage(nats_config(current_settings())) as jetstream:
        entry = Bucket(jetstream, contract.RECIPIENTS_BUCKET).get_from_leader(email_id)
    if entry is None:
        fail(RelayError(f"mail {email_id}: {contract.NOT_FOUND}"))
    record = parse_record(entry.value)
    if record is None:
        fail(RelayError(f"mail {email_id}: its record is broken; take it away with {_delete_command(email_id)}"))
    return erasable(record)


def _delete_command(email_id: str) -> str:
    return command_line("nats", "kv", "del", contract.RECIPIENTS_BUCKET, operand=email_id)


def _erase(email_id: str) -> tuple[str, str]:
    """Erases by compare-and-set, and what a bucket with a history remembers.

    When it was erased; and until when the reply to its request may be kept elsewhere, '' when it is not.
    """
    with tracking_storage(nats_config(current_settings())) as jetstream:
        bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
        config = jetstream.stream_info(bucket.stream).config
        has_history = config.get("max_msgs_per_subject") != 1
        rolls_up = has_history and bool(config.get("allow_rollup_hdrs"))
        write = partial(_write_erased, jetstream, bucket, email_id, rfc3339(time.time()), rolls_up)
        value = patiently(write, ERASE_SECONDS)
        if has_history and not rolls_up:
            _forget_old_values(jetstream, bucket, email_id)
        kept_seconds = patiently(partial(_seconds_replies_are_kept, jetstream), ERASE_SECONDS)
    record = parse_record(value) if value is not None else None
    if record is None:
        fail(RelayError(f"mail {email_id}: its record was taken away meanwhile"))
    return str(record.get(ERASED_AT, "")), _reply_until(record, kept_seconds)


def _seconds_replies_are_kept(jetstream: JetStream) -> float:
    """For how long the bucket of request ids keeps them, 0 when there is none."""
    try:
        config = jetstream.stream_info(f"KV_{contract.REQUESTS_BUCKET}").config
    except BusRefused as error:
        if error.code != STREAM_NOT_FOUND:
            raise
        return 0.0
    return int(config.get("max_age") or 0) / NANOSECONDS or float("inf")


def _reply_until(record: dict[str, Any], kept_seconds: float) -> str:
    """Counted from when the mail was sent: which request it was sent for, nobody can tell."""
    sent_at = parse_time(record.get("sent_at"))
    if not kept_seconds or kept_seconds == float("inf"):
        return "it is deleted" if kept_seconds else ""
    until = (sent_at.timestamp() if sent_at is not None else time.time()) + kept_seconds
    return rfc3339(until) if until > time.time() else ""


def _write_erased(jetstream: JetStream, bucket: Bucket, email_id: str, at: str, rolls_up: bool) -> bytes | None:
    """Stores the erased record if nobody changed it meanwhile, else tries again; its value, None: there is none.

    ``rolls_up``: the same write takes the old values away, also when there was nothing left to erase.
    """
    conflict = RevisionConflict("the record is being changed all the time; try again")
    for _ in range(ERASE_TRIES):
        entry = bucket.get_from_leader(email_id)
        value = erased(entry.value, at) if entry is not None else None
        if entry is None or value is None or (value == entry.value and not rolls_up):
            return value
        publication = bucket.replacement(email_id, value, entry.revision)
        if rolls_up:
            publication = publication._replace(headers={**(publication.headers or {}), **ROLL_UP})
        (answer,) = jetstream.store([publication])
        if isinstance(answer, Stored):
            return value
        if not isinstance(answer, RevisionConflict):
            raise answer
    raise conflict


def _forget_old_values(jetstream: JetStream, bucket: Bucket, email_id: str) -> None:
    """Where a write cannot roll up (``allow_rollup_hdrs`` is off)."""
    nats_subject = f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}"
    try:
        jetstream.api(f"STREAM.PURGE.{bucket.stream}", {"filter": nats_subject, "keep": 1})
    except BusRefused as error:
        fail(
            RelayError(
                f"mail {email_id}: erased, but the bucket keeps the record's old values: {error}; this drops those of"
                f" all records: nats stream edit {bucket.stream} --max-msgs-per-subject=1 --force"
            )
        )
