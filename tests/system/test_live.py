"""What an operator changes of a relay that runs: restart, scale, reload, stop; under load, wrongly, and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from relay.ops import rolling
from relay.ops.arrangement import read_arrangement
from relay.ops.orders import read_settings
from tests.support.caller import GET_EMAIL_STATUS, ask, send, under_load
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, CatchingServer, RelayProcess, clean_environment
from tests.support.scripted_smtp import stall
from tests.support.workers import SmtpThread

NewRelay = Callable[..., RelayProcess]


def pids(relay: RelayProcess) -> dict[str, int]:
    """Of every program."""
    return {status.name: status.pid for status in relay.supervision.statuses()}


def ready_send_workers(relay: RelayProcess) -> int:
    return sum(each.is_ready and each.name.startswith("send-") for each in relay.supervision.statuses())


@contextmanager
def least_ready(relay: RelayProcess) -> Iterator[list[int]]:
    """Meanwhile looks at how many send workers are ready."""
    seen: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.05):
            seen.append(ready_send_workers(relay))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def wait_until(is_so: Callable[[], Any], timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begin(relay: RelayProcess, *arguments: str) -> subprocess.Popen[str]:
    """Begins a command and does not wait for it."""
    return subprocess.Popen(
        [str(RELAYCTL), *arguments],
        env=clean_environment(relay.settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask_beside(
    relay: RelayProcess, mails: int, replies: list[dict[str, Any]], timeout_seconds: float = 20
) -> list[threading.Thread]:
    """Sends so many mails in threads of their own; a request that gets no reply leaves none."""

    def send_one() -> None:
        with suppress(nats.errors.Error):
            replies.append(send(relay.nats_url, timeout_seconds))

    threads = [threading.Thread(target=send_one) for _ in range(mails)]
    for each in threads:
        each.start()
    return threads


@contextmanager
def stalled_dot() -> Iterator[SmtpThread]:
    """A smarthost that takes everything and never answers the final dot."""
    server = SmtpThread({"dot": stall()})
    try:
        yield server
    finally:
        server.stop()


# -- restart -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_under_load_loses_nothing(new_relay: NewRelay, smtp: CatchingServer, workers: int) -> None:
    relay = new_relay(RELAY_SEND_WORKERS=str(workers), TRACKING_ACK_SECONDS="10")
    relay.start()
    before, caught_before = pids(relay), smtp.count()
    done: list[subprocess.CompletedProcess[str]] = []

    restarting = threading.Thread(target=lambda: done.append(relay.relayctl("restart")))
    is_over = threading.Event()

    def restart() -> None:
        restarting.start()
        threading.Thread(target=lambda: (restarting.join(), is_over.set())).start()

    replies = timed_out = 0
    with least_ready(relay) as seen:
        load = under_load(relay.nats_url, callers=10, seconds=1, during=restart, after_seconds=0.3)
        while not is_over.is_set():
            replies, timed_out = replies + len(load.replies), timed_out + load.timed_out
            assert all(reply.get("email_id") for reply in load.replies)
            load = under_load(relay.nats_url, callers=10, seconds=1, during=lambda: None, after_seconds=0)
        replies, timed_out = replies + len(load.replies), timed_out + load.timed_out
    assert done[0].returncode == 0, done[0].stderr
    assert min(seen) >= max(1, workers - 1)
    assert timed_out == 0, "none without a reply, and none that found nobody"
    assert smtp.count() - caught_before == replies, "no mail is lost or doubled"
    after = pids(relay)
    assert after.keys() == before.keys(), "no substitute is left"
    assert not set(after.values()) & set(before.values())
    for name in before:
        assert f"{name:<12} ready in" in done[0].stdout


def test_one_program_alone(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    before = pids(relay)
    done = relay.relayctl("restart", "status", "--json")
    assert done.returncode == 0, done.stderr
    after = pids(relay)
    assert [name for name in before if before[name] != after[name]] == ["status"]
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(step["program"], step["what"]) for step in steps if step["program"] == "status"] == [
        ("status", "draining"),
        ("status", "drained"),
        ("status", "ready"),
    ]
    unknown = relay.relayctl("restart", "send-9")
    assert unknown.returncode == 1
    assert "there is no program send-9; there are send-1, send-2, status" in unknown.stderr


def test_where_a_new_worker_does_not_become_ready_none_is_touched(
    new_relay: NewRelay, tmp_path: Path, nats_server: NatsServer
) -> None:
    server = CatchingServer(tmp_path)
    relay = new_relay(smtp_port=server.port)
    relay.start()
    before = pids(relay)
    server.stop()
    done = relay.relayctl("restart", "--timeout", "3")
    assert done.returncode == 1
    assert "send-extra did not become ready" in done.stderr
    assert "waiting for the smarthost" in done.stderr, "the last lines of its log"
    assert pids(relay) == before
    # Nor is one waited for that somebody else takes away
    command = begin(relay, "restart")
    wait_until(lambda: relay.supervision.states().get("send-extra") == "RUNNING")
    relay.supervision.ask_to_stop("send-extra")
    wait_until(lambda: relay.supervision.remove("send-extra"))
    assert "send-extra was taken away" in command.communicate(timeout=20)[1]
    assert command.returncode == 1
    assert {name: pids(relay)[name] for name in before} == before
    again = CatchingServer(tmp_path, server.port)
    try:
        assert relay.relayctl("restart").returncode == 0
        assert send(nats_server.url)["email_id"]
    finally:
        again.stop()


def test_interrupted_it_leaves_nothing_stopped_and_can_be_said_again(new_relay: NewRelay) -> None:
    with stalled_dot() as server:
        relay = new_relay(smtp_port=server.port, DRAIN_SECONDS="3", SEND_TIMEOUT_SECONDS="60")
        relay.start()
        before = pids(relay)
        replies: list[dict[str, Any]] = []
        asking = ask_beside(relay, 12, replies, timeout_seconds=60)  # so many that each worker has some
        wait_until(lambda: len(server.mails) == 12)
        # When somebody presses Ctrl-C while one drains
        command = begin(relay, "restart")
        wait_until(lambda: relay.supervision.states().get("send-1") == "STOPPING")
        refused = relay.relayctl("scale", "3")
        assert refused.returncode == 1
        assert f"`relayctl restart` (pid {command.pid}) is at work" in refused.stderr
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=30)
        # Then that one is there again, and the other was not touched
        assert command.returncode == 1
        assert "interrupted" in stderr
        relay.wait_until_ready("send-1", other_pid_than=before["send-1"], timeout_seconds=20)
        assert relay.program("send-2").pid == before["send-2"]
        # And when relayctl itself is killed in the middle, the next command takes up what it left
        asking += ask_beside(relay, 12, replies, timeout_seconds=60)
        wait_until(lambda: len(server.mails) == 24)
        command = begin(relay, "restart", "send-1", "send-2")
        wait_until(lambda: relay.supervision.states().get("send-1") == "STOPPING")
        command.kill()
        command.communicate(timeout=10)
        done = relay.relayctl("scale", "2")
        assert done.returncode == 0, done.stderr
        assert ready_send_workers(relay) == 2
        assert sorted(pids(relay)) == ["send-1", "send-2", "status"]
        assert relay.relayctl("stop").returncode == 0
        for each in asking:
            each.join()
        assert [reply["outcome"] for reply in replies] == ["in_doubt"] * 24


def test_a_substitute_that_stands_in_is_left_to_serve(new_relay: NewRelay, tmp_path: Path) -> None:
    server = CatchingServer(tmp_path)
    relay = new_relay(smtp_port=server.port, RELAY_SEND_WORKERS="1")
    relay.start()
    before = pids(relay)
    # When the smarthost goes away before the only worker's turn comes
    command = begin(relay, "restart", "--timeout", "5")
    wait_until(lambda: "send-extra" in relay.supervision.states() and relay.program("send-extra").is_ready)
    server.stop()
    command.communicate(timeout=60)
    assert command.returncode == 1
    stands_in = pids(relay)["send-extra"]
    # Then who serves instead of it goes on, also when that is said again
    assert relay.relayctl("restart", "--timeout", "3").returncode == 1
    assert pids(relay)["send-extra"] == stands_in
    again = CatchingServer(tmp_path, server.port)
    try:
        wait_until(lambda: relay.program("send-1").is_ready)
        assert relay.relayctl("restart").returncode == 0
        assert pids(relay).keys() == before.keys()
    finally:
        again.stop()


def test_nobody_has_to_read_what_it_says(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    before = pids(relay)

    def begin_unheard() -> subprocess.Popen[str]:
        command = begin(relay, "restart")
        for stream in (command.stdout, command.stderr):
            assert stream is not None
            stream.close()
        return command

    # A pipe that is closed
    begin_unheard().wait(timeout=60)
    after = pids(relay)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    # A terminal that is closed in the middle
    command = begin_unheard()
    wait_until(lambda: "send-extra" in relay.supervision.states())
    command.send_signal(signal.SIGHUP)
    assert command.wait(timeout=60) != 0
    assert pids(relay).keys() == before.keys(), "nothing is left stopped, and no substitute"


# -- scale ---------------------------------------------------------------------------------------


def test_scaling_touches_nobody_else(new_relay: NewRelay, smtp: CatchingServer) -> None:
    relay = new_relay(TRACKING_ACK_SECONDS="10", SMTP_MAX_RECIPIENTS_PER_SECOND="1000")
    relay.start()
    first, caught_before = pids(relay), smtp.count()
    outputs: list[str] = []

    def scale() -> None:
        for count in ("4", "1"):
            done = relay.relayctl("scale", count)
            outputs.append(done.stdout + done.stderr)
            told = {name: pid for name, pid in pids(relay).items() if name.startswith("send-")}
            assert len(told) == int(count)
            outputs.append(str(told["send-1"]))

    scaling = threading.Thread(target=scale)
    load = under_load(relay.nats_url, callers=10, seconds=6, during=scaling.start, after_seconds=0.3)
    scaling.join()
    assert load.timed_out == 0
    assert all(reply.get("email_id") for reply in load.replies)
    assert smtp.count() - caught_before == len(load.replies)
    assert "4 send workers now, 2 before; the next `relayctl start` takes RELAY_SEND_WORKERS (2) again" in outputs[0]
    assert outputs[1] == outputs[3] == str(first["send-1"])
    assert pids(relay) == {name: first[name] for name in ("send-1", "status")}
    told = [line["msg"] for line in relay.log("send-1") if "share the sending rate" in line["msg"]]
    assert told == [
        "4 send workers share the sending rate now, 2 before",
        "1 send workers share the sending rate now, 4 before",
    ]
    report = relay.program("send-1").report
    assert report is not None
    assert report.send_workers == 1
    again = relay.relayctl("scale", "1")
    assert (again.returncode, "1 send worker already" in again.stdout) == (0, True)
    for bad in ("0", "65", "-1", "many"):
        assert relay.relayctl("scale", "--", bad).returncode == 2


def test_added_workers_that_do_not_work_are_taken_away_again(new_relay: NewRelay, tmp_path: Path) -> None:
    server = CatchingServer(tmp_path)
    relay = new_relay(smtp_port=server.port)
    relay.start()
    before = pids(relay)
    server.stop()
    done = relay.relayctl("scale", "3", "--timeout", "3")
    assert done.returncode == 1
    assert "send-3 did not become ready" in done.stderr
    assert pids(relay) == before
    assert read_arrangement(relay.state_dir).send_workers == 2
    # Nor does a reload forget that more were wanted
    relay.settings["RELAY_SEND_WORKERS"] = "3"
    assert relay.relayctl("reload", "--timeout", "3").returncode == 1
    again = CatchingServer(tmp_path, server.port)
    try:
        done = relay.relayctl("reload")
        assert done.returncode == 0, done.stderr
        assert ready_send_workers(relay) == 3
    finally:
        again.stop()


def test_who_still_drains_for_a_command_that_was_killed_is_waited_for(
    new_relay: NewRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling, "STOP_MARGIN_SECONDS", 0.5)
    with stalled_dot() as server:
        relay = new_relay(smtp_port=server.port, DRAIN_SECONDS="4", SEND_TIMEOUT_SECONDS="60")
        relay.start()
        replies: list[dict[str, Any]] = []
        asking = ask_beside(relay, 12, replies, timeout_seconds=60)
        wait_until(lambda: len(server.mails) == 12)
        command = begin(relay, "scale", "1")
        wait_until(lambda: relay.supervision.states()["send-2"] == "STOPPING")
        command.kill()
        command.communicate(timeout=10)
        rolling.Rolling(relay.supervision, lambda step: None, 20).mend()
        assert sorted(pids(relay)) == ["send-1", "status"]
        relay.stop()
        for each in asking:
            each.join()
        assert [reply["outcome"] for reply in replies] == ["in_doubt"] * 12


# -- reload --------------------------------------------------------------------------------------


def test_a_reload_reaches_every_worker_also_one_that_is_killed_later(new_relay: NewRelay) -> None:
    relay = new_relay(DEFAULT_SMTP_FROM_DISPLAY_NAME="Before", SMTP_PASSWORD="hunter2")
    relay.start()
    assert relay.relayctl("scale", "1").returncode == 0
    before = pids(relay)
    unchanged = relay.relayctl("reload")
    assert (unchanged.returncode, unchanged.stdout) == (
        0,
        "nothing has changed; `relayctl restart` restarts all the same\n",
    )
    relay.settings |= {"LOG_LEVEL": "debug", "SMTP_PASSWORD": "hunter3", "DRAIN_SECONDS": "7", "PORT": str(free_port())}
    done = relay.relayctl("reload")
    assert done.returncode == 0, done.stderr
    assert "DRAIN_SECONDS: not set → 7" in done.stdout
    assert "SMTP_PASSWORD (a secret) changes" in done.stdout
    assert "hunter" not in done.stdout + done.stderr
    after = pids(relay)
    assert after.keys() == before.keys(), "the number of send workers holds"
    assert not set(after.values()) & set(before.values())
    assert relay.supervision.started()["drain_seconds"] == 7
    assert f"port {relay.settings['PORT']}" in relay.relayctl("status").stdout
    # supervisord waits for as long as they may drain, and restarts them with what they have now
    assert {each.stop_wait_seconds for each in read_arrangement(relay.state_dir).programs.values()} == {18}
    os.kill(after["send-1"], signal.SIGKILL)
    relay.wait_until_ready("send-1", other_pid_than=after["send-1"], timeout_seconds=20)
    environment = read_settings(Path(read_arrangement(relay.state_dir).programs["send-1"].settings))
    assert environment["SMTP_PASSWORD"] == "hunter3"
    assert environment["LOG_LEVEL"] == "debug"
    assert sum(line["msg"] == "ready" for line in relay.log("send-1")) >= 3
    assert len(list((relay.state_dir / "settings").iterdir())) == 1, "no older password is kept"
    assert {path.stat().st_mode & 0o077 for path in (relay.state_dir / "settings").iterdir()} == {0}
    # And a changed number of workers scales
    relay.settings["RELAY_SEND_WORKERS"] = "3"
    assert relay.relayctl("reload").returncode == 0
    assert ready_send_workers(relay) == 3
    assert relay.program("status").pid == after["status"], "whom it does not concern goes on"


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"EMAIL_ENABLED": "yes", "SMTP_PORT": "x"}, 78, "2 settings are wrong"),
        ({"SMTP_HOST": ""}, 1, "send-extra did not become ready"),
        ({"PORT": "taken"}, 1, "end what listens there, or set PORT"),
    ],
)
def test_settings_that_do_not_work_change_nothing(
    new_relay: NewRelay, settings: dict[str, str], code: int, said: str, nats_server: NatsServer
) -> None:
    relay = new_relay()
    relay.start()
    before = pids(relay)
    if "SMTP_HOST" in settings:
        settings = {"SMTP_PORT": str(free_port())}
    if "PORT" in settings:
        settings = {"PORT": str(nats_server.port)}
    good = dict(relay.settings)
    relay.settings |= settings
    done = relay.relayctl("reload", "--timeout", "3")
    assert done.returncode == code
    assert said in done.stderr
    relay.settings.clear()
    relay.settings |= good
    assert pids(relay) == before
    assert relay.relayctl("reload").stdout.startswith("nothing has changed")
    os.kill(before["send-1"], signal.SIGKILL)
    relay.wait_until_ready("send-1", other_pid_than=before["send-1"], timeout_seconds=20)
    assert send(nats_server.url)["email_id"]


def test_what_a_shell_does_not_mention_is_not_unset(new_relay: NewRelay, tmp_path: Path) -> None:
    relay = new_relay()
    relay.start()
    before = pids(relay)
    good = dict(relay.settings)
    for name in ("EMAIL_ENABLED", "SMTP_HOST"):
        del relay.settings[name]
    refused = relay.relayctl("reload")
    assert refused.returncode == 1
    assert "EMAIL_ENABLED, SMTP_HOST, and this environment does not mention them" in refused.stderr
    assert pids(relay) == before
    # A file mentions them
    (tmp_path / "relay.env").write_text("EMAIL_ENABLED=true\nSMTP_HOST=127.0.0.1\n")
    assert "nothing has changed" in relay.relayctl("--env-file", str(tmp_path / "relay.env"), "reload").stdout
    # And it is possible to mean it
    relay.settings |= good | {"EMAIL_ENABLED": ""}
    done = relay.relayctl("reload")
    assert done.returncode == 0, done.stderr
    assert "EMAIL_ENABLED: true → not set" in done.stdout
    assert send(relay.nats_url)["email_id"] == ""


def test_a_worker_that_the_new_settings_break_gets_its_old_ones_back(new_relay: NewRelay) -> None:
    relay = new_relay(RELAY_HTTP_HOST="127.0.0.1")
    relay.start()
    before = pids(relay)
    good = dict(relay.settings)
    relay.settings["RELAY_HTTP_HOST"] = "192.0.2.1"  # nobody has that address: the health page cannot be served there
    done = relay.relayctl("reload")
    assert done.returncode == 1
    assert "status did not become ready: port" in done.stderr
    assert "status       put back" in done.stdout
    after = pids(relay)
    assert {name: after[name] for name in ("send-1", "send-2")} == {name: before[name] for name in ("send-1", "send-2")}
    assert relay.program("status").is_ready
    relay.settings.clear()
    relay.settings |= good
    assert relay.relayctl("reload").stdout.startswith("nothing has changed")


def test_a_reload_that_was_interrupted_goes_on_from_there(new_relay: NewRelay) -> None:
    with stalled_dot() as server:
        relay = new_relay(smtp_port=server.port, DRAIN_SECONDS="3", SEND_TIMEOUT_SECONDS="60")
        relay.start()
        before = pids(relay)
        asking = ask_beside(relay, 12, [], timeout_seconds=60)  # so many that each worker has some
        wait_until(lambda: len(server.mails) == 12)
        relay.settings["PORT"] = str(free_port())
        command = begin(relay, "reload")
        wait_until(lambda: relay.supervision.states().get("send-1") == "STOPPING")
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=30)
        assert command.returncode == 1
        half = pids(relay)
        assert half["status"] != before["status"], "it has the new port already"
        assert half["send-2"] == before["send-2"]
        done = relay.relayctl("reload")
        assert done.returncode == 0, done.stderr
        after = pids(relay)
        assert after["status"] == half["status"]
        assert after["send-2"] != half["send-2"]
        assert f"port {relay.settings['PORT']}" in relay.relayctl("status").stdout
        for each in asking:
            each.join()


def test_the_development_stack_is_left_alone_and_its_ports_stay(new_relay: NewRelay) -> None:
    relay = new_relay(nats_url=f"nats://127.0.0.1:{free_port()}", smtp_port=free_port())
    relay.start("--dev")
    before = pids(relay)
    assert relay.relayctl("restart").returncode == 0
    after = pids(relay)
    assert [name for name in before if before[name] == after[name]] == ["nats", "catcher"]
    relay.settings["SMTP_PORT"] = str(free_port())
    refused = relay.relayctl("reload")
    assert refused.returncode == 1
    assert "cannot change while they run" in refused.stderr
    assert pids(relay) == after


# -- in the foreground, as in a container ----------------------------------------------------------


def test_in_the_foreground_a_restart_ends_nothing(new_relay: NewRelay) -> None:
    relay = new_relay()
    foreground = begin(relay, "start", "--foreground")
    try:
        wait_until(
            lambda: relay.supervision.is_running() and all(each.is_ready for each in relay.supervision.statuses())
        )
        done = relay.relayctl("restart")
        assert done.returncode == 0, done.stderr
        relay.settings["RELAY_HTTP_HOST"] = "192.0.2.1"
        assert relay.relayctl("reload").returncode == 1, "a worker exits 78 and is put back"
        for _ in range(3):  # supervisord says EXITED of it until it starts it again, for up to a second
            pid = relay.program("send-1").pid
            os.kill(pid, signal.SIGKILL)
            relay.wait_until_ready("send-1", other_pid_than=pid, timeout_seconds=20)
        assert send(relay.nats_url)["email_id"]
        assert foreground.poll() is None
    finally:
        foreground.send_signal(signal.SIGTERM)
        output = foreground.communicate(timeout=30)[0]
    assert foreground.returncode == 0, output


# -- stop ------------------------------------------------------------------------------------------


def test_what_a_shorter_drain_cuts_is_in_doubt_recorded_and_logged(new_relay: NewRelay) -> None:
    with stalled_dot() as server:
        relay = new_relay(smtp_port=server.port, DRAIN_SECONDS="60")
        relay.start()
        lost: list[dict[str, Any]] = []
        asking = ask_beside(relay, 4, lost, timeout_seconds=8)
        wait_until(lambda: len(server.mails) == 4)
        in_vain = relay.relayctl("stop", "--timeout", "0.5")
        assert in_vain.returncode == 1
        assert "still running after 0.5 s: supervisord pid" in in_vain.stderr
        assert "send-1 pid" in in_vain.stderr
        killed = relay.relayctl("stop", "--timeout", "0.5", "--kill")
        assert killed.returncode == 0
        assert "killed: supervisord, send-1, send-2" in killed.stdout
        assert relay.supervision.orphans() == {}
        assert not lost, "what was in flight is lost"
        # Told beforehand, they end in order
        relay.start()
        replies: list[dict[str, Any]] = []
        asking += ask_beside(relay, 4, replies)
        wait_until(lambda: len(server.mails) == 8)
        begun = time.monotonic()
        stopped = relay.relayctl("stop", "--drain", "1")
        assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
        assert time.monotonic() - begun < 12
        for each in asking:
            each.join()
        assert [reply["outcome"] for reply in replies] == ["in_doubt"] * 4
        logged = [line for name in ("send-1", "send-2") for line in relay.log(name) if line["level"] == "warn"]
        for reply in replies:
            assert any(line.get("email_id") == reply["email_id"] for line in logged), logged
    # The next relay drains for as long as it is set, and has their records
    server = SmtpThread()
    try:
        relay.settings["SMTP_PORT"] = str(server.port)
        relay.start()
        assert not (relay.state_dir / "drain.json").exists()
        for reply in replies:
            assert ask(relay.nats_url, GET_EMAIL_STATUS, {"email_id": reply["email_id"]})["outcome"] == "in_doubt"
    finally:
        server.stop()


def test_a_second_stop_cuts_nothing_short_without_a_supervisord_either(new_relay: NewRelay) -> None:
    with stalled_dot() as server:
        relay = new_relay(smtp_port=server.port, DRAIN_SECONDS="4", SEND_TIMEOUT_SECONDS="60")
        relay.start()
        replies: list[dict[str, Any]] = []
        asking = ask_beside(relay, 4, replies)
        wait_until(lambda: len(server.mails) == 4)
        os.kill(int((relay.state_dir / "supervisord.pid").read_text()), signal.SIGKILL)
        wait_until(lambda: not relay.supervision.is_running())
        assert relay.relayctl("stop", "--timeout", "1").returncode == 1
        done = relay.relayctl("stop")
        assert (done.returncode, done.stdout) == (0, "stopped\n")
        for each in asking:
            each.join()
        assert [reply["outcome"] for reply in replies] == ["in_doubt"] * 4
