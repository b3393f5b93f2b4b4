"""This host: the state directory and its disk, the port, file descriptors, memory, logs.

Figures come from the kernel (``statvfs``, ``/proc``, cgroups); what it does not tell is not judged.
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from relay.errors import RelayError
from relay.ops.doctor.finding import Finding, failed, warning, well
from relay.ops.host import check_port_free
from relay.ops.supervision import MAX_SOCKET_PATH_BYTES, Supervision
from relay.settings import Settings

LEAST_FREE_BYTES = 100_000_000
LEAST_FREE_INODES = 1000
LOG_BYTES = 4 * 10_000_000
"""What a program's log grows to: the file and three older ones."""
WORKER_BYTES = 70_000_000
OTHERS_BYTES = 40_000_000
"""supervisord, and what reads the files."""
MARGIN_FDS = 64
"""Of a worker, beside its connections: NATS, logs, the event loop, libraries."""
SUPERVISOR_FDS = 4096
"""``minfds`` in conf/supervisord.conf: without so many it does not start."""
NEARLY_ALL = 0.9
LISTENING = "0A"
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def this_host(settings: Settings) -> Iterator[Finding]:
    """What ``relayctl check`` asks as well."""
    supervision = Supervision(settings.relay_state_dir)
    yield _state_dir(supervision)
    try:
        if supervision.is_running():
            yield well("port", f"{settings.port}: a relay is running here")
            return
    except RelayError:  # its supervisord hangs: the programs have the port
        return
    try:
        check_port_free(settings.relay_http_host, settings.port, "PORT")
        yield well("port", f"{settings.port} is free")
    except RelayError as error:
        problem, _, remedy = str(error).rpartition("; ")
        if owner := listener_of(settings.port):
            problem = f"{problem}: {owner} listens there"
        yield failed("port", problem, remedy)


def room(settings: Settings, pids: Mapping[str, int]) -> Iterator[Finding]:
    """Disk, file descriptors and memory, for the programs that run (by name) or would."""
    workers = len(pids) or settings.relay_send_workers + settings.relay_status_workers + settings.ses_eventing_enabled
    directory = Supervision(settings.relay_state_dir).state_dir
    if directory.is_dir():
        yield from disk(directory, workers)
    yield from file_descriptors(settings, pids)
    if (limit := memory_limit_bytes()) is not None:
        yield _memory(limit, workers)


