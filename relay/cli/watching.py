"""``relayctl status`` and ``logs``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import orjson
from rich.live import Live
from rich.text import Text

from relay.cli.status_view import as_json, render, take_snapshot
from relay.cli.terminal import console, current_supervision, fail, json_option, plain, print_json
from relay.errors import EXIT_FAILED, RelayError
from relay.ops.supervision import Supervision

FOLLOW_SECONDS = 0.2
LEVEL_STYLES = {"warn": "yellow", "error": "red", "debug": "dim"}


@click.command()
@json_option
@click.option("--watch", is_flag=True, help="Stay and refresh; Ctrl-C ends it.")
@click.option("--interval", default=1.0, show_default=True, help="Seconds between refreshes with --watch.")
def status(as_json_: bool, watch: bool, interval: float) -> None:
    """Shows every program: state, work in hand, pool, outcomes, last error.

    POOL counts connections: idle/busy/dialling/most allowed. Exits 1 when something is not running, not ready, or mail
    cannot go out.

    Example: relayctl status --watch
    """
    if watch and as_json_:
        raise click.UsageError("--watch shows text; leave out --json, or call it again and again")
    supervision = current_supervision()
    try:
        snapshot = take_snapshot(supervision)
        if watch:
            _watch(supervision, interval)
    except KeyboardInterrupt:
        return
    except RelayError as error:
        fail(error)
    if as_json_:
        print_json(as_json(snapshot))
    else:
        console().print(render(snapshot))
    if not snapshot.is_well:
        sys.exit(EXIT_FAILED)


def _watch(supervision: Supervision, interval_seconds: float) -> None:
    """Shows the status again and again, in place on a terminal, one after the other elsewhere. Ends with Ctrl-C."""
    out = console()
    with Live(console=out, auto_refresh=False) if out.is_terminal else contextlib.nullcontext() as live:
        while True:
            shown = render(take_snapshot(supervision))
            if live is not None:
                live.update(shown, refresh=True)
            else:
                out.print(shown)
                sys.stdout.flush()
            time.sleep(max(0.2, interval_seconds))


@click.command()
@click.argument("program", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on; Ctrl-C ends it.")
@click.option(
    "-n",
    "--lines",
    default=20,
    type=click.IntRange(min=0),
    show_default=True,
    help="Last lines of each program to begin with.",
)
@click.option("--json", "as_json_", is_flag=True, help="Print the lines as they are logged instead of as text.")
def logs(program: str | None, follow: bool, lines: int, as_json_: bool) -> None:
    """Shows the programs' logs, or one PROGRAM's.

    A relay in the foreground logs to standard output instead.

    Example: relayctl logs send-1 -f
    """
    directory = current_supervision().state_dir / "log"
    paths = [directory / f"{program}.log"] if program else sorted(directory.glob("*.log"))
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        known = ", ".join(sorted(path.stem for path in directory.glob("*.log"))) or "none"
        raise click.ClickException(f"there is no log of {program or 'any program'} in {directory} (there are: {known})")
    try:
        first = [(path.stem, line) for path in paths for line in _last_lines(path, lines)]
        for name, line in sorted(first, key=lambda pair: _time_of(pair[1])):
            _print_line(name, line, as_json_)
        if follow:
            if not current_supervision().is_running():
                click.echo(f"no relay runs in {directory.parent}; waiting for what it will log", err=True)
            for name, line in _follow(paths):
                _print_line(name, line, as_json_)
    except KeyboardInterrupt:
        return


def _last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if count else []


def _follow(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Lines as they are appended; a rotated file (it became shorter, or another) is read from its beginning."""
    places = {path: (path.stat().st_ino, path.stat().st_size) for path in paths}
    while True:
        for path, (inode, offset) in places.items():
            try:
                with path.open("rb") as file:
                    found = os.fstat(file.fileno())
                    if found.st_ino != inode or found.st_size < offset:
                        offset = 0
                    file.seek(offset)
                    whole = file.read()
            except FileNotFoundError:  # between the two steps of a rotation
                continue
            whole = whole[: whole.rfind(b"\n") + 1]
            places[path] = (found.st_ino, offset + len(whole))
            for line in whole.decode("utf-8", "replace").splitlines():
                yield path.stem, line
        time.sleep(FOLLOW_SECONDS)


def _parsed(line: str) -> dict[str, Any]:
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _time_of(line: str) -> str:
    return str(_parsed(line).get("time", ""))


def _print_line(name: str, line: str, as_json_: bool) -> None:
    fields = {} if as_json_ else _parsed(line)
    if not fields:
        click.echo(line if as_json_ else f"{name:<10} {plain(line)}")
        sys.stdout.flush()
        return
    when, level, said = (str(fields.pop(key, "")) for key in ("time", "level", "msg"))
    program = str(fields.pop("program", name))
    traceback = fields.pop("traceback", "")
    rest = "".join(f" {key}={value}" for key, value in fields.items())
    head = f"{when[:23].replace('T', ' ')} {program:<10} {level:<5} {said}"
    text = Text.assemble(plain(head), (plain(rest), "dim"))
    text.style = LEVEL_STYLES.get(level, "")
    console().print(text, soft_wrap=True)
    sys.stdout.flush()
    if traceback:
        click.echo(str(traceback))
