"""This host: directories, descriptors, ports and control groups that are really so."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.ops.doctor.finding import Finding
from relay.ops.doctor.host import disk, listener_of, memory_limit_bytes, open_files, room, this_host
from relay.settings import load_settings
from tests.support.nats_server import free_port


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a relay that never ran."""
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("RELAY_HTTP_HOST", "127.0.0.1")
    monkeypatch.setenv("PORT", str(free_port()))
    return tmp_path / "state"


def found(what: str) -> Finding:
    """The answer to one of the questions that ``relayctl check`` asks too."""
    return next(finding for finding in this_host(load_settings()) if finding.what == what)


def test_a_state_directory(state_dir: Path) -> None:
    assert found("state directory").detail == f"{state_dir} can be written"
    assert not state_dir.exists(), "looking makes nothing: it would be the asker's own, not the relay's"


def test_a_path_that_is_too_long(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_STATE_DIR", str(state_dir / ("x" * 100)))
    finding = found("state directory")
    assert finding.level == "failed"
    assert "is too long" in finding.detail
    assert "at most 80 bytes" in finding.remedy


def test_a_path_that_cannot_be(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir.touch()
    monkeypatch.setenv("RELAY_STATE_DIR", str(state_dir / "below"))
    assert "Not a directory" in found("state directory").detail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with 1 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "relay-test", str(where)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this user may not mount a disk")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk(small_disk: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del state_dir
    monkeypatch.setenv("RELAY_STATE_DIR", str(small_disk))
    (finding,) = disk(small_disk, 3)
    assert finding.level == "warning"
    assert "has 1 MB left" in finding.detail
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(b"x" * 2_000_000)
    assert "No space left on device" in found("state directory").detail


def test_logs_that_may_grow_beyond_the_disk(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    (finding,) = disk(tmp_path, free // 40_000_000 + 1)
    assert finding.level == "warning"
    assert "the logs may grow by" in finding.detail


def test_a_disk_with_room(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "send-1.log").write_bytes(b"x" * 3_000_000)
    (finding,) = disk(tmp_path, 1)
    assert finding.ok
    assert finding.detail.endswith("the logs hold 3 MB")


def test_a_port_that_somebody_has(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del state_dir
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("PORT", str(port))
        assert listener_of(port) == f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
        finding = found("port")
    assert f"(pid {os.getpid()}) listens there" in finding.detail
    assert finding.remedy == "end what listens there, or set PORT"
    assert listener_of(port) == ""


FEW_FILES = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
print(flush=True)
input()
"""


def test_a_program_with_too_few_file_descriptors(state_dir: Path) -> None:
    del state_dir
    with subprocess.Popen([sys.executable, "-c", FEW_FILES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        program.stdout.readline()
        assert open_files(program.pid)[0] == 50
        findings = list(room(load_settings(), {"send-1": program.pid}))
        program.communicate(b"\n", timeout=10)
    (finding,) = (each for each in findings if each.what == "file descriptors")
    assert finding.level == "failed"
    assert finding.detail == "send-1 may have 50 files open and needs 84 (SMTP_POOL_SIZE and 64)"
    assert "ulimit -Hn" in finding.remedy


def test_a_program_that_has_nearly_all_files_open(state_dir: Path, tmp_path: Path) -> None:
    del state_dir
    _, count = open_files(os.getpid())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert count is not None
    limit = max(count + 5, 90)
    files = [(tmp_path / "file").open("wb") for _ in range(limit - count - 2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        findings = list(room(load_settings(), {"status": os.getpid()}))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()
    (finding,) = (each for each in findings if each.what == "file descriptors")
    assert finding.level == "warning"
    assert f"of at most {limit} files open" in finding.detail


def test_a_pool_larger_than_the_limit(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del state_dir
    monkeypatch.setenv("SMTP_POOL_SIZE", "1000")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "from relay.settings import load_settings\nfrom relay.ops.doctor.host import file_descriptors\n"
        "import os; os.geteuid() or os.seteuid(65534)\n"  # root may have more
        "print([each.level for each in file_descriptors(load_settings(), {})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['failed']\n"


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"memory.max": "134217728\n"}, "0::/\n", 134_217_728),
        ({"memory.max": "max\n"}, "0::/\n", None),
        ({"a/b/memory.max": "200000000\n", "a/memory.max": "150000000\n"}, "0::/a/b\n", 150_000_000),
        ({"memory/x/memory.limit_in_bytes": "100000000\n"}, "5:cpu,memory:/x\n0::/\n", 100_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, "5:memory:/\n", None),
        ({}, "", None),
    ],
)
def test_limits_of_memory(tmp_path: Path, files: dict[str, str], own: str, limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert memory_limit_bytes(tmp_path, tmp_path / "own") == limit