def _state_dir(supervision: Supervision) -> Finding:
    directory = supervision.state_dir
    socket_bytes = len(os.fsencode(directory / "supervisord.sock"))
    if socket_bytes > MAX_SOCKET_PATH_BYTES:
        detail = f"{directory} is too long: supervisord's socket there would have {socket_bytes} bytes"
        return failed("state directory", detail, "set RELAY_STATE_DIR to a path of at most 80 bytes")
    try:
        # It is made at the start: root, who may be asking, would leave one in which the relay's user cannot write.
        there = next(each for each in (directory, *directory.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 65536)  # an empty file can be made on a full disk
            file.flush()
    except OSError as error:
        remedy = "set RELAY_STATE_DIR to a directory that can be written, on a disk with room"
        return failed("state directory", f"{directory}: {error.strerror}", remedy)
    return well("state directory", f"{directory} can be written")


# -- disk ---------------------------------------------------------------------------------------------------------
def disk(directory: Path, programs: int) -> Iterator[Finding]:
    """Whether the logs have room to grow to their full size."""
    found = os.statvfs(directory)
    free_bytes = found.f_bavail * found.f_frsize
    logs_bytes = 0
    for path in (directory / "log").glob("*.log*"):
        with contextlib.suppress(FileNotFoundError):  # supervisord has just given it the next number
            logs_bytes += path.stat().st_size
    growth_bytes = max(0, (programs + 1) * LOG_BYTES - logs_bytes)
    if free_bytes < LEAST_FREE_BYTES:
        detail = f"the disk of {directory} has {in_mb(free_bytes)} left: logs end, and no worker can say how it is"
        yield warning("disk", detail, f"make room there; the logs in {directory / 'log'} hold {in_mb(logs_bytes)}")
    elif free_bytes < growth_bytes + LEAST_FREE_BYTES:
        detail = f"the logs may grow by {in_mb(growth_bytes)}, and the disk has {in_mb(free_bytes)} left"
        yield warning("disk", detail, "make room, or set LOG_LEVEL=warn")
    elif found.f_files and found.f_favail < LEAST_FREE_INODES:
        yield warning(
            "disk", f"the disk has {found.f_favail} inodes left", "delete small files; `df -i` shows the disk"
        )
    else:
        yield well("disk", f"{in_mb(free_bytes)} left; the logs hold {in_mb(logs_bytes)}")


# -- file descriptors ---------------------------------------------------------------------------------------------
def file_descriptors(settings: Settings, pids: Mapping[str, int]) -> Iterator[Finding]:
    """Of the processes that run, else those that this process would be allowed."""
    needed = settings.smtp_pool_size + MARGIN_FDS
    if not pids:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = hard if hard != resource.RLIM_INFINITY else max(soft, SUPERVISOR_FDS)
        if most < SUPERVISOR_FDS and os.geteuid() != 0:
            detail = f"a process may have {most} files open here, and supervisord asks for {SUPERVISOR_FDS}"
            yield failed("file descriptors", detail, _MORE_FDS)
        elif max(most, SUPERVISOR_FDS) < needed:
            detail = (
                f"a process may have {most} files open, and SMTP_POOL_SIZE={settings.smtp_pool_size} needs {needed}"
            )
            yield failed("file descriptors", detail, f"{_MORE_FDS}, or lower SMTP_POOL_SIZE")
        else:
            yield well("file descriptors", f"{max(most, SUPERVISOR_FDS)} a process; a send worker needs {needed}")
        return
    is_fine = True
    for name, pid in pids.items():
        limit, count = open_files(pid)
        if limit is None:
            continue
        wanted = needed if name.startswith("send-") else MARGIN_FDS
        if limit < wanted:
            is_fine = False
            detail = f"{name} may have {limit} files open and needs {wanted} (SMTP_POOL_SIZE and {MARGIN_FDS})"
            yield failed("file descriptors", detail, f"{_MORE_FDS}, or lower SMTP_POOL_SIZE; then restart")
        elif count is not None and count >= limit * NEARLY_ALL:
            is_fine = False
            detail = f"{name} has {count} of at most {limit} files open"
            yield warning("file descriptors", detail, f"{_MORE_FDS}; `ls -l /proc/{pid}/fd` shows what they are")
    if is_fine:
        yield well("file descriptors", "each program has room")


_MORE_FDS = "raise the limit: `ulimit -Hn`, LimitNOFILE= in the systemd unit, --ulimit nofile= of the container"


def open_files(pid: int) -> tuple[int | None, int | None]:
    """A process's limit, and how many files it has open; None what is not told."""
    limit, count = None, None
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (PROC / str(pid) / "limits").read_text().splitlines():
            if line.startswith("Max open files"):
                limit = int(line.split()[3])
        count = sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
    return limit, count


# -- memory -------------------------------------------------------------------------------------------------------
def memory_limit_bytes(cgroup: Path = CGROUP, own: Path = PROC / "self" / "cgroup") -> int | None:
    """The least limit of this process's control groups, version 2 or 1; None when there is none."""
    places = [cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"]
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            steps = [path, *(str(parent) for parent in Path(path).parents)]
            if controllers == "":
                places += [cgroup / step.lstrip("/") / "memory.max" for step in steps]
            elif "memory" in controllers.split(","):
                places += [cgroup / "memory" / step.lstrip("/") / "memory.limit_in_bytes" for step in steps]
    limits = []
    for place in places:
        with contextlib.suppress(OSError, ValueError):  # "max": none
            limits.append(int(place.read_text()))
    least = min(limits, default=None)
    return least if least is not None and least < 1 << 50 else None


def _memory(limit_bytes: int, workers: int) -> Finding:
    needed_bytes = workers * WORKER_BYTES + OTHERS_BYTES
    if limit_bytes < needed_bytes:
        detail = f"memory is limited to {in_mb(limit_bytes)}, and {workers} workers take up to {in_mb(needed_bytes)}"
        return warning("memory", detail, "raise the container's limit, or lower RELAY_SEND_WORKERS")
    return well("memory", f"limit {in_mb(limit_bytes)}; {workers} workers take up to {in_mb(needed_bytes)}")


# -- who has the port ---------------------------------------------------------------------------------------------
def listener_of(port: int) -> str:
    """``nginx (pid 812)``, '' when it cannot be told: without root only one's own processes are seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return ""
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(each) in inodes for each in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return ""


def in_mb(count: int) -> str:
    """``512 MB``, ``3.2 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
