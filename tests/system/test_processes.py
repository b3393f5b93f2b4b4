"""The life of the processes: killed, stopped, started wrongly, without what they need."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from relay.ops.presence import read_presence
from relay.ops.process import SHUTDOWN_MARGIN_SECONDS
from tests.support.caller import send, under_load
from tests.support.nats_server import NatsServer, free_port, wait_for_port
from tests.support.relay_process import CatchingServer, RelayProcess, Worker

NewRelay = Callable[..., RelayProcess]
NewServer = Callable[..., NatsServer]

BACK_WITHIN_SECONDS = 3.0


@pytest.fixture
def stalling_smtp() -> Iterator[int]:
    """The port of an SMTP server that takes everything and never answers the final dot."""

    class Stalling:
        async def handle_DATA(self, *_: object) -> str:
            await asyncio.sleep(60)
            return "451 too late"

    controller = Controller(Stalling(), hostname="127.0.0.1", port=free_port())
    controller.start()
    yield controller.port
    controller.stop()


def test_a_killed_worker_comes_back_and_the_others_go_on(new_relay: NewRelay) -> None:
    relay = new_relay(RELAY_SEND_WORKERS="3")
    relay.start()
    victim = relay.program("send-2")
    others = {name: relay.program(name).pid for name in ("send-1", "send-3", "status")}
    back: list[float] = []

    def kill() -> None:
        os.kill(victim.pid, signal.SIGKILL)
        watch.start()

    def watch_for_return() -> None:
        back.append(relay.wait_until_ready("send-2", other_pid_than=victim.pid, timeout_seconds=10))

    watch = threading.Thread(target=watch_for_return)
    load = under_load(relay.nats_url, callers=20, seconds=4, during=kill, after_seconds=1, timeout_seconds=2)
    watch.join()
    assert back[0] <= BACK_WITHIN_SECONDS
    assert {name: relay.program(name).pid for name in others} == others
    assert len(load.replies) > 500
    assert all(reply.get("email_id") for reply in load.replies)
    assert load.timed_out <= 20, "only what was in flight in the killed process may be lost"
    assert any(1.0 < at < 2.0 for at in load.seconds_at_reply), "mail goes on while it is away"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_answers_what_is_in_flight(
    new_relay: NewRelay, smtp: CatchingServer, number: signal.Signals
) -> None:
    relay = new_relay()
    relay.start()
    caught_before = smtp.count()

    def stop_one() -> None:
        os.kill(stopped.pid, number)

    stopped = relay.program("send-1")
    load = under_load(relay.nats_url, callers=50, seconds=2, during=stop_one, after_seconds=0.7)
    assert load.timed_out == 0, "every request got its reply"
    assert len(load.replies) > 500
    assert all(reply.get("email_id") for reply in load.replies)
    assert smtp.count() - caught_before == len(load.replies), "no mail is lost or doubled"
    assert "stopped" in [line["msg"] for line in relay.log("send-1")]
    relay.wait_until_ready("send-1", other_pid_than=stopped.pid, timeout_seconds=10)


def test_signals_without_a_meaning_end_nothing(new_relay: NewRelay) -> None:
    worker = Worker("send", new_relay(DRAIN_SECONDS="1").settings)
    try:
        deadline = time.monotonic() + 20
        while (report := read_presence(worker.state_dir, "send", worker.process.pid)) is None or report.reason:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            worker.process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                worker.process.wait(0.5)
        worker.process.send_signal(signal.SIGHUP)
        worker.process.send_signal(signal.SIGHUP)  # unlike a second SIGTERM
        worker.output()
        assert worker.process.returncode == 0
    finally:
        worker.end()


def test_what_the_drain_deadline_cuts_is_in_doubt_and_answered(new_relay: NewRelay, stalling_smtp: int) -> None:
    # Given 8 mails whose final dot is never answered
    relay = new_relay(smtp_port=stalling_smtp, DRAIN_SECONDS="1", RELAY_SEND_WORKERS="2")
    relay.start()
    stopped: list[float] = []

    def stop_all() -> None:
        begun = time.monotonic()
        assert relay.relayctl("stop").returncode == 0
        stopped.append(time.monotonic() - begun)

    # When the relay is stopped
    stopping = threading.Thread(target=stop_all)
    load = under_load(
        relay.nats_url, callers=8, seconds=0.5, during=stopping.start, after_seconds=0.4, timeout_seconds=20
    )
    stopping.join()
    # Then each caller is told, and the workers drained side by side
    assert [reply["outcome"] for reply in load.replies] == ["in_doubt"] * 8
    assert load.timed_out == 0
    assert stopped[0] < 8


def test_stopping_ends_also_when_nats_is_frozen(new_relay: NewRelay, new_nats_server: NewServer) -> None:
    server = new_nats_server()
    worker = Worker("send", new_relay(nats_url=server.url, DRAIN_SECONDS="1").settings)
    assert server.process is not None
    try:
        deadline = time.monotonic() + 20
        while (report := read_presence(worker.state_dir, "send", worker.process.pid)) is None or report.reason:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        worker.output()
        assert time.monotonic() - begun < 1 + SHUTDOWN_MARGIN_SECONDS
        assert worker.process.returncode == 0
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
        worker.end()


def test_a_supervisord_that_hangs_or_is_gone(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    supervisord = int((relay.state_dir / "supervisord.pid").read_text())
    # frozen: one sentence, soon
    os.kill(supervisord, signal.SIGSTOP)
    done = relay.relayctl("status", timeout_seconds=10)
    assert done.returncode == 1
    assert "does not answer" in done.stderr
    os.kill(supervisord, signal.SIGCONT)
    # killed: what it left behind is seen, not doubled, and ended
    os.kill(supervisord, signal.SIGKILL)
    left = relay.supervision.orphans()
    assert set(left) == {"send-1", "send-2", "status"}
    refused = relay.relayctl("start")
    assert refused.returncode == 1
    assert f"send-1 pid {left['send-1']}" in refused.stderr
    assert relay.relayctl("stop").returncode == 0
    assert relay.supervision.orphans() == {}


def test_stop_ends_everything(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    pids = [status.pid for status in relay.supervision.statuses()]
    done = relay.relayctl("stop")
    assert done.returncode == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert relay.relayctl("stop").returncode == 1
    assert "nothing to stop" in relay.relayctl("stop").stderr
    assert "relayctl start" in relay.relayctl("status").stderr


def test_the_development_stack(new_relay: NewRelay) -> None:
    relay = new_relay(nats_url=f"nats://127.0.0.1:{free_port()}", smtp_port=free_port())
    relay.start("--dev")
    assert send(relay.nats_url)["email_id"]
    assert len(list((relay.state_dir / "caught").glob("*.eml"))) == 1
    again = relay.relayctl("start", "--dev")
    assert again.returncode == 1
    assert "already running" in again.stderr


def test_the_foreground_logs_to_standard_output_and_ends_on_sigterm(new_relay: NewRelay) -> None:
    import subprocess

    from tests.support.relay_process import RELAYCTL, clean_environment

    relay = new_relay()
    process = subprocess.Popen(
        [str(RELAYCTL), "start", "--foreground"],
        env=clean_environment(relay.settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 20
        while not (relay.supervision.is_running() and all(each.is_ready for each in relay.supervision.statuses())):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert send(relay.nats_url)["email_id"]
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert '"mail relayed"' in output
    assert '"stopped"' in output


# -- started wrongly ---------------------------------------------------------------------------


def test_bad_settings_are_named_all_at_once(new_relay: NewRelay) -> None:
    relay = new_relay(
        SMTP_PORT="tcp://10.0.0.1:25", EMAIL_ENABLED="yes", RELAY_SEND_WORKERS="many", SMTP_PASSWORD="hunter2"
    )
    done = relay.relayctl("start")
    assert done.returncode == 78
    for name in ("SMTP_PORT", "EMAIL_ENABLED", "RELAY_SEND_WORKERS"):
        assert name in done.stderr
    assert "hunter2" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["send", "status"])
def test_a_worker_with_bad_settings_exits_78(new_relay: NewRelay, module: str) -> None:
    worker = Worker(module, new_relay(EMAIL_ENABLED="yes").settings)
    output = worker.output()
    assert worker.process.returncode == 78
    assert "EMAIL_ENABLED" in output
    assert "Traceback" not in output


def test_an_occupied_port(new_relay: NewRelay) -> None:
    relay = new_relay()
    with socket.create_server(("127.0.0.1", relay.http_port)):
        done = relay.relayctl("start")
        assert done.returncode == 1
        assert f"port {relay.http_port}" in done.stderr
        assert "set PORT" in done.stderr
        worker = Worker("status", relay.settings)
        assert "set PORT" in worker.output()
        assert worker.process.returncode == 78


def test_a_state_directory_that_cannot_be_written(new_relay: NewRelay, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = new_relay(RELAY_STATE_DIR=str(tmp_path / "file" / "var")).relayctl("start")
    assert done.returncode == 1
    assert "RELAY_STATE_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_state_directory_too_long_for_a_socket(new_relay: NewRelay, tmp_path: Path) -> None:
    done = new_relay(RELAY_STATE_DIR=str(tmp_path / ("x" * 120))).relayctl("start")
    assert done.returncode == 1
    assert "too long for a Unix socket" in done.stderr


def test_unknown_settings_are_a_warning(new_relay: NewRelay) -> None:
    relay = new_relay(SMTP_PROT="25", RELAY_PORT_8080_TCP="tcp://10.0.0.1:8080")
    relay_started = relay.relayctl("start")
    assert relay_started.returncode == 0
    assert "SMTP_PROT" in relay_started.stderr
    assert "RELAY_PORT_8080_TCP" in relay_started.stderr


# -- without what they need -------------------------------------------------------------------


def test_without_nats_it_waits_says_so_and_comes_up_by_itself(new_relay: NewRelay, new_nats_server: NewServer) -> None:
    server = new_nats_server()
    server.stop()
    relay = new_relay(nats_url=server.url)
    done = relay.relayctl("start", "--timeout", "3")
    assert done.returncode == 1
    assert "connection refused" in done.stderr
    assert "keeps trying" in done.stderr
    assert relay.relayctl("status").returncode == 1
    server.start()
    relay.wait_until_ready("send-1", other_pid_than=0, timeout_seconds=10)
    assert send(relay.nats_url)["email_id"]


def test_without_smtp_it_joins_no_queue_group_and_comes_up_by_itself(new_relay: NewRelay, tmp_path: Path) -> None:
    relay = new_relay(smtp_port=free_port())
    done = relay.relayctl("start", "--timeout", "4")
    assert done.returncode == 1
    assert "SMTP_HOST and SMTP_PORT" in done.stderr
    refused = relay.relayctl("send", "--to", "user@example.com", "--subject", "s", "--text", "t")
    assert refused.returncode == 1
    assert "no relay serves" in refused.stderr
    server = CatchingServer(tmp_path, int(relay.settings["SMTP_PORT"]))
    try:
        relay.wait_until_ready("send-1", other_pid_than=0, timeout_seconds=10)
        assert send(relay.nats_url)["email_id"]
    finally:
        server.stop()


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
def test_a_wrong_smtp_password_is_said_and_nothing_is_served(new_relay: NewRelay) -> None:
    def refuse(*_: object) -> AuthResult:
        return AuthResult(success=False, handled=False)

    port = free_port()
    controller = Controller(object(), hostname="127.0.0.1", port=port, authenticator=refuse, auth_require_tls=False)
    controller.start()
    try:
        relay = new_relay(smtp_port=port, SMTP_USERNAME="relay", SMTP_PASSWORD="hunter2")
        done = relay.relayctl("start", "--timeout", "4")
        assert done.returncode == 1
        assert "SMTP_USERNAME and SMTP_PASSWORD" in done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert b"hunter2" not in relay.supervision.log_path("send-1").read_bytes()
        assert relay.program("status").is_ready, "questions are answered all the same"
    finally:
        controller.stop()


def test_smtp_wait_exit_ends_the_process_for_now(new_relay: NewRelay) -> None:
    worker = Worker("send", new_relay(smtp_port=free_port(), SMTP_WAIT_EXIT="true").settings)
    try:
        output = worker.output(timeout_seconds=40)
    finally:
        worker.end()
    assert worker.process.returncode == 75
    assert "SMTP_HOST and SMTP_PORT" in output


def test_sending_switched_off_needs_no_smtp(new_relay: NewRelay) -> None:
    relay = new_relay(smtp_port=free_port(), EMAIL_ENABLED="false")
    relay.start()
    assert send(relay.nats_url, group_id="ignored") == {"email_id": "", "group_id": ""}


def test_without_jetstream_mail_goes_out_untracked(
    new_relay: NewRelay, new_nats_server: NewServer, smtp: CatchingServer
) -> None:
    relay = new_relay(nats_url=new_nats_server(jetstream=False).url)
    done = relay.relayctl("start")
    assert done.returncode == 0
    assert "JetStream is not enabled" in " ".join(done.stdout.split())
    reply = send(relay.nats_url)
    assert reply["email_id"].encode() in smtp.mails()[-1].content


def test_nats_goes_away_and_comes_back(new_relay: NewRelay, new_nats_server: NewServer) -> None:
    server = new_nats_server()
    relay = new_relay(nats_url=server.url)
    relay.start()
    pids = {status.name: status.pid for status in relay.supervision.statuses()}
    server.stop()
    relay.wait_until_not_ready("send-1")
    server.start()
    wait_for_port(server.port)
    begun = time.monotonic()
    for name in pids:
        relay.wait_until_ready(name, other_pid_than=0, timeout_seconds=5)
    assert time.monotonic() - begun < BACK_WITHIN_SECONDS
    assert send(relay.nats_url)["email_id"]
    assert {status.name: status.pid for status in relay.supervision.statuses()} == pids, "no process had to end for it"
