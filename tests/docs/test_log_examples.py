"""docs/log.md: its examples run as they stand there, as a user who may do no more than the page says."""

from __future__ import annotations

import ast
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.tracking.facts import COUNTED, Fact
from relay.tracking.groups import group_token
from relay.tracking.log import fact_publication
from relay.tracking.storage import StorageConfig, ensure_storage, patiently
from tests.docs.markdown import blocks, page
from tests.support.groups import SENT_AT, store
from tests.support.nats_server import NatsServer

PAGE = "log.md"
RECORDS = f"KV_{contract.RECIPIENTS_BUCKET}"
NATS_GO = "github.com/nats-io/nats.go@v1.55.0"
GO = shutil.which("go")
WAIT_SECONDS = 30.0

GROUP_IDS = ["spring", "a/b_c-d", "-", "=", "-a", "", "a b", "Grüße, Zürich 🚀", "a.b", "x" * 128, "x" * 129, "ü" * 300]


def code_with(language: str, what: str) -> str:
    """The page's one block of the language that has ``what``."""
    (found,) = (block for block in blocks(PAGE, language) if what in block)
    return found


class Reader:
    """An example at work, in a process of its own: what it printed, line by line."""

    def __init__(self, command: list[str], url: str, directory: Path) -> None:
        self._errors = directory / f"errors-{time.monotonic_ns()}"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, env={**os.environ, "NATS_URL": url}, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def lines(self, count: int) -> list[str]:
        """The next lines; fails when they do not come."""
        try:
            return [self._lines.get(timeout=WAIT_SECONDS) for _ in range(count)]
        except queue.Empty:
            pytest.fail(f"it printed too little; it exits {self.process.poll()} and says {self._errors.read_text()}")

    @property
    def is_silent(self) -> bool:
        """Whether nothing more has been printed."""
        return self._lines.empty()

    def stop(self) -> None:
        """Ends it by its pid."""
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None


class Place:
    """A server on which the page's user may do what the page grants, and our own view of the log."""

    def __init__(self, server: NatsServer, jetstream: JetStream) -> None:
        self.server = server
        self.jetstream = jetstream
        self.reader_url = server.url.replace("//", "//mailwatch:secret@")

    def state(self, group_id: str, *email_ids: str, fact: Fact = Fact.SENT, event_id: str = "") -> None:
        """Logs a fact of each mail."""
        token = group_token(group_id)
        store(self.jetstream, [fact_publication(token, fact, each, SENT_AT, event_id) for each in email_ids])

    def acknowledged(self) -> int:
        """Up to where the consumer has acknowledged everything."""
        told = self.jetstream.api(f"CONSUMER.INFO.{contract.LOG_STREAM}.mailwatch")
        return int(told["ack_floor"]["stream_seq"])

    def wait_until_acknowledged(self, sequence: int) -> None:
        """Bounded; the acknowledgement of the last message is on its way when its line is printed."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.acknowledged() < sequence:
            assert time.monotonic() < deadline, "it does not acknowledge"


@pytest.fixture
def place(new_nats_server: Callable[..., NatsServer], new_bus: Callable[[str], Bus]) -> Place:
    """With bucket and log."""
    (user,) = (block for block in blocks(PAGE, "") if "permissions" in block)
    server = new_nats_server(config=f"authorization {{ users: [ {{ user: relay, password: relay }}\n{user} ] }}")
    jetstream = JetStream(new_bus(server.url.replace("//", "//relay:relay@")))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return Place(server, jetstream)


@pytest.fixture
def start(place: Place, tmp_path: Path) -> Iterator[Callable[[list[str]], Reader]]:
    """Starts examples and ends them."""
    started: list[Reader] = []

    def begin(command: list[str]) -> Reader:
        reader = Reader(command, place.reader_url, tmp_path)
        started.append(reader)
        return reader

    yield begin
    for reader in started:
        reader.stop()


# -- Python -----------------------------------------------------------------------------------------------------------
def python_token() -> Callable[[str], str]:
    """The page's function."""
    names: dict[str, Any] = {}
    exec(compile(code_with("python", "def group_token"), "log.md", "exec"), names)
    token: Callable[[str], str] = names["group_token"]
    return token


