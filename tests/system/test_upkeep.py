"""relayctl buckets, events, export, repair and erase as real processes against a real nats-server."""

from __future__ import annotations

import csv
import json
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.bus.kv import Bucket
from relay.idempotency.claims import Claims, ClaimsConfig
from relay.tracking.export import COLUMNS
from relay.tracking.facts import Fact
from relay.tracking.groups import group_token
from relay.tracking.log import Log, fact_publication
from relay.tracking.record import rfc3339
from relay.tracking.storage import StorageConfig, ensure_storage, patiently
from tests.support.groups import SENT_AT, put_records, record_of, send_mails, store
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, clean_environment

LARGE = 10_000

NewServer = Callable[..., NatsServer]
NewBus = Callable[[str], Bus]


class Operator:
    """Someone with a terminal of 80 columns."""

    def __init__(self, nats_url: str, directory: Path) -> None:
        self.directory = directory
        settings = {"NATS_URL": nats_url, "RELAY_STATE_DIR": str(directory / "state"), "COLUMNS": "80"}
        self.environment = clean_environment(settings)

    def run(self, *arguments: str, typed: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs relayctl to its end; whatever it exits with, it never shows a traceback."""
        done = subprocess.run(
            [str(RELAYCTL), *arguments],
            env=self.environment,
            input=typed,
            capture_output="stdout" not in options,
            text=True,
            timeout=60,
            check=False,
            cwd=self.directory,
            **options,
        )
        assert "Traceback" not in (done.stderr or ""), done.stderr
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts relayctl."""
        return subprocess.Popen(
            [str(RELAYCTL), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
        )


class Place:
    """A server of a test's own, our own view of it, and an operator."""

    def __init__(self, server: NatsServer, jetstream: JetStream, operator: Operator) -> None:
        self.server = server
        self.jetstream = jetstream
        self.operator = operator


@pytest.fixture
def place(new_nats_server: NewServer, new_bus: NewBus, tmp_path: Path) -> Place:
    """With bucket and log."""
    server = new_nats_server()
    jetstream = JetStream(new_bus(server.url))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    return Place(server, jetstream, Operator(server.url, tmp_path))


@pytest.fixture
def operator_without_nats(tmp_path: Path) -> Operator:
    """Whose NATS is not there."""
    return Operator(f"nats://127.0.0.1:{free_port()}", tmp_path)


COMMANDS = [
    ("buckets",),
    ("events",),
    ("events", "-f"),
    ("export", "spring"),
    ("repair", "spring", "--dry-run"),
    ("repair", "--scan", "--yes"),
    ("erase", "id-1", "--yes"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_nats(operator_without_nats: Operator, command: tuple[str, ...]) -> None:
    done = operator_without_nats.run(*command)
    assert done.returncode == 1
    assert done.stderr.startswith("relayctl: NATS at nats://127.0.0.1:")
    assert done.stderr.endswith("cannot be reached (connection refused); start it, or set NATS_URL\n")


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server without JetStream."""
    server = NatsServer(tmp_path_factory.mktemp("nats"), jetstream=False).start()
    yield server
    server.stop()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_jetstream(plain_server: NatsServer, tmp_path: Path, command: tuple[str, ...]) -> None:
    done = Operator(plain_server.url, tmp_path).run(*command)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("relayctl: JetStream is not enabled on the NATS server; start it with -js")


def test_without_permission(new_nats_server: NewServer, tmp_path: Path) -> None:
    user = 'user: "w", password: "w", permissions: { publish: { deny: ["$JS.>"] } }'
    server = new_nats_server(config=f"authorization {{ users: [{{ {user} }}] }}")
    done = Operator(server.url.replace("//", "//w:w@"), tmp_path).run("buckets")
    assert done.returncode == 1
    assert done.stderr.startswith("relayctl: this user may not publish to $JS.API.STREAM.INFO.")
    assert done.stderr.endswith("; grant it in NATS\n")


# -- buckets ----------------------------------------------------------------------------------------------------------
def test_buckets(place: Place) -> None:
    send_mails(place.jetstream, "spring", 3)
    done = place.operator.run("buckets")
    assert done.returncode == 0, done.stderr
    assert "nothing is lacking" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    told = json.loads(place.operator.run("buckets", "--json").stdout)
    assert told["loses_data"] is False
    assert told["remarks"] == []
    by_name = {store["name"]: store for store in told["stores"]}
    assert list(by_name) == [
        contract.RECIPIENTS_BUCKET,
        contract.LOG_STREAM,
        contract.GROUP_INDEX_BUCKET,
        contract.REQUESTS_BUCKET,
        contract.PARKED_STREAM,
    ]
    log = by_name[contract.LOG_STREAM]
    assert (log["messages"], log["replicas"], log["storage"], log["ttl_seconds"]) == (3, 1, "file", 0)
    assert log["allow_direct"] is True
    assert log["made_by"].startswith("Relay ")
    assert [store["exists"] for store in told["stores"]] == [True, True, False, False, False]
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for field in log:
        assert f"`stores[].{field}`" in documented, field


def test_buckets_that_lose_data(place: Place) -> None:
    config = dict(place.jetstream.stream_info(contract.LOG_STREAM).config)
    place.jetstream.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config | {"max_msgs_per_subject": 10})
    done = place.operator.run("buckets")
    assert done.returncode == 1
    assert f"nats stream edit {contract.LOG_STREAM} --max-msgs-per-subject=-1 --force" in done.stdout
    check = place.operator.run("check")
    assert "counts end there; `relayctl buckets` says what to do" in " ".join(check.stdout.split())


# -- events -----------------------------------------------------------------------------------------------------------
def test_events(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "a group\x1b[2J", 2)
    store(place.jetstream, [fact_publication("other", Fact.OPEN, "id-1", SENT_AT, "e1")])
    lines = place.operator.run("events").stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["sent", "sent", "open"]
    assert lines[0] == f"2025-01-15 10:30:00 sent         {email_ids[0]} a group\ufffd[2J"
    only = place.operator.run("events", "--group", "other", "--json", "--since", "1d")
    assert json.loads(only.stdout) == {
        "sequence": 3,
        "at": SENT_AT,
        "fact": "open",
        "email_id": "id-1",
        "group_id": "other",
        "group_token": "other",
        "event_id": "e1",
    }
    none = place.operator.run("events", "--since", "0s")
    assert (none.returncode, none.stdout) == (0, "")
    assert "--since looks further back" in none.stderr
    unknown = place.operator.run("events", "--group", "nobody")
    assert (unknown.returncode, unknown.stderr) == (1, "relayctl: group nobody: not found in the log\n")
    assert place.operator.run("events", "--since", "yesterday").returncode == 2


def test_events_live_over_a_restart_until_ctrl_c(place: Place) -> None:
    process = place.operator.start("events", "-f", "--since", "1h", "--group", "live", "--json")
    try:
        assert process.stdout is not None
        before = send_mails(place.jetstream, "live", 2)
        assert [json.loads(process.stdout.readline())["email_id"] for _ in before] == before
        # When NATS restarts, and more is sent
        place.server.stop()
        place.server.start()
        patiently(lambda: place.jetstream.stream_info(contract.LOG_STREAM))
        after = send_mails(place.jetstream, "live", 2)
        send_mails(place.jetstream, "other", 1)
        # Then it is shown, each once, and Ctrl-C ends it cleanly
        assert [json.loads(process.stdout.readline())["email_id"] for _ in after] == after
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert (process.returncode, rest) == (0, ""), errors
    said = [line.partition(" (")[0] for line in errors.splitlines()]
    assert said == ["relayctl: NATS is away", "relayctl: NATS is back"]


HOSTILE_TIMES = [
    "0001-01-01T00:00:00+01:00",
    "9999-12-31T23:59:59-01:00",
    "0001-01-01T00:00:00Z",
    "2025-01-15T10:30:00.123456789+23:59",
    "\x1b[2J",
    "",
]


def test_times_that_anyone_may_have_published(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "spring", len(HOSTILE_TIMES))
    facts = [
        fact_publication("spring", Fact.OPENED, email_id, at)
        for email_id, at in zip(email_ids, HOSTILE_TIMES, strict=True)
    ]
    store(place.jetstream, [*facts, fact_publication(group_token("\ud800"), Fact.OPENED, "id-1", SENT_AT)])
    bucket = Bucket(place.jetstream, contract.RECIPIENTS_BUCKET)
    for email_id, at in zip(email_ids, HOSTILE_TIMES, strict=True):
        entry = bucket.get(email_id)
        assert entry is not None
        changed = {"sent_at": at, "opened": True, "open_count": 1, "last_opened_at": at}
        bucket.put(email_id, orjson.dumps(orjson.loads(entry.value) | changed))
    for form in ((), ("--json",)):
        done = place.operator.run("events", "--since", "0001-01-01T00:00:00+01:00", *form)
        assert (done.returncode, done.stdout.count("\n")) == (0, 2 * len(HOSTILE_TIMES) + 1), done.stderr
    shown = place.operator.run("events").stdout
    for time_shown in ("0001-01-01T00:00:00", "9999-12-31T23:59:59", "0001-01-01 00:00:00", "2025-01-14 10:31:00"):
        assert f"\n{time_shown} opened" in shown
    assert place.operator.run("export", "spring").stdout.count("\n") == len(HOSTILE_TIMES) + 1
    done = place.operator.run("repair", "spring", "--yes", "--min-age", "0")
    assert done.returncode == 0, done.stderr
    assert Log(place.jetstream).counts("spring")["open"] == len(HOSTILE_TIMES)


# -- export -----------------------------------------------------------------------------------------------------------
def test_export(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "spring", 250, '=HYPERLINK("http://example.org")')
    done = place.operator.run("export", "spring")
    header, *table = csv.reader(done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "relayctl: 250 records written\n")
    assert tuple(header) == COLUMNS
    assert [row[0] for row in table] == email_ids
    assert {row[3] for row in table} == {'\'=HYPERLINK("http://example.org")'}
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert ",".join(COLUMNS).replace(",", "`, `") in " ".join(documented.split())
    done = place.operator.run("export", "spring", "--format", "jsonl", "--output", "spring.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    path = place.operator.directory / "spring.jsonl"
    assert [orjson.loads(line)["email_id"] for line in path.read_bytes().splitlines()] == email_ids
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.with_name("spring.jsonl.part").exists()
    unknown = place.operator.run("export", "nobody", "--output", "nobody.csv")
    assert (unknown.returncode, unknown.stderr) == (1, "relayctl: group nobody: not found\n")
    assert not list(place.operator.directory.glob("nobody*"))
    for bad in (("--cursor", "x"), ("--output", "/dev/null"), ("--output", "/no/such/directory/x")):
        done = place.operator.run("export", "spring", *bad)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr


GOES_ON = "relayctl: to go on: relayctl "


def said(errors: str) -> list[str]:
    """The command that goes on, as a shell would read what it said."""
    (again,) = [line for line in errors.splitlines() if line.startswith(GOES_ON)]
    return shlex.split(again.removeprefix(GOES_ON))


def go_on(operator: Operator, errors: str) -> None:
    """Types the command that it said."""
    done = operator.run(*said(errors))
    assert done.returncode == 0, done.stderr


def wait_for_part(process: subprocess.Popen[str], part: Path, size_bytes: int) -> None:
    """Returns when the part has grown over a size."""
    deadline = time.monotonic() + 20
    while not part.exists() or part.stat().st_size < size_bytes:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stopped(operator: Operator, part: Path, number: signal.Signals, *arguments: str, size_bytes: int = 100_000) -> str:
    """Starts an export to a file and ends it on its way; what it said."""
    process = operator.start("export", *arguments)
    try:
        wait_for_part(process, part, size_bytes)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == (-number if number == signal.SIGKILL else 1), errors
    return errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("format_name", ["csv", "jsonl"])
def test_an_export_that_is_interrupted_goes_on(place: Place, format_name: str, number: signal.Signals) -> None:
    # Given what a whole export gives, of a group that looks like an option
    send_mails(place.jetstream, "-large", LARGE)
    command = ("--format", format_name, "--output")
    assert place.operator.run("export", *command, "whole", "--", "-large").returncode == 0
    whole = (place.operator.directory / "whole").read_bytes()
    # When one is ended on its way
    part = place.operator.directory / "cut.part"
    errors = stopped(place.operator, part, number, *command, "cut", "--", "-large")
    # Then there is no file, only a part that ends with a whole line
    assert "interrupted; what is there is not complete" in errors
    assert not (place.operator.directory / "cut").exists()
    kept = part.read_bytes()
    assert whole.startswith(kept)
    assert kept.endswith(b"\n")
    # And what it said leads to the same as a whole one
    assert said(errors)[-2:] == ["--", "-large"]
    go_on(place.operator, errors)
    assert (place.operator.directory / "cut").read_bytes() == whole
    assert not part.exists()


def test_an_export_that_goes_on_and_is_killed_goes_on_again(place: Place) -> None:
    # Given an export that was stopped and goes on
    send_mails(place.jetstream, "large", LARGE)
    whole = place.operator.run("export", "large").stdout
    part = place.operator.directory / "cut.part"
    errors = stopped(place.operator, part, signal.SIGINT, "large", "--output", "cut")
    # When that is killed, twice, so that nothing says how far it came
    for _ in range(2):
        more_bytes = part.stat().st_size + 100_000
        stopped(place.operator, part, signal.SIGKILL, *said(errors)[1:], size_bytes=more_bytes)
    # Then the same command leads to the same as a whole one
    go_on(place.operator, errors)
    assert (place.operator.directory / "cut").read_text() == whole


def test_an_export_goes_on_with_its_own_part_only(place: Place) -> None:
    send_mails(place.jetstream, "large", LARGE)
    part = place.operator.directory / "cut.part"
    errors = stopped(place.operator, part, signal.SIGINT, "large", "--output", "cut")
    # When the part is another one by now, the command is refused, and it stays
    kept = part.read_bytes()
    part.write_bytes(kept[:-1] + b" ")
    done = place.operator.run(*said(errors))
    assert done.returncode == 1
    assert "is not what it was when --cursor was said; leave out --cursor to begin anew" in done.stderr
    assert part.read_bytes() == kept[:-1] + b" "
    # And so is a cursor that says nothing of a file
    words = said(errors)
    cursor = words[words.index("--cursor") + 1]
    done = place.operator.run("export", "large", "--output", "cut", "--cursor", cursor.split(".")[0])
    assert (done.returncode, "of an export to standard output" in done.stderr) == (1, True)
    # But on standard output the rest may be had
    done = place.operator.run("export", "large", "--cursor", cursor)
    assert kept.decode() + done.stdout == place.operator.run("export", "large").stdout


def test_a_cursor_is_of_one_log(place: Place) -> None:
    # Given an export that was stopped
    email_ids = send_mails(place.jetstream, "large", LARGE)
    errors = stopped(place.operator, place.operator.directory / "cut.part", signal.SIGINT, "large", "--output", "cut")
    # When the log is made anew, in another order
    place.jetstream.api(f"STREAM.DELETE.{contract.LOG_STREAM}")
    assert ensure_storage(place.jetstream, StorageConfig()) == ""
    facts = [fact_publication("large", Fact.SENT, email_id, SENT_AT) for email_id in reversed(email_ids)]
    store(place.jetstream, facts)
    # Then the cursor is refused
    done = place.operator.run(*said(errors))
    assert done.returncode == 1
    assert done.stderr.startswith("relayctl: --cursor: invalid cursor; it is good for one group, as long as its log")


def test_two_exports_to_one_file(place: Place) -> None:
    send_mails(place.jetstream, "large", LARGE)
    process = place.operator.start("export", "large", "--output", "x")
    try:
        wait_for_part(process, place.operator.directory / "x.part", 1)
        process.send_signal(signal.SIGSTOP)
        second = place.operator.run("export", "large", "--output", "x")
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert (second.returncode, "another export is writing" in second.stderr) == (1, True), second.stderr
    assert process.returncode == 0, errors
    assert (place.operator.directory / "x").read_text().count("\n") == LARGE + 1


def test_an_export_to_a_full_disk_goes_on_elsewhere(place: Place) -> None:
    send_mails(place.jetstream, "large", 2000)
    whole = place.operator.run("export", "large").stdout
    limit = 200_000

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = place.operator.run("export", "large", "--output", "x.csv", preexec_fn=no_large_files)
    assert done.returncode == 1
    assert "file too large; what is there is not complete" in done.stderr
    assert not (place.operator.directory / "x.csv").exists()
    assert 0 < (place.operator.directory / "x.csv.part").stat().st_size <= limit
    go_on(place.operator, done.stderr)
    assert (place.operator.directory / "x.csv").read_text() == whole


def test_an_export_that_nobody_reads(place: Place) -> None:
    send_mails(place.jetstream, "large", 2000)
    process = place.operator.start("export", "large")
    assert process.stdout is not None
    assert process.stderr is not None
    header, first = process.stdout.readline(), process.stdout.readline()
    assert header.startswith('"email_id"')
    assert first, "behind the first piece there is a place to go on from"
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(20) == 1
    assert "broken pipe" in errors
    assert "--cursor" in errors
    assert "Exception" not in errors


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """The most memory that it had, as its own address space knows it: rusage also counts what forked it."""
    peak = 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        told = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("VmHWM"))])
    return peak


def test_an_exports_memory_does_not_grow_with_the_group(place: Place) -> None:
    used_bytes = {}
    for group_id, count in (("small", 500), ("large", LARGE)):
        send_mails(place.jetstream, group_id, count)
        process = place.operator.start("export", group_id, "--output", group_id)
        used_bytes[group_id] = peak_bytes(process)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
    assert used_bytes["small"] > 20_000_000, used_bytes
    # What is remembered of 10,000 mails is some 2 MB; their lines alone are 3 MB, their records 10 and more as objects
    assert used_bytes["large"] - used_bytes["small"] < 6_000_000, used_bytes


# -- repair -----------------------------------------------------------------------------------------------------------
def test_repair_shows_asks_and_mends(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "spring", 3)
    store(place.jetstream, [fact_publication("spring", Fact.FAILED, email_ids[0], SENT_AT)])
    command = ("repair", "spring", "--min-age", "0")
    wrong = {"sent": 3, "failed": 1}
    # When it is only looked, or the operator says no
    for arguments, typed, exit_code in ((("--dry-run",), "", 0), ((), "n\n", 1), ((), "", 1)):
        done = place.operator.run(*command, *arguments, typed=typed)
        assert done.returncode == exit_code, done.stderr
        assert f"surplus failed {email_ids[0]}" in done.stdout
        # Then nothing changes
        assert Log(place.jetstream).counts("spring") == wrong
    # And when the operator says yes, it is mended, and again there is nothing to do
    done = place.operator.run(*command, typed="y\n")
    assert done.returncode == 0, done.stderr
    assert "DELETED" in done.stdout
    assert Log(place.jetstream).counts("spring") == {"sent": 3}
    assert "nothing is missing and nothing is surplus" in place.operator.run(*command).stdout
    told = json.loads(place.operator.run("repair", "--scan", "--json", "--yes").stdout)
    assert (told["records"], told["facts"], told["missing"], told["surplus"]) == (3, 3, {}, {})
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for field in told:
        assert f"`{field}`" in documented, field


def test_repair_of_what_is_new_waits(place: Place) -> None:
    email_ids = send_mails(place.jetstream, "spring", 1)
    store(place.jetstream, [fact_publication("spring", Fact.FAILED, email_ids[0], SENT_AT)])
    done = place.operator.run("repair", "spring", "--yes")
    assert "left alone, as written just now: 1 mails" in done.stdout
    assert Log(place.jetstream).counts("spring") == {"sent": 1, "failed": 1}


def test_repair_says_what_it_could_not_delete(place: Place) -> None:
    (email_id,) = send_mails(place.jetstream, "spring", 1)
    store(place.jetstream, [fact_publication("spring", Fact.FAILED, email_id, SENT_AT)])
    put_records(place.jetstream, {"id-1": record_of("id-1", "spring")})
    config = dict(place.jetstream.stream_info(contract.LOG_STREAM).config) | {"deny_delete": True}
    place.jetstream.api(f"STREAM.UPDATE.{contract.LOG_STREAM}", config)
    done = place.operator.run("repair", "spring", "--yes", "--min-age", "0")
    assert done.returncode == 1
    assert done.stderr == (
        "relayctl: could not be deleted, and are still counted: 1 failed (JetStream: message delete not permitted)\n"
    )
    assert Log(place.jetstream).counts("spring") == {"sent": 2, "failed": 1}
    told = place.operator.run("repair", "spring", "--yes", "--min-age", "0", "--json")
    assert (told.returncode, json.loads(told.stdout)["undeleted"]) == (1, {"failed": 1})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repair_that_is_interrupted_says_what_it_did(place: Place, number: signal.Signals) -> None:
    # Given a repair on its way
    put_records(place.jetstream, {f"id-{n}": record_of(f"id-{n}", "spring") for n in range(5000)})
    process = place.operator.start("repair", "spring", "--yes", "--min-age", "0", "--json")
    try:
        deadline = time.monotonic() + 20
        while Log(place.jetstream).counts("spring").get("sent", 0) < 100:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
        # When it is ended
        process.send_signal(number)
        shown, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    # Then it says how far it came: but for the one in hand, exactly
    assert process.returncode == 1
    assert errors == "relayctl: stopped: interrupted; what was done by then stands above; run it again\n"
    told = json.loads(shown)
    assert told["stopped"] == "interrupted"
    appended = Log(place.jetstream).counts("spring")["sent"]
    assert 100 <= appended < 5000
    assert told["missing"]["sent"] in {appended - 1, appended}
    # And run again, it does the rest
    assert place.operator.run("repair", "spring", "--yes", "--min-age", "0").returncode == 0
    assert Log(place.jetstream).counts("spring") == {"sent": 5000}


def test_repair_of_a_mail_and_of_a_group_with_its_id(place: Place) -> None:
    put_records(place.jetstream, {"solo": record_of("solo", "solo")})
    alone = place.operator.run("repair", "solo", "--dry-run", "--min-age", "0").stdout
    assert "solo is a mail that was sent without a group; no other mail was looked at" in alone
    send_mails(place.jetstream, "solo", 1)
    both = place.operator.run("repair", "solo", "--yes", "--min-age", "0").stdout
    assert "2 records, 1 facts\nsolo is a group, and a mail that was sent without one: both were looked at" in both
    assert Log(place.jetstream).counts("-") == Log(place.jetstream).counts("solo") == {"sent": 1}


@pytest.mark.parametrize(
    "arguments", [(), ("spring", "--scan"), ("spring", "--json"), ("spring", "--min-age", "-1")], ids=" ".join
)
def test_repair_misunderstood(operator_without_nats: Operator, arguments: tuple[str, ...]) -> None:
    assert operator_without_nats.run("repair", *arguments).returncode == 2


def test_repair_of_no_such_group(place: Place) -> None:
    done = place.operator.run("repair", "nobody", "--dry-run")
    assert (done.returncode, done.stderr) == (1, "relayctl: group nobody: not found\n")


# -- erase ------------------------------------------------------------------------------------------------------------
def test_erase(place: Place) -> None:
    # Given a record in a bucket that keeps old values
    stream = f"KV_{contract.RECIPIENTS_BUCKET}"
    config = dict(place.jetstream.stream_info(stream).config)
    place.jetstream.api(f"STREAM.UPDATE.{stream}", config | {"max_msgs_per_subject": 5})
    email_id, other = send_mails(place.jetstream, "spring", 2)
    bucket = Bucket(place.jetstream, contract.RECIPIENTS_BUCKET)
    entry = bucket.get(email_id)
    assert entry is not None
    bucket.put(email_id, orjson.dumps(orjson.loads(entry.value) | {"open_count": 2, "opened": True}))
    # When the operator says no, nothing is erased
    done = place.operator.run("erase", email_id, typed="n\n")
    assert done.returncode == 1
    assert "Erase to, subject of mail" in done.stderr
    # When yes, it is, at once and everywhere, and once
    done = place.operator.run("erase", email_id, typed="y\n")
    assert (done.returncode, done.stdout) == (0, "erased: to, subject\n"), done.stderr
    entry = bucket.get(email_id)
    assert entry is not None
    record = orjson.loads(entry.value)
    assert (record["to"], record["subject"], record["open_count"]) == ("", "", 2)
    assert place.jetstream.count_by_subject(stream, f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}") == {
        f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}": 1
    }
    told = json.loads(place.operator.run("erase", email_id, "--yes", "--json").stdout)
    assert told == {"email_id": email_id, "erased_at": record["erased_at"], "fields": []}
    # And no other
    entry = bucket.get(other)
    assert entry is not None
    assert orjson.loads(entry.value)["to"] == "user@example.com"


def test_erase_says_where_a_reply_may_still_name_recipients(place: Place) -> None:
    claims = Claims(place.jetstream, ClaimsConfig(), "test")
    claims.start()
    bucket = Bucket(place.jetstream, contract.RECIPIENTS_BUCKET)
    now, (old, new) = time.time(), send_mails(place.jetstream, "spring", 2)
    for email_id, age_seconds in ((old, 25 * 3600), (new, 3600)):
        entry = bucket.get(email_id)
        assert entry is not None
        bucket.put(email_id, orjson.dumps(orjson.loads(entry.value) | {"sent_at": rfc3339(now - age_seconds)}))
    # One whose reply must be gone by now, and one whose reply may be there
    assert place.operator.run("erase", old, "--yes").stderr == ""
    done = place.operator.run("erase", new, "--yes")
    assert (done.returncode, done.stdout) == (0, "erased: to, subject\n")
    assert done.stderr.startswith(
        f"relayctl: until {rfc3339(now + 23 * 3600)} the bucket {contract.REQUESTS_BUCKET} may keep the reply"
    )


def put_history(jetstream: JetStream, email_id: str, **config: bool) -> str:
    """Lets the bucket keep five values of each record, and gives one more to this; its subject."""
    stream = f"KV_{contract.RECIPIENTS_BUCKET}"
    changed = {"max_msgs_per_subject": 5, **config}
    jetstream.api(f"STREAM.UPDATE.{stream}", dict(jetstream.stream_info(stream).config) | changed)
    bucket = Bucket(jetstream, contract.RECIPIENTS_BUCKET)
    entry = bucket.get(email_id)
    assert entry is not None
    bucket.put(email_id, orjson.dumps(orjson.loads(entry.value) | {"opened": True, "open_count": 1}))
    return f"$KV.{contract.RECIPIENTS_BUCKET}.{email_id}"


def test_erase_takes_old_values_away_in_the_same_write(
    new_nats_server: NewServer, new_bus: NewBus, tmp_path: Path
) -> None:
    # Given an operator who may not purge
    user = 'user: "w", password: "w", permissions: { publish: { deny: ["$JS.API.STREAM.PURGE.>"] } }'
    admin = 'user: "a", password: "a"'
    server = new_nats_server(config=f"authorization {{ users: [{{ {user} }}, {{ {admin} }}] }}")
    jetstream = JetStream(new_bus(server.url.replace("//", "//a:a@")))
    assert ensure_storage(jetstream, StorageConfig()) == ""
    (email_id,) = send_mails(jetstream, "spring", 1)
    nats_subject = put_history(jetstream, email_id)
    stream = f"KV_{contract.RECIPIENTS_BUCKET}"
    sequence = jetstream.last_sequence(stream)
    # When the mail is erased
    done = Operator(server.url.replace("//", "//w:w@"), tmp_path).run("erase", email_id, "--yes")
    # Then one write did it all
    assert (done.returncode, done.stdout) == (0, "erased: to, subject\n"), done.stderr
    assert jetstream.count_by_subject(stream, nats_subject) == {nats_subject: 1}
    assert jetstream.last_sequence(stream) == sequence + 1


def test_erase_where_a_write_cannot_roll_up(place: Place) -> None:
    (email_id, other) = send_mails(place.jetstream, "spring", 2)
    nats_subject = put_history(place.jetstream, email_id, allow_rollup_hdrs=False)
    stream = f"KV_{contract.RECIPIENTS_BUCKET}"
    assert place.operator.run("erase", email_id, "--yes").returncode == 0
    assert place.jetstream.count_by_subject(stream, nats_subject) == {nats_subject: 1}
    # And where nothing may be purged either, it is said, with a command that helps
    nats_subject = put_history(place.jetstream, other, allow_rollup_hdrs=False, deny_purge=True)
    done = place.operator.run("erase", other, "--yes")
    assert done.returncode == 1
    assert "erased, but the bucket keeps the record's old values: JetStream: stream purge not permitted" in done.stderr
    assert f"nats stream edit {stream} --max-msgs-per-subject=1 --force" in done.stderr
    config = dict(place.jetstream.stream_info(stream).config) | {"max_msgs_per_subject": 1}
    place.jetstream.api(f"STREAM.UPDATE.{stream}", config)
    assert place.jetstream.count_by_subject(stream, nats_subject) == {nats_subject: 1}


def test_erase_of_a_broken_record_says_what_to_type(place: Place) -> None:
    put_records(place.jetstream, {"-x": b"broken"})
    done = place.operator.run("erase", "--yes", "--", "-x")
    assert done.stderr.endswith("take it away with nats kv del email-recipients -- -x\n")


@pytest.mark.parametrize("email_id", ["*", ">", "a.b", "x" * 65, "no-such-mail"])
def test_erase_takes_one_mail_only(place: Place, email_id: str) -> None:
    send_mails(place.jetstream, "spring", 2)
    before = place.jetstream.last_sequence(f"KV_{contract.RECIPIENTS_BUCKET}")
    done = place.operator.run("erase", email_id, "--yes")
    assert (done.returncode, done.stderr) == (1, f"relayctl: mail {email_id}: not found\n")
    assert place.jetstream.last_sequence(f"KV_{contract.RECIPIENTS_BUCKET}") == before
