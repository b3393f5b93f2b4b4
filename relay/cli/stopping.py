"""Commands that take long: what stops them in order, and the command line that goes on with what they left."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator

from relay.cli.terminal import interruptible

ESCAPED = {"\\": "\\\\", "'": "\\'"}


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise ``Interrupted`` here, wherever the process waits."""
    with interruptible():
        before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def command_line(*words: str, operand: str) -> str:
    """The words and the operand as they may be pasted into a shell; an operand that looks like an option is none."""
    return " ".join(_quoted(each) for each in (*words, *(["--"] if operand.startswith("-") else []), operand))


def _quoted(word: str) -> str:
    """As a shell reads it. What cannot be shown is written as its bytes (``$'\\x1b'``: bash, zsh, ksh)."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(character: str) -> str:
    if character.isprintable():
        return ESCAPED.get(character, character)
    return "".join(f"\\x{octet:02x}" for octet in character.encode("utf-8", "surrogateescape"))
