"""relayctl parked as an operator meets it: real processes, a real nats-server, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from relay import contract
from relay.bus.client import Bus, Publication
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.cli.documentation import reference
from relay.cli.main import cli
from relay.cli.parked import parked
from relay.tracking.groups import group_token
from relay.tracking.log import Log
from relay.tracking.parked import Parking, ensure_parked_stream, parked_publication
from relay.tracking.storage import StorageConfig, ensure_storage
from tests.support.groups import put_records, send_mails, store
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, clean_environment

ROOT = Path(__file__).parents[2]
AT = "2026-11-22T05:17:09.123Z"
SENT_AT = "2025-01-15T10:30:00.000Z"
MAX_PAYLOAD = 1024 * 1024

NewServer = Callable[..., NatsServer]
NewBus = Callable[[str], Bus]


class Place:
    """A server of a test's own, our own view of it, and an operator."""

    def __init__(self, url: str, jetstream: JetStream, directory: Path) -> None:
        self.jetstream = jetstream
        self.parking = Parking(jetstream)
        self._environment = clean_environment({"NATS_URL": url, "RELAY_STATE_DIR": str(directory), "COLUMNS": "80"})
        self._parked = 0

    def run(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        """Runs ``relayctl parked`` to its end; whatever it exits with, it never shows a traceback."""
        done = subprocess.run(
            [str(RELAYCTL), "parked", *arguments],
            env=self._environment,
            input=typed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def park(self, *bodies: str, reason: str = "no JSON", received_count: int = 3) -> None:
        """Parks notifications."""
        publications = []
        for body in bodies:
            self._parked += 1
            publications.append(
                parked_publication(body, reason, received_count, f"sqs-{self._parked}", AT, self.max_bytes)
            )
        store(self.jetstream, publications)

    @property
    def max_bytes(self) -> int:
        """Of a message."""
        return self.jetstream.max_payload_bytes

    def numbers(self) -> list[int]:
        """What is parked."""
        return [each.number for page in self.parking.pages() for each in page]


@pytest.fixture
def empty(new_nats_server: NewServer, new_bus: NewBus, tmp_path: Path) -> Place:
    """With bucket and log, as after a first start without SES."""
    url = new_nats_server().url
    jetstream = JetStream(new_bus(url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return Place(url, jetstream, tmp_path)


@pytest.fixture
def place(empty: Place) -> Place:
    """With the stream as well."""
    ensure_parked_stream(empty.jetstream, StorageConfig())
    return empty


def notification(event_type: str, email_id: str, group_id: str, event_id: str = "", **event: Any) -> str:
    """What SNS puts into the queue for an event of SES's."""
    told = {
        "eventType": event_type,
        "mail": {
            "timestamp": SENT_AT,
            "messageId": "0100",
            "destination": ["someone@example.com"],
            "headers": [{"name": contract.TRACKING_HEADER, "value": f"{group_id}/{email_id}"}],
            "commonHeaders": {"to": ["someone@example.com"], "subject": "Hello"},
        },
        **event,
    }
    envelope = {
        "Type": "Notification",
        "MessageId": event_id or str(uuid.uuid4()),
        "TopicArn": "arn:aws:sns:eu-west-1:111122223333:relay-events",
        "Message": json.dumps(told),
        "Timestamp": "2025-01-15T10:31:00.000Z",
    }
    return json.dumps(envelope)


def opened(email_id: str, group_id: str, event_id: str = "") -> str:
    """An open."""
    told = {"timestamp": "2025-01-15T11:00:00.000Z", "userAgent": "a", "ipAddress": "192.0.2.1"}
    return notification("Open", email_id, group_id, event_id, open=told)


# -- help and words ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", parked.commands.values(), ids=lambda command: str(command.name))
def test_every_command_has_help_an_example_and_json(command: click.Command) -> None:
    assert f"Example: relayctl parked {command.name}" in (command.help or "")
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert all(option.help for option in options)
    assert any("--json" in option.opts for option in options)


def test_they_are_in_the_docs() -> None:
    assert list(parked.commands) == ["list", "show", "retry", "drop"]
    readme = (ROOT / "README.md").read_text()
    for name in parked.commands:
        assert f"### relayctl parked {name}\n" in reference(cli)
        assert f"`relayctl parked {name}" in readme


USAGE = [
    ("show",),
    ("show", "0"),
    ("show", "x"),
    ("retry",),
    ("retry", "1", "--all"),
    ("drop",),
    ("drop", "1", "--all"),
    ("drop", "1", "--json"),
    ("drop", "99999999999999999999"),
]


@pytest.mark.parametrize("command", USAGE, ids=" ".join)
def test_what_is_not_understood_exits_2(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["parked", *command])
    assert done.exit_code == 2
    assert "Usage: cli parked" in done.stderr


COMMANDS = [("list",), ("retry", "--all"), ("drop", "1", "--yes")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_nats(bus: Bus, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = Place(f"nats://127.0.0.1:{free_port()}", JetStream(bus), tmp_path).run(*command)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("relayctl: NATS at nats://127.0.0.1:")


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server without JetStream."""
    server = NatsServer(tmp_path_factory.mktemp("nats"), jetstream=False).start()
    yield server
    server.stop()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_jetstream(plain_server: NatsServer, bus: Bus, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = Place(plain_server.url, JetStream(bus), tmp_path).run(*command)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("relayctl: JetStream is not enabled")


# -- nothing is parked ------------------------------------------------------------------------------------------------
def test_nothing_is_parked_without_a_stream(empty: Place) -> None:
    for command in (("list",), ("list", "--json"), ("retry", "--all"), ("drop", "--all")):
        done = empty.run(*command)
        assert done.returncode == 0, command
        assert "nothing is parked" in done.stdout + done.stderr
    for command in (("show", "7"), ("retry", "7"), ("drop", "7", "--yes")):
        done = empty.run(*command)
        assert done.returncode == 1, command
        assert "relayctl: notification 7: not found" in done.stderr
    assert json.loads(empty.run("drop", "--all", "--yes", "--json").stdout) == {"dropped": 0, "not_found": []}


# -- list and show ----------------------------------------------------------------------------------------------------
def test_list(place: Place) -> None:
    place.park("{broken", "x" * 5000, '{"to":"someone@example.com"')
    place.park("y", reason="of someone@example.com it says\nnothing \x1b[31m", received_count=12)
    done = place.run("list")
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["NUMBER", "PARKED", "(UTC)", "TIMES", "BYTES", "WHY", "BEGINS"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"], "the newest last"
    assert lines[0].split() == ["1", "2026-11-22", "05:17", "3", "7", "no", "JSON", "{broken"]
    assert lines[1].split()[4] == "5,000"
    assert '{"to":"som****@example.com"' in lines[2]
    assert "of som****@example.com it says nothing" in lines[3]
    assert "someone@" not in done.stdout
    assert "\x1b" not in done.stdout


def test_list_as_json(place: Place) -> None:
    place.park('{"link":"https://example.org/u?to=someone%40example.com","again":"someone\\\\u0040example.com"')
    (line,) = place.run("list", "--json").stdout.splitlines()
    told = json.loads(line)
    assert told.pop("begins").count("som****@example.com") == 2
    assert told == {
        "number": 1,
        "parked_at": AT,
        "reason": "no JSON",
        "received_count": 3,
        "sqs_message_id": "sqs-1",
        "body_bytes": 92,
        "is_cut": False,
    }
    assert "someone" not in line


def test_many_are_listed_line_by_line(place: Place) -> None:
    place.park(*(f"body {number}" for number in range(2500)))
    lines = place.run("list").stdout.splitlines()
    assert len(lines) == 2501
    assert lines[-1].endswith("body 2499")


def test_show(place: Place) -> None:
    body = '{"to":"someone@example.com"\n\x1b[31m'
    place.park("other", body)
    done = place.run("show", "2")
    assert done.returncode == 0, done.stderr
    assert "sqs_message_id  sqs-2" in done.stdout
    assert "received        3 times" in done.stdout
    assert '{"to":"someone@example.com"\n\N{REPLACEMENT CHARACTER}[31m' in done.stdout
    told = json.loads(place.run("show", "2", "--json").stdout)
    assert (told["number"], told["body"], told["reason"]) == (2, body, "no JSON")
    assert place.run("show", "3").returncode == 1


# -- retry ------------------------------------------------------------------------------------------------------------
def test_retry_folds_what_can_be_folded(place: Place) -> None:
    # Given an event that an older Relay could not read, one that nobody can, and one that is too large
    (email_id,) = send_mails(place.jetstream, "spring", 1)
    place.park(opened(email_id, "spring"), "{broken", '"' * place.max_bytes)
    # When all are handled again
    done = place.run("retry", "--all")
    # Then the first counts and is parked no longer; the others stay, and it says why
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "1        folded into the record of its mail"
    assert lines[1].startswith("2        stays: cannot be read: ")
    assert lines[2] == "3        stays: only its beginning was kept"
    assert "relayctl: 1 handled, 2 not" in done.stderr
    assert place.numbers() == [2, 3]
    counts = Log(place.jetstream).counts(group_token("spring"))
    assert (counts["open"], counts["opened"]) == (1, 1)


def test_an_event_that_is_retried_twice_counts_once(place: Place) -> None:
    (email_id,) = send_mails(place.jetstream, "spring", 1)
    place.park(*[opened(email_id, "spring", "event-1")] * 2)
    done = place.run("retry", "1", "2", "2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1", "2"]
    assert place.numbers() == []
    entry = Bucket(place.jetstream, contract.RECIPIENTS_BUCKET).get(email_id)
    assert entry is not None
    assert json.loads(entry.value)["open_count"] == 1
    assert Log(place.jetstream).counts(group_token("spring"))["open"] == 1


def test_what_cannot_be_folded_yet_is_parked_again_and_not_lost(place: Place) -> None:
    # Given a mail whose record is broken
    (email_id,) = send_mails(place.jetstream, "spring", 1)
    put_records(place.jetstream, {email_id: b"{"})
    place.park(opened(email_id, "spring", "event-1"))
    # When it is retried at once, and again: within the duplicate window
    for number in (1, 2):
        done = place.run("retry", str(number), "--json")
        assert done.returncode == 1, done.stderr
        told = json.loads(done.stdout)
        assert (told["number"], told["outcome"], told["is_handled"]) == (number, "parked", False)
        assert place.numbers() == [number + 1]
    # Then it is there with its new reason, and once the record is mended it is folded
    found = place.parking.get(3)
    assert found is not None
    assert "record" in found.reason
    assert found.sqs_message_id == "sqs-1.1.2"
    put_records(place.jetstream, {email_id: json.dumps({"email_id": email_id, "group_id": "spring"}).encode()})
    assert place.run("retry", "--all").returncode == 0
    assert place.numbers() == []


def test_retry_of_a_number_that_is_not_there(place: Place) -> None:
    (email_id,) = send_mails(place.jetstream, "spring", 1)
    place.park(opened(email_id, "spring"))
    done = place.run("retry", "9", "1")
    assert done.returncode == 1
    assert "relayctl: notification 9: not found" in done.stderr
    assert "1 handled, 1 not" in done.stderr
    assert place.numbers() == []


def test_retry_of_what_anyone_may_have_published(place: Place) -> None:
    store(
        place.jetstream, [Publication(contract.PARKED_SUBJECT, each) for each in (b"", b"\xff", b"[]", b'{"body":1}')]
    )
    done = place.run("retry", "--all")
    assert done.returncode == 1
    assert place.numbers() == [1, 2, 3, 4]


def test_many_are_retried(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "spring", 150)
    place.park(*(opened(email_id, "spring") for email_id in email_ids))
    done = place.run("retry", "--all")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 150
    assert place.numbers() == []
    assert Log(place.jetstream).counts(group_token("spring"))["open"] == 150


# -- drop -------------------------------------------------------------------------------------------------------------
def test_drop_asks(place: Place) -> None:
    place.park("a", "b", "c")
    done = place.run("drop", "1", "3", typed="n\n")
    assert done.returncode == 1
    assert "Drop 2 parked notifications?" in done.stderr
    assert place.numbers() == [1, 2, 3]
    done = place.run("drop", "1", "3", typed="y\n")
    assert (done.returncode, done.stdout) == (0, "dropped: 2\n"), done.stderr
    assert place.numbers() == [2]


def test_drop_of_numbers_that_are_not_there(place: Place) -> None:
    place.park("a", "b")
    done = place.run("drop", "1", "7", "7", "--yes")
    assert done.returncode == 1
    assert done.stdout == "dropped: 1\n"
    assert done.stderr == "relayctl: notification 7: not found\n"
    assert json.loads(place.run("drop", "2", "8", "--yes", "--json").stdout) == {"dropped": 1, "not_found": [8]}


def test_drop_all(place: Place) -> None:
    place.park(*"abcde")
    assert place.run("drop", "--all", typed="y\n").stdout == "dropped: 5\n"
    assert place.numbers() == []
    assert place.run("drop", "--all").returncode == 0
