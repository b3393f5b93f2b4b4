"""``relayctl status`` and ``logs``."""

from __future__ import annotations

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
from relay.cli.terminal import console, current_supervision, fail, json_option, print_json
from relay.errors import EXIT_FAILED, RelayError

FOLLOW_SECONDS = 0.2
LEVEL_STYLES = {"warn": "yellow", "error": "red", "debug": "dim"}


@click.command()
@json_option
@click.option("--watch", is_flag=True, help="Stay and refresh; Ctrl-C ends it.")
@click.option("--interval", default=1.0, show_default=True, help="Seconds between refreshes with --watch.")
def status(as_json_: bool, watch: bool, interval: float) -> None:
    """Shows every program: state, work in hand, pool, outcomes, last error.

    Exits 1 when something is not running, not ready, or mail cannot go out.

    Example: relayctl status --watch
    """
    supervision = current_supervision()
    try:
        snapshot = take_snapshot(supervision)
        if watch:
            with Live(render(snapshot), console=console(), auto_refresh=False) as live:
                while True:
                    live.update(render(take_snapshot(supervision)), refresh=True)
                    time.sleep(max(0.2, interval))
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


@click.command()
@click.argument("program", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on; Ctrl-C ends it.")
@click.option("-n", "--lines", default=20, show_default=True, help="Last lines of each program to begin with.")
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
    first = [(path.stem, line) for path in paths for line in _last_lines(path, lines)]
    for name, line in sorted(first, key=lambda pair: _time_of(pair[1])):
        _print_line(name, line, as_json_)
    if follow:
        try:
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
                found = path.stat()
            except OSError:
                continue
            if found.st_ino != inode or found.st_size < offset:
                offset = 0
            with path.open("rb") as file:
                file.seek(offset)
                whole = file.read()
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
        click.echo(line if as_json_ else f"{name:<10} {line}")
        return
    when, level, said = (str(fields.pop(key, "")) for key in ("time", "level", "msg"))
    program = str(fields.pop("program", name))
    traceback = fields.pop("traceback", "")
    rest = "".join(f" {key}={value}" for key, value in fields.items())
    text = Text.assemble(f"{when[:23].replace('T', ' ')} {program:<10} {level:<5} {said}", (rest, "dim"))
    text.style = LEVEL_STYLES.get(level, "")
    console().print(text, soft_wrap=True)
    if traceback:
        click.echo(str(traceback))