@given(st.text(max_size=200) | st.text("abc/_-=", max_size=140) | st.sampled_from(GROUP_IDS))
def test_tokens_in_python(group_id: str) -> None:
    assert python_token()(group_id) == group_token(group_id)


def test_the_consumer_in_python(place: Place, start: Callable[[list[str]], Reader], tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(code_with("python", "pull_subscribe"))
    # Given facts from before it was started
    place.state("spring", "mail-1", "mail-2")
    place.state("ü b", "mail-3", fact=Fact.OPEN, event_id="event-1")
    reader = start([sys.executable, str(example)])
    assert reader.lines(3) == [
        f"{SENT_AT} sent mail-1 spring ",
        f"{SENT_AT} sent mail-2 spring ",
        f"{SENT_AT} open mail-3 {group_token('ü b')} event-1",
    ]
    # When it is killed, and facts are logged meanwhile
    place.wait_until_acknowledged(3)
    reader.stop()
    place.state("spring", "mail-4")
    # Then it goes on where it stopped, also over a restart of NATS
    reader = start([sys.executable, str(example)])
    assert reader.lines(1) == [f"{SENT_AT} sent mail-4 spring "]
    place.wait_until_acknowledged(4)
    place.server.stop()
    place.server.start()
    patiently(lambda: place.jetstream.last_sequence(contract.LOG_STREAM))
    place.state("spring", "mail-5")
    assert reader.lines(1) == [f"{SENT_AT} sent mail-5 spring "]
    assert reader.is_silent


FORGE = """
import asyncio, os, sys
import nats

async def main():
    nc = await nats.connect(os.environ["NATS_URL"])
    for nats_subject in sys.argv[1:]:
        await nc.publish(nats_subject, b"forged")
    await nc.flush()
    await nc.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("is_reader", [True, False], ids=["reader", "relay"])
def test_the_reader_may_do_no_more(place: Place, is_reader: bool) -> None:
    url = place.reader_url if is_reader else place.server.url.replace("//", "//relay:relay@")
    forged = [f"{contract.LOG_PREFIX}.spring.sent", f"$KV.{contract.RECIPIENTS_BUCKET}.mail-1"]
    command = [sys.executable, "-c", FORGE, *forged]
    done = subprocess.run(command, env={**os.environ, "NATS_URL": url}, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    stored = [place.jetstream.last_sequence(name) for name in (contract.LOG_STREAM, RECORDS)]
    assert stored == ([0, 0] if is_reader else [1, 1])


# -- Go ---------------------------------------------------------------------------------------------------------------
# Go is a reader's language and none of ours: its examples are tried where it is, and neither CI nor a laptop needs it.
def go(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the go command there."""
    assert GO is not None
    return subprocess.run([GO, *arguments], cwd=directory, capture_output=True, text=True, timeout=300, check=False)


TOKENS_IN_GO = """package main

import (
	"encoding/json"
	"os"
)

func main() {
	var groupIDs, tokens []string
	json.NewDecoder(os.Stdin).Decode(&groupIDs)
	for _, groupID := range groupIDs {
		tokens = append(tokens, groupToken(groupID))
	}
	json.NewEncoder(os.Stdout).Encode(tokens)
}
"""


def test_tokens_in_go(tmp_path: Path) -> None:
    if GO is None:
        pytest.skip("go is not installed")
    (tmp_path / "go.mod").write_text("module example\n")
    (tmp_path / "token.go").write_text(code_with("go", "func groupToken"))
    (tmp_path / "main.go").write_text(TOKENS_IN_GO)
    built = go(tmp_path, "build", "-o", "tokens", ".")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(tmp_path / "tokens")], input=json.dumps(GROUP_IDS), capture_output=True, text=True, timeout=30, check=True
    )
    assert json.loads(done.stdout) == [group_token(group_id) for group_id in GROUP_IDS]


