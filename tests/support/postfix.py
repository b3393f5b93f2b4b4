"""A real Postfix for tests: its own configuration, queue and ports, ended by pid.

    postfix = Postfix(directory, certificate, key)
    postfix.start()
    ...  # talk to localhost:postfix.port, STARTTLS required
    postfix.wait_until_delivered(10)
    postfix.mails()

It takes mail for example.com over TLS only and delivers everything into one Maildir. There a mail has lone LFs for line
ends, as files have on Unix, and fields of Postfix's own before those that it came with; ``mails`` takes these away
again and nothing else. Postfix needs to be started by root: it gives its processes users of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Final

import gevent

from tests.support.nats_server import free_port, wait_for_port

PROGRAM: Final = shutil.which("postfix", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
OWNER: Final = "postfix"
START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 8.0
_POLL_SECONDS: Final = 0.02
_QUEUES: Final = ("incoming", "active", "deferred")

# The daemons that it takes to receive by SMTP and to deliver to a Maildir; none runs in a chroot.
_SERVICES: Final = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""

# "in_flow_delay = 0": by default a client that sends faster than Postfix delivers waits a second for each mail.
# "enable_long_queue_ids": a short one may be given again to a later mail.
# "local_header_rewrite_clients =": else clients on loopback get missing header fields added, and addresses rewritten.
_SETTINGS: Final = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/log/mail.log
maillog_file_prefixes = {directory}
mail_owner = {owner}
myhostname = mail.example.com
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = loopback-only
inet_protocols = ipv4
enable_long_queue_ids = yes
alias_maps =
alias_database =
local_recipient_maps =
smtpd_peername_lookup = no
smtpd_relay_restrictions = reject_unauth_destination
local_header_rewrite_clients =
in_flow_delay = 0
smtpd_tls_security_level = encrypt
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
virtual_mailbox_domains = example.com
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = static:all/
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
"""

# What virtual(8) writes at the top, then what smtpd(8) put there; a field goes on over lines that begin with a blank.
_PREPENDED: Final = re.compile(
    rb"Return-Path: <[^\n]*>\n"
    rb"X-Original-To: (?P<recipient>[^\n]*)\n"
    rb"Delivered-To: (?P=recipient)\n"
    rb"Received: from [^\n]*\n(?:[\t ][^\n]*\n)*?"
    rb"\tby mail\.example\.com \(Postfix\) with (?P<protocol>E?SMTPS?) id (?P<queue_id>[0-9A-Za-z]+)\b"
    rb"[^\n]*\n(?:[\t ][^\n]*\n)*"
)


@dataclasses.dataclass(frozen=True)
class DeliveredMail:
    """One mail that Postfix took and delivered."""

    queue_id: str
    """The id that Postfix gave it in ``250 Ok: queued as …``."""
    forward_path: str
    content: bytes
    """As it was handed over, with CRLF line ends."""
    is_over_tls: bool
    """Whether Postfix noted that it came by ESMTPS."""


