"""What a benchmark asks of the machine: CPU and memory of processes, what others use, ports, how Python was built."""

from __future__ import annotations

import ast
import os
import platform
import re
import resource
import socket
import sysconfig
import time
import timeit
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CPU_CLOCK_OF_A_PROCESS = 2
"""CPUCLOCK_SCHED, clock_getcpuclockid(3) on Linux."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
TCP_ESTABLISHED = "01"
FASTER_BUILDS = {"PGO": ("--enable-optimizations", "-fprofile-use"), "LTO": ("--with-lto", "-flto")}
"""What the build's own options show of optimisations without which CPython is up to half as slow again."""
PIECE_OF_WORK = "\n".join(f"def f{i}(a, b=({i},)):\n    return [a.x + {i} for c in b if c > {i}]" for i in range(60))


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far, all its threads, to the nanosecond: /proc counts hundredths of a second."""
    return time.clock_gettime((~pid << 3) | CPU_CLOCK_OF_A_PROCESS)


def resident_mb(pid: int) -> float:
    """Memory that a process holds now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def connections_to(port: int, pids: Iterable[int]) -> int:
    """How many connections to a port of 127.0.0.1 the process has that has most of them."""
    peer = f"0100007F:{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    sockets = {f"socket:[{row[9]}]" for row in rows if row[2] == peer and row[3] == TCP_ESTABLISHED}
    return max(sum(name in sockets for name in _open_files(pid)) for pid in pids)


def _open_files(pid: int) -> list[str]:
    names = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    return names


class Others:
    """How many cores everything else on the machine uses, from its beginning on; it is what spoils a figure."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._begun = time.monotonic()
        self._before = self._used()

    def cores(self) -> float:
        """On average, until now. What the kernel counts in hundredths can make a little less than none: none."""
        return max(0.0, (self._used() - self._before) / (time.monotonic() - self._begun))

    def _used(self) -> float:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, interrupts, soft_interrupts = map(int, words[:7])
        busy = (user + nice + system + interrupts + soft_interrupts) / TICKS_PER_SECOND
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + ended.ru_utime + ended.ru_stime
        return busy - own - sum(cpu_seconds(pid) for pid in self._pids)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, timeout_seconds: float = 10.0) -> None:
    """Returns when something listens there; ``SystemExit`` when nothing does."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on 127.0.0.1:{port}")


def description() -> dict[str, Any]:
    """The machine and the Python that everything is measured on."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}",
        "python_built_with": built_with(),
        "interpreter_ms": interpreter_ms(),
        "config_args": sysconfig.get_config_var("CONFIG_ARGS") or "",
        "py_cflags": sysconfig.get_config_var("PY_CFLAGS") or "",
    }


def built_with() -> list[str]:
    """Those of PGO and LTO that this Python's build options show; a build may use them and not show it."""
    names = ("CONFIG_ARGS", "PY_CFLAGS", "PY_CORE_CFLAGS", "PY_LDFLAGS", "PY_CORE_LDFLAGS")
    said = " ".join(str(sysconfig.get_config_var(name) or "") for name in names)
    return [kind for kind, options in FASTER_BUILDS.items() if any(option in said for option in options)]


class _Visitor(ast.NodeVisitor):
    """Python code through and through: calls, attributes, dictionaries, generators."""


def interpreter_ms() -> float:
    """CPU for walking a fixed syntax tree: how fast this Python is here, whatever its build options say."""
    tree = ast.parse(PIECE_OF_WORK)
    return min(timeit.repeat(lambda: _Visitor().visit(tree), timer=time.process_time, number=3, repeat=7)) / 3 * 1000
