"""A relay whose supervisord is gone, hangs or cannot be reached, and a state directory that is not what it was."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from relay.ops.host import processes
from tests.support.caller import send
from tests.support.nats_server import free_port
from tests.support.relay_process import RELAYCTL, RelayProcess, clean_environment

NewRelay = Callable[..., RelayProcess]


@pytest.fixture(autouse=True)
def nothing_is_left(state_dir: Path) -> Iterator[None]:
    """Whatever a failed test leaves of its relay is killed."""
    yield
    for pid in processes(state_dir).values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_gone(pid: int, timeout_seconds: float = 10.0) -> None:
    """Until it has ended; whoever is to learn of that (PID 1) may not have yet."""
    deadline = time.monotonic() + timeout_seconds
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def supervisord_pid(relay: RelayProcess) -> int:
    return int((relay.state_dir / "supervisord.pid").read_text())


def doctor_says(relay: RelayProcess, what: str) -> dict[str, str]:
    """The doctor's only finding about it that is not well."""
    told = json.loads(relay.relayctl("doctor", "--json").stdout)
    (one,) = (each for each in told["findings"] if each["what"] == what and each["level"] != "ok")
    return dict(one)


def on_a_full_disk(relay: RelayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that can write nothing to any file."""
    return subprocess.run(
        [str(RELAYCTL), *arguments],
        env=clean_environment(relay.settings),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )


# -- supervisord ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_pid_gone", [False, True])
def test_a_socket_that_was_cleaned_away(new_relay: NewRelay, is_pid_gone: bool) -> None:
    relay = new_relay()
    relay.start()
    supervisord = supervisord_pid(relay)
    pids = processes(relay.state_dir)
    assert pids["supervisord"] == supervisord
    (relay.state_dir / "supervisord.sock").unlink()
    if is_pid_gone:
        (relay.state_dir / "supervisord.pid").unlink()
    for command in ("start", "status", "restart"):
        refused = relay.relayctl(command)
        assert refused.returncode == 1
        assert f"(pid {supervisord}) runs and cannot be reached" in refused.stderr
        assert "`relayctl stop` ends it" in refused.stderr
    assert "is gone" in doctor_says(relay, "relay")["detail"]
    done = relay.relayctl("stop")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    for pid in pids.values():
        wait_gone(pid, timeout_seconds=0)
    relay.start()
    assert send(relay.nats_url)["email_id"]


def test_a_copy_of_the_directory_ends_nobody(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    before = processes(relay.state_dir)
    copy = Path(tempfile.mkdtemp(prefix="relay-t-"))
    try:
        ignored = shutil.ignore_patterns("supervisord.sock")
        shutil.copytree(relay.state_dir, copy, dirs_exist_ok=True, ignore=ignored)
        other = RelayProcess(copy, relay.nats_url, int(relay.settings["SMTP_PORT"]))
        refused = other.relayctl("stop")
        assert refused.returncode == 1
        assert "nothing to stop" in refused.stderr
    finally:
        shutil.rmtree(copy)
    assert processes(relay.state_dir) == before
    assert all(status.is_ready for status in relay.supervision.statuses())


def test_without_its_supervisord_every_command_says_so(new_relay: NewRelay) -> None:
    relay = new_relay(nats_url=f"nats://127.0.0.1:{free_port()}", smtp_port=free_port())
    relay.start("--dev")
    supervisord = supervisord_pid(relay)
    os.kill(supervisord, signal.SIGKILL)
    wait_gone(supervisord)
    left = processes(relay.state_dir)
    assert list(left) == ["catcher", "nats", "send-1", "send-2", "status"]
    for command in (["start", "--dev"], ["status"], ["restart"], ["scale", "3"]):
        refused = relay.relayctl(*command)
        assert refused.returncode == 1
        assert "without their supervisord" in refused.stderr
        assert f"nats pid {left['nats']}" in refused.stderr
        assert "`relayctl stop` ends them" in refused.stderr
    done = relay.relayctl("stop")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    for pid in left.values():
        wait_gone(pid, timeout_seconds=0)


def test_a_supervisord_that_hangs_can_be_killed(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    pids = processes(relay.state_dir)
    os.kill(pids["supervisord"], signal.SIGSTOP)
    found = doctor_says(relay, "relay")
    assert f"(pid {pids['supervisord']}) hangs" in found["detail"]
    assert "`relayctl stop --kill`" in found["remedy"]
    refused = relay.relayctl("stop")
    assert refused.returncode == 1
    assert "`relayctl stop --kill`" in refused.stderr
    assert processes(relay.state_dir) == pids, "nothing was touched"
    done = relay.relayctl("stop", "--kill", "--drain", "5")
    assert (done.returncode, done.stdout) == (0, "stopped, and killed: supervisord\n"), done.stderr
    assert processes(relay.state_dir) == {}
    relay.start()


# -- start ---------------------------------------------------------------------------------------


def test_of_two_starts_at_once_one_starts(new_relay: NewRelay) -> None:
    relay = new_relay()
    environments = [clean_environment(relay.settings | {"PORT": str(free_port())}) for _ in range(2)]
    both = [
        subprocess.Popen([str(RELAYCTL), "start"], env=each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for each in environments
    ]
    said = [each.communicate(timeout=90)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 1], said
    winner = [each.returncode for each in both].index(0)
    assert "`relayctl start` (pid" in said[1 - winner] or "already running" in said[1 - winner]
    assert relay.supervision.started()["port"] == int(environments[winner]["PORT"])
    assert [path.name for path in (relay.state_dir / "settings").iterdir()] == ["1.json"]
    kept = json.loads((relay.state_dir / "settings" / "1.json").read_text())
    assert kept["PORT"] == environments[winner]["PORT"]


def test_a_start_while_it_is_being_stopped(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    send_1 = relay.program("send-1").pid
    os.kill(send_1, signal.SIGSTOP)  # supervisord waits for it
    try:
        assert relay.relayctl("stop", "--timeout", "0.5").returncode == 1
        refused = relay.relayctl("start")
    finally:
        os.kill(send_1, signal.SIGCONT)
    assert refused.returncode == 1
    assert "is being stopped" in refused.stderr
    assert relay.relayctl("stop").returncode in {0, 1}, "it may have ended meanwhile"
    assert processes(relay.state_dir) == {}


# -- what is kept --------------------------------------------------------------------------------


def test_a_reload_when_the_settings_are_gone_gives_them_to_all(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    before = {status.name: status.pid for status in relay.supervision.statuses()}
    for path in (relay.state_dir / "settings").iterdir():
        path.unlink()
    found = doctor_says(relay, "settings")
    assert "`relayctl reload`" in found["remedy"]
    relay.settings["SMTP_POOL_SIZE"] = "7"
    done = relay.relayctl("reload")
    assert done.returncode == 0, done.stderr
    assert "cannot be read any more" in done.stderr
    after = {status.name: status.pid for status in relay.supervision.statuses()}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values()), "every one was restarted"
    (kept,) = (relay.state_dir / "settings").iterdir()
    assert json.loads(kept.read_text())["SMTP_POOL_SIZE"] == "7"
    assert relay.relayctl("restart", "send-1", "send-1").stdout.count("send-1       ready") == 1


def test_a_full_disk_is_named_and_does_not_keep_it_from_ending(new_relay: NewRelay) -> None:
    relay = new_relay()
    relay.start()
    refused = on_a_full_disk(relay, "restart")
    assert refused.returncode == 1
    assert "cannot write to RELAY_STATE_DIR" in refused.stderr
    done = on_a_full_disk(relay, "stop", "--drain", "5")
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert "warning: DRAIN_SECONDS holds" in done.stderr
    assert processes(relay.state_dir) == {}


@pytest.mark.parametrize("text", ['{"programs":[]}', '{"drain_seconds":"x"}', '{"arrangement":{"programs":[1]}}'])
def test_what_is_kept_of_the_start_is_not_what_it_was(new_relay: NewRelay, text: str) -> None:
    relay = new_relay()
    relay.start()
    (relay.state_dir / "started.json").write_text(text)
    for command in ("status", "doctor"):
        assert "Traceback" not in relay.relayctl(command).stderr
    assert "another version of Relay started it" in relay.relayctl("restart").stderr
    assert relay.relayctl("stop").returncode == 0
