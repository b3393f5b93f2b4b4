"""Command lines that may be pasted, and what stops a command."""

from __future__ import annotations

import signal
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cli.stopping import command_line, stoppable
from relay.cli.terminal import Interrupted

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@pytest.mark.parametrize(
    ("operand", "line"),
    [
        ("spring", "relayctl export --format csv spring"),
        ("-x", "relayctl export --format csv -- -x"),
        ("a b", "relayctl export --format csv 'a b'"),
        ("--help", "relayctl export --format csv -- --help"),
        ("\x1b[2J'\n", "relayctl export --format csv $'\\x1b[2J\\'\\x0a'"),
    ],
)
def test_a_command_line(operand: str, line: str) -> None:
    assert command_line("relayctl", "export", "--format", "csv", operand=operand) == line


@given(st.lists(st.tuples(WORDS, WORDS), min_size=8, max_size=8))
def test_a_shell_reads_what_was_meant(commands: list[tuple[str, str]]) -> None:
    script = "\n".join(command_line("printf", "%s\\0", word, operand=operand) for word, operand in commands)
    assert script.replace("\n", "").isprintable(), "no escape sequence reaches the terminal"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, timeout=20)
    expected = [each for word, operand in commands for each in (word, *(["--"] if operand[:1] == "-" else []), operand)]
    assert done.stdout.decode().split("\0")[:-1] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_command_stops_it_in_order(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted), stoppable():
        signal.raise_signal(number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