class Postfix:
    """One Postfix. ``stop`` and ``start`` keep port, queue and Maildir, so clients see a restart."""

    def __init__(self, directory: Path, certificate: Path, key: Path) -> None:
        """``directory`` is empty, and every user may pass through its parents."""
        self.port = free_port()
        self._directory = directory
        self._configuration = directory / "etc"
        self._maildir = directory / "mail" / "all"
        self._queue = directory / "queue"
        self._process: subprocess.Popen[bytes] | None = None
        self._master_pid = 0
        owner = pwd.getpwnam(OWNER)
        for name in ("etc", "queue", "data", "mail", "log"):
            (directory / name).mkdir()
        directory.chmod(0o755)
        for name in ("data", "mail"):
            os.chown(directory / name, owner.pw_uid, owner.pw_gid)
        settings = _SETTINGS.format(
            directory=directory,
            owner=OWNER,
            certificate=certificate,
            key=key,
            uid=owner.pw_uid,
            gid=owner.pw_gid,
        )
        (self._configuration / "main.cf").write_text(settings)
        (self._configuration / "master.cf").write_text(_SERVICES.format(port=self.port))

    def start(self) -> None:
        """Start it and return when it answers on its port."""
        assert PROGRAM is not None
        command = [PROGRAM, "-c", str(self._configuration), "start-fg"]
        with (self._directory / "log" / "start.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for_port(self.port, START_SECONDS)
        except TimeoutError:
            raise AssertionError(f"Postfix does not start:\n{self.log()}") from None
        self._master_pid = int((self._queue / "pid" / "master.pid").read_text())

    def stop(self) -> None:
        """Stop it as ``postfix stop`` does, by SIGTERM to its master, and wait for the last of its processes."""
        if self._process is None:
            return
        if self._master_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._master_pid, signal.SIGTERM)
            if not self._has_ended_by(time.monotonic() + STOP_SECONDS):
                # The master leads a process group, in which all that it starts stays.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._master_pid, signal.SIGKILL)
        else:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
        self._process = None
        assert self._has_ended_by(time.monotonic() + STOP_SECONDS), f"Postfix left {self.processes()}"
        self._master_pid = 0
        # As after ``postfix quick-stop``: the directories need not be looked through again.
        (self._queue / "quick-start").touch()

    def processes(self) -> list[int]:
        """The pids of the master and of all that it started and that still run."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def wait_until_delivered(self, timeout_seconds: float) -> None:
        """Return when the queue is empty; ``AssertionError`` when it is not in time."""
        deadline = time.monotonic() + timeout_seconds
        while self._queued():
            assert time.monotonic() < deadline, f"mails are still in Postfix's queue:\n{self.log()}"
            gevent.sleep(_POLL_SECONDS)

    def mails(self) -> list[DeliveredMail]:
        """Everything that was taken and delivered so far, in no order.

        A mail that was being delivered when Postfix was stopped may be there twice, by no fault of who handed it over.
        Both files then have the same queue id; what was handed over twice has two.
        """
        found = [_read(path.read_bytes()) for path in self._maildir.glob("new/*")]
        by_id = {mail.queue_id: mail for mail in found}
        assert all(mail == by_id[mail.queue_id] for mail in found)
        return list(by_id.values())

    def forget_mails(self) -> None:
        """Empty the queue and the Maildir of a Postfix that does not run."""
        for directory in (self._maildir, *(self._queue / name for name in _QUEUES)):
            for path in directory.rglob("*"):
                if not path.is_dir():
                    path.unlink()

    def log(self) -> str:
        """The end of what Postfix logged."""
        texts = [path.read_text(errors="replace") for path in sorted((self._directory / "log").iterdir())]
        return "\n".join(text[-4000:] for text in texts)

    def _queued(self) -> int:
        """How many mails wait to be delivered, or are on their way; some are counted twice.

        Twice, because mails move between the directories in both directions. A file that its owner may not execute was
        never finished: the client has no reply for it, and it is no mail.
        """
        queued = 0
        for name in _QUEUES * 2:
            for path in (self._queue / name).rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    queued += stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IXUSR)
        return queued

    def _has_ended_by(self, deadline: float) -> bool:
        """Whether no process of ours is left; blocks until ``deadline`` at most."""
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _is_ours(self, pid: int) -> bool:
        """Whether the process runs in the master's group. One that has ended, but was not fetched, does not run."""
        try:
            line = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        state, _parent, group = line.rpartition(")")[2].split()[:3]
        return int(group) == self._master_pid and state != "Z"


def _read(data: bytes) -> DeliveredMail:
    prepended = _PREPENDED.match(data)
    assert prepended is not None, data[:1000]
    return DeliveredMail(
        queue_id=prepended["queue_id"].decode(),
        forward_path=prepended["recipient"].decode(),
        content=data[prepended.end() :].replace(b"\n", b"\r\n"),
        is_over_tls=prepended["protocol"] == b"ESMTPS",
    )
