"""``relayctl parked``: notifications of events that could not be handled, and what an operator does about them."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import click
import orjson
from rich.cells import set_cell_size
from rich.text import Text

from relay import contract
from relay.bus.jetstream import JetStream
from relay.cli.progress import progress_bar
from relay.cli.request import tracking_storage
from relay.cli.terminal import (
    console,
    current_settings,
    fail,
    interruptible,
    json_option,
    nats_config,
    plain,
    print_json,
    say,
)
from relay.engagement import Engagement
from relay.errors import EXIT_FAILED, RelayError
from relay.ops.parts import engagement_config
from relay.redaction import without_addresses
from relay.tracking.batch import Notification
from relay.tracking.events import Broken, Kind, read_notification
from relay.tracking.parked import Parked, Parking
from relay.tracking.record import parse_time
from relay.tracking.storage import patiently

HIGHEST_NUMBER = 2**63 - 1
BEGINNING_CHARACTERS = 120
LOOKED_AT_CHARACTERS = 1000
"""Of a body, to show its beginning: an address that begins in there ends in there too."""
HANDLE_SECONDS = 5.0
_ENCODED_AT = re.compile(r"%40|\\+u0040")
EVENT_KINDS = frozenset(kind.value for kind in Kind)
IN_WORDS = {
    "folded": "folded into the record of its mail",
    "repeated": "had been folded before",
    "rebuilt": "folded; its mail had no record, and has one now",
    "unknown": "its mail is not known",
    "parked": "parked again, under a new number",
    "unreadable": "stays: cannot be read",
    "cut": "stays: only its beginning was kept",
}
NOT_HANDLED = frozenset({"parked", "unreadable", "cut"})

numbers_argument = click.argument("numbers", metavar="[NUMBER]...", nargs=-1, type=click.IntRange(1, HIGHEST_NUMBER))
all_option = click.option("--all", "is_all", is_flag=True, help="All that are parked when it begins.")


@click.group()
def parked() -> None:
    """Notifications of events that could not be handled: nobody can read them, or their mail's record is broken.

    They are kept for 30 days, and the newest of them as far as 64 MiB go.

    Example: relayctl parked list
    """


def _storage() -> AbstractContextManager[JetStream]:
    return tracking_storage(nats_config(current_settings()))


def _check_which(numbers: Sequence[int], is_all: bool) -> None:
    if bool(numbers) == is_all:
        raise click.UsageError("give either NUMBERs or --all")


# -- list -------------------------------------------------------------------------------------------------------------
@parked.command("list")
@click.option("--json", "as_json_", is_flag=True, help="Print one JSON object a line instead of text.")
def list_(as_json_: bool) -> None:
    """Lists what is parked, the newest last: NUMBER, when, how often it was received, bytes, why, how it begins.

    Addresses are shown as in the logs (som****@example.com); `relayctl parked show` has them in full.

    Example: relayctl parked list
    """
    show: Callable[[Parked], None] = _show_json if as_json_ else _Lines()
    is_empty = True
    with interruptible(), _storage() as jetstream:
        for page in Parking(jetstream).pages():
            for each in page:
                show(each)
                is_empty = False
    if is_empty:
        say("nothing is parked")


def _beginning(body: str) -> str:
    """How the body begins, in one line and without addresses, also those in links and in JSON within JSON."""
    looked_at = _ENCODED_AT.sub("@", body[:LOOKED_AT_CHARACTERS])
    return " ".join(without_addresses(looked_at).split())[:BEGINNING_CHARACTERS]


def _show_json(found: Parked) -> None:
    shown = found._asdict()
    del shown["body"]
    shown |= {"reason": without_addresses(found.reason), "begins": _beginning(found.body)}
    sys.stdout.write(orjson.dumps(shown).decode() + "\n")


class _Lines:
    """A table, a line at a time: there may be many."""

    HEADINGS = ("NUMBER", "PARKED (UTC)", "TIMES", "    BYTES", "WHY", "BEGINS")

    def __init__(self) -> None:
        room = max(30, console().width - 8 - 16 - 6 - 9 - 5)
        self._widths = (8, 16, 6, 9, room * 2 // 5, room - room * 2 // 5)
        self._is_begun = False

    def __call__(self, found: Parked) -> None:
        if not self._is_begun:
            self._line(self.HEADINGS)
            self._is_begun = True
        when = found.parked_at[:16].replace("T", " ")
        size = f"{found.body_bytes:,}".rjust(self._widths[3])
        why = " ".join(without_addresses(found.reason).split())
        self._line((str(found.number), when, f"{found.received_count:,}", size, why, _beginning(found.body)))

    def _line(self, cells: Sequence[str]) -> None:
        sized = [set_cell_size(plain(cell), width) for cell, width in zip(cells, self._widths, strict=True)]
        sys.stdout.write(f"{' '.join(sized).rstrip()}\n")


# -- show -------------------------------------------------------------------------------------------------------------
@parked.command()
@click.argument("number", type=click.IntRange(1, HIGHEST_NUMBER))
@json_option
def show(number: int, as_json_: bool) -> None:
    """Shows the parked notification NUMBER, whole.

    Exits 1 when there is none of that number. It holds addresses.

    Example: relayctl parked show 7 --json
    """
    with interruptible(), _storage() as jetstream:
        found = Parking(jetstream).get(number)
    if found is None:
        fail(RelayError(f"notification {number}: {contract.NOT_FOUND}"))
    if as_json_:
        print_json(found._asdict())
        return
    fields = {
        "number": found.number,
        "parked": found.parked_at,
        "why": found.reason,
        "received": f"{found.received_count:,} times",
        "sqs_message_id": found.sqs_message_id,
        "bytes": f"{found.body_bytes:,}" + (", of which only the beginning was kept" if found.is_cut else ""),
    }
    for name, value in fields.items():
        console().print(Text.assemble((f"{name:<16}", "bold"), plain(value)), soft_wrap=True)
    click.echo(f"\n{plain(found.body)}")


# -- retry ------------------------------------------------------------------------------------------------------------
class Retried(NamedTuple):
    """What came of one notification."""

    number: int
    outcome: str
    """One word of ``IN_WORDS``, or what else the engagement worker would count it as."""
    why: str = ""

    @property
    def is_handled(self) -> bool:
        """It need not be looked at again."""
        return self.outcome not in NOT_HANDLED and not self.outcome.startswith("stays")

    def __str__(self) -> str:
        said = IN_WORDS.get(self.outcome, self.outcome)
        return f"{said}: {self.why}" if self.why else said


@parked.command()
@numbers_argument
@all_option
@click.option("--json", "as_json_", is_flag=True, help="Print one JSON object a line instead of text.")
def retry(numbers: tuple[int, ...], is_all: bool, as_json_: bool) -> None:
    """Handles parked notifications again, as the engagement worker would; those that are done are parked no longer.

    For when the cause is gone: a newer Relay that can read them, a record that was mended. To do it again is safe: an
    event that was folded is not counted twice. Exits 1 when any is still parked, or there is none of a NUMBER.

    Example: relayctl parked retry 7 12
    """
    _check_which(numbers, is_all)
    counts: Counter[bool] = Counter()
    with interruptible(), _storage() as jetstream:
        parking = Parking(jetstream)
        if total := parking.count():
            engagement = Engagement(jetstream, engagement_config(current_settings()))
            engagement.prepare()
            with _progress("retrying", total if is_all else len(numbers)) as advance:
                for found in _all(parking) if is_all else _those(parking, numbers, counts):
                    retried = _retry(engagement, found)
                    if retried.is_handled or retried.outcome == "parked":
                        patiently(partial(parking.drop, found.number))
                    counts[retried.is_handled] += 1
                    _show_retried(retried, as_json_)
                    advance(1)
        elif is_all:
            say("nothing is parked")
        else:
            fail(RelayError(f"notification {numbers[0]}: {contract.NOT_FOUND}; nothing is parked"))
    if counts:
        say(f"{counts[True]:,} handled, {counts[False]:,} not")
    if counts[False]:
        sys.exit(EXIT_FAILED)


def _all(parking: Parking) -> Iterator[Parked]:
    for page in parking.pages():
        yield from page


def _those(parking: Parking, numbers: Sequence[int], counts: Counter[bool]) -> Iterator[Parked]:
    for number in dict.fromkeys(numbers):
        found = patiently(partial(parking.get, number))
        if found is None:
            say(f"notification {number}: {contract.NOT_FOUND}")
            counts[False] += 1
        else:
            yield found


def _retry(engagement: Engagement, found: Parked) -> Retried:
    """Handles one. What nobody can read yet is not even tried: it would only be parked again."""
    if found.is_cut:
        return Retried(found.number, "cut")
    now = time.time()
    read = read_notification(found.body, now)
    if isinstance(read, Broken):
        return Retried(found.number, "unreadable", read.why)
    parked_at = parse_time(found.parked_at)
    notification = Notification(
        body=found.body,
        # Another id than it was parked under: should it be parked once more, the stream must not take it for a repeat.
        sqs_message_id=f"{found.sqs_message_id}.{found.number}",
        received_count=found.received_count,
        sent_at=parked_at.timestamp() if parked_at is not None else now,
    )
    before = Counter(engagement.counts)
    (verdict,) = patiently(lambda: engagement.handle([notification], HANDLE_SECONDS))
    counted = [what for what in engagement.counts - before if what not in EVENT_KINDS]
    outcome = counted[0] if counted else ""
    return Retried(found.number, outcome if verdict.is_done else f"stays: {outcome}", verdict.why)


def _show_retried(retried: Retried, as_json_: bool) -> None:
    if as_json_:
        told: dict[str, Any] = {**retried._asdict(), "is_handled": retried.is_handled}
        sys.stdout.write(orjson.dumps(told).decode() + "\n")
    else:
        click.echo(f"{retried.number:<8} {plain(retried)}")


def _progress(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar, unless the lines go to a terminal: they show it themselves."""
    if sys.stdout.isatty():
        return contextlib.nullcontext(lambda _count: None)
    return progress_bar(what, total)


