"""``relayctl restart``, ``scale`` and ``reload``: what is changed while mail flows."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import click
import orjson

from relay.cli.terminal import Interrupted, current_settings, current_supervision, fail, plain, say
from relay.errors import EXIT_FAILED, RelayError
from relay.ops.arrangement import SupervisionError
from relay.ops.changes import Change, changes, missing
from relay.ops.devstack import DEFAULTS as DEV_DEFAULTS
from relay.ops.devstack import DevStack
from relay.ops.host import check_port_free
from relay.ops.rolling import STATUS_WORKER, Rolling, RollStopped, Step, What
from relay.ops.supervision import Supervision
from relay.settings import Settings, captured

READY_SECONDS = 60.0
MOST_SEND_WORKERS = 64

timeout_option = click.option(
    "--timeout", default=READY_SECONDS, show_default=True, help="Seconds for each program to become ready."
)
json_lines_option = click.option("--json", "as_json_", is_flag=True, help="Print each step as a line of JSON.")


@click.command()
@click.argument("programs", nargs=-1, metavar="[PROGRAM]...")
@timeout_option
@json_lines_option
def restart(programs: tuple[str, ...], timeout: float, as_json_: bool) -> None:
    """Restarts the workers one after the other, or the PROGRAMs named; no request is lost.

    Each finishes what it has in hand, and the next one's turn comes when it is ready again. A substitute runs
    meanwhile: never fewer send workers serve than there are, less one. Where the substitute does not become ready
    nothing is restarted; where another one does not, it stops there: exit code 1, with its last log lines. `nats` and
    `catcher` of the development stack are restarted only when they are named.

    Example: relayctl restart
    """
    with _changing("restart", timeout, as_json_) as rolling:
        rolling.mend()
        rolling.restart(programs or rolling.workers)


@click.command()
@click.argument("count", type=int)
@timeout_option
@json_lines_option
def scale(count: int, timeout: float, as_json_: bool) -> None:
    """Runs COUNT send workers: starts some, or drains and ends those with the highest numbers. The others go on.

    Each has its share of SMTP_MAX_RECIPIENTS_PER_SECOND, and is told when that changes. The number holds through
    `restart` and `reload`, until `reload` finds another RELAY_SEND_WORKERS, and until the next `start`.

    Example: relayctl scale 4
    """
    if count == 0:
        raise click.UsageError("0 send workers would answer nobody; to send no mail, reload with EMAIL_ENABLED=false")
    if not 0 < count <= MOST_SEND_WORKERS:
        raise click.UsageError(f"COUNT must be 1 to {MOST_SEND_WORKERS}")
    with _changing(f"scale {count}", timeout, as_json_) as rolling:
        rolling.mend()
        before = rolling.now.send_workers
        rolling.scale(count)
    if not as_json_:
        told = f"{count} send workers" if count > 1 else "1 send worker"
        told = f"{told} already" if count == before else f"{told} now, {before} before"
        click.echo(f"{told}; the next `relayctl start` takes RELAY_SEND_WORKERS ({rolling.now.send_workers_set}) again")


@click.command()
@timeout_option
@click.option("--unset", is_flag=True, help="Put settings back to their defaults that are not mentioned any more.")
@json_lines_option
def reload(timeout: float, unset: bool, as_json_: bool) -> None:
    """Takes the settings of this environment (and --env-file) into use, by restarting the workers as `restart` does.

    Settings that are wrong change nothing (exit code 78). Says which are others than before; where there are none it
    does nothing: a file with a password may have changed all the same, which `restart` picks up. What the relay has and
    is not mentioned here any more is refused, unless it is set to nothing (`NAME=`) or --unset is given. Where a worker
    does not become ready with the new settings it gets back those that it had.

    Example: relayctl reload
    """
    settings = current_settings()
    with _changing("reload", timeout, as_json_) as rolling:
        # Paths in settings mean what they mean to the programs: seen from where these were started.
        with contextlib.suppress(OSError):
            os.chdir(rolling.now.directory)
        dev_defaults = DEV_DEFAULTS if rolling.now.is_dev else {}
        settings = current_settings(dev_defaults)
        forced = rolling.now.forced if settings.log_format == "auto" else {}
        values = captured(dev_defaults, **forced)
        found = _changes(rolling, values)
        _check(rolling, settings, values, is_unset=unset)
        rolling.mend()
        unknown = [name for name in rolling.workers if rolling.lacks_settings(name)]
        if unknown:
            with _heard_or_not(sys.stderr):
                say(f"the settings that {', '.join(unknown)} had cannot be read any more; what changes is not known")
        if not found and not unknown and rolling.has_taken(settings):
            if not as_json_:
                click.echo("nothing has changed; `relayctl restart` restarts all the same")
            return
        for change in found:
            _show_change(change, as_json_)
        rolling.reload(settings, values)
    if not as_json_:
        click.echo("the settings are in use")


def _changes(rolling: Rolling, values: dict[str, str]) -> list[Change]:
    """Of any worker: after a reload that stopped in the middle they do not all have the same."""
    found: dict[str, Change] = {}
    for name in rolling.workers:
        if rolling.lacks_settings(name):
            continue
        for change in changes(rolling.settings_of(name), values):
            found.setdefault(change.name, change)
    return [found[name] for name in sorted(found)]


def _check(rolling: Rolling, settings: Settings, values: dict[str, str], *, is_unset: bool) -> None:
    """Raises ``SupervisionError`` when this cannot be done to a relay that runs, or hardly be meant."""
    forgotten = sorted({each for name in rolling.workers for each in missing(rolling.settings_of(name), values)})
    if forgotten and not is_unset:
        raise SupervisionError(
            f"the relay has {', '.join(forgotten)}, and this environment does not mention"
            f" {'it' if len(forgotten) == 1 else 'them'}: give --env-file, set what is to be unset to nothing (NAME=),"
            " or say --unset; nothing was changed"
        )
    if rolling.now.is_dev:
        ports = {each.name: each.port for each in rolling.now.programs.values()}
        wanted = DevStack(settings)
        if (wanted.nats_port, wanted.smtp_port) != (ports.get("nats"), rolling.now.told["smtp_port"]):
            raise SupervisionError(
                "the ports of the development stack's servers (NATS_URL, SMTP_PORT) cannot change while they run;"
                " `relayctl stop` and `relayctl start --dev`; nothing was changed"
            )
    port_changes = "PORT" in {each.name for each in changes(rolling.settings_of(STATUS_WORKER), values)}
    if port_changes and settings.port != rolling.now.told["port"]:  # or it may be ours already
        check_port_free(settings.relay_http_host, settings.port, "PORT")


# -- all of them -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _changing(what: str, timeout_seconds: float, as_json: bool) -> Iterator[Rolling]:
    """Nobody else changes anything meanwhile; what goes wrong is said, and ends the command."""
    supervision = current_supervision()
    try:
        with _ends_soon() as asked, supervision.changing(what):
            yield Rolling(supervision, lambda step: _show(step, as_json), timeout_seconds, lambda: bool(asked))
    except RollStopped as error:
        _explain(supervision, error)
        sys.exit(EXIT_FAILED)
    except RelayError as error:
        fail(error)


@contextlib.contextmanager
def _ends_soon() -> Iterator[list[int]]:
    """The first Ctrl-C, or what else ends commands, is noted: no worker must be left stopped. The second ends it."""
    asked: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if asked:
            say("what was being restarted may be left stopped; say the command again")
            raise Interrupted(EXIT_FAILED)
        asked.append(number)
        with _heard_or_not(sys.stderr):
            say("ending as soon as nothing is left stopped; once more ends at once")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, on_signal) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _heard_or_not(stream: TextIO) -> Iterator[None]:
    """Who read may have gone (a closed terminal, `| head`): no worker must be left stopped for that."""
    try:
        yield
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _show(step: Step, as_json: bool) -> None:
    took = f" in {step.seconds:.1f} s" if step.what in {What.READY, What.DRAINED, What.REMOVED} else ""
    with _heard_or_not(sys.stdout):
        if as_json:
            told = {"program": step.program, "what": step.what.value, "seconds": round(step.seconds, 3)}
            _line({"at": time.time(), **told, "detail": step.detail})
        else:
            click.echo(f"{step.program:<12} {step.what.value}{took}{f': {plain(step.detail)}' if step.detail else ''}")
            sys.stdout.flush()


def _show_change(change: Change, as_json: bool) -> None:
    with _heard_or_not(sys.stdout):
        if as_json:
            _line({"at": time.time(), "setting": change.name, "before": change.before, "after": change.after})
        else:
            click.echo(plain(str(change)))


def _line(told: dict[str, object]) -> None:
    click.echo(orjson.dumps(told).decode())
    sys.stdout.flush()


def _explain(supervision: Supervision, error: RollStopped) -> None:
    say(str(error))
    if error.lines:
        click.echo(f"last lines of {Path(supervision.log_path(error.program))}:", err=True)
        for line in error.lines:
            click.echo(f"  {plain(line)}", err=True)