@pytest.fixture(scope="session")
def go_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's program, built; nats.go comes from Go's own cache or its proxy."""
    if GO is None:
        pytest.skip("go is not installed")
    directory = tmp_path_factory.mktemp("go")
    (directory / "go.mod").write_text("module example\n")
    got = go(directory, "get", NATS_GO)
    if got.returncode != 0:
        pytest.skip(f"{NATS_GO} cannot be had here: {got.stderr.strip()[-200:]}")
    (directory / "token.go").write_text(code_with("go", "func groupToken"))
    (directory / "main.go").write_text(code_with("go", "func main"))
    for command in (["vet", "."], ["build", "-o", "mailwatch", "."]):
        done = go(directory, *command)
        assert done.returncode == 0, done.stderr
    return directory / "mailwatch"


def test_the_consumer_in_go(place: Place, start: Callable[[list[str]], Reader], go_example: Path) -> None:
    group_id = "Grüße, Zürich 🚀"
    place.state("spring", "mail-1")
    place.state(group_id, "mail-2")
    place.state(group_id, "mail-3", fact=Fact.CLICK, event_id="event-1")
    reader = start([str(go_example), group_id])
    token = group_token(group_id)
    assert reader.lines(2) == [f"{SENT_AT} sent mail-2 {token} ", f"{SENT_AT} click mail-3 {token} event-1"]
    place.wait_until_acknowledged(3)
    place.server.stop()
    place.server.start()
    patiently(lambda: place.jetstream.last_sequence(contract.LOG_STREAM))
    place.state(group_id, "mail-4")
    assert reader.lines(1) == [f"{SENT_AT} sent mail-4 {token} "]
    reader.stop()
    # Without a group: everything, from where this consumer is.
    place.state("spring", "mail-5")
    assert "mail-5" in start([str(go_example)]).lines(1)[0]


@pytest.mark.parametrize("code", blocks(PAGE, "go"), ids=["token", "consumer"])
def test_go_is_formatted(code: str) -> None:
    gofmt = shutil.which("gofmt")
    if gofmt is None:
        pytest.skip("gofmt is not installed")
    done = subprocess.run([str(gofmt)], input=code, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, code), done.stderr


# -- names ------------------------------------------------------------------------------------------------------------
def test_every_fact_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (once|each time) \|$", page(PAGE), re.M)
    assert rows == [(fact.value, "each time" if fact in COUNTED else "once") for fact in Fact]


def test_every_field_is_explained() -> None:
    stated = json.loads(fact_publication("g", Fact.OPEN, "mail-1", SENT_AT, "event-1").payload)
    section = page(PAGE).partition("## Messages")[2].partition("| Fact |")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(stated)


def test_names_are_those_of_the_contract() -> None:
    text = page(PAGE)
    subjects = re.findall(r"lfx\.email-service\.[\w.*>-]+", text)
    facts = {fact.value for fact in Fact} | {"*"}
    known = {contract.GET_EMAIL_STATUS, f"{contract.LOG_PREFIX}.", f"{contract.LOG_PREFIX}.>"}
    for nats_subject in subjects:
        if nats_subject not in known:
            assert nats_subject.startswith(f"{contract.LOG_PREFIX}."), nats_subject
            assert nats_subject.split(".")[4] in facts, nats_subject
            assert len(nats_subject.split(".")) == 5, nats_subject
    assert len(subjects) > 12
    assert set(re.findall(r"\bEMAIL_[A-Z]+", text)) == {contract.LOG_STREAM}
    for api in re.findall(r'"\$JS\.([\w.>]+)"', text):
        assert f"{contract.LOG_STREAM}.mailwatch" in api


def test_the_command_line_names_consumers_it_made() -> None:
    (block,) = blocks(PAGE, "sh")
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("nats ")]
    made = {words[4] for words in commands if words[1:3] == ["consumer", "add"]}
    named = {words[4] for words in commands if words[1:3] in (["consumer", "next"], ["consumer", "rm"])}
    assert made == {"bounces", "spring"}
    assert named <= made
    assert all(words[3] == contract.LOG_STREAM for words in commands)


def test_the_python_is_python() -> None:
    for code in blocks(PAGE, "python"):
        ast.parse(code)