# -- drop -------------------------------------------------------------------------------------------------------------
@parked.command()
@numbers_argument
@all_option
@click.option("--yes", is_flag=True, help="Drop without asking.")
@json_option
def drop(numbers: tuple[int, ...], is_all: bool, yes: bool, as_json_: bool) -> None:
    """Deletes parked notifications. What they tell is lost.

    Exits 1 when there is none of a NUMBER, and when it was told not to go on.

    Example: relayctl parked drop 7 12 --yes
    """
    _check_which(numbers, is_all)
    if as_json_ and not yes:
        raise click.UsageError("--json asks nothing; say --yes as well")
    wanted = list(dict.fromkeys(numbers))
    missing: list[int] = []
    with interruptible():
        count, last_number = _parked_now() if is_all else (len(wanted), 0)
        if count and not yes:
            click.confirm(f"Drop {count:,} parked notification{'s' if count > 1 else ''}?", abort=True, err=True)
        dropped = 0
        if count:
            with _storage() as jetstream:
                parking = Parking(jetstream)
                if is_all:
                    dropped = parking.drop_all(last_number)
                else:
                    missing = _drop(parking, wanted)
                    dropped = len(wanted) - len(missing)
    if as_json_:
        print_json({"dropped": dropped, "not_found": missing})
    else:
        click.echo(f"dropped: {dropped:,}" if count else "nothing is parked")
    for number in missing:
        say(f"notification {number}: {contract.NOT_FOUND}")
    if missing:
        sys.exit(EXIT_FAILED)


def _parked_now() -> tuple[int, int]:
    """How many there are, and the highest number: what is parked while the operator thinks stays."""
    with _storage() as jetstream:
        parking = Parking(jetstream)
        last_number = parking.last_number()
        return parking.count(), last_number


def _drop(parking: Parking, numbers: Sequence[int]) -> list[int]:
    """Drops them; those that there are none of."""
    missing = []
    with _progress("dropping", len(numbers)) as advance:
        for number in numbers:
            if not patiently(partial(parking.drop, number)):
                missing.append(number)
            advance(1)
    return missing
