"""Who may import what: the house's rules, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "relay").rglob("*.py"), *(ROOT / "workers").glob("*.py")])

ONLY_IN = {
    "nats": ("relay/bus/", "relay/client/"),
    "nkeys": ("relay/bus/",),
    "asyncio": ("relay/bus/", "relay/client/"),
    "boto3": ("relay/aws/",),
    "botocore": ("relay/aws/",),
    "gevent": (
        "relay/bus/",
        "relay/delivery/",
        "relay/bookkeeping.py",
        "relay/engagement.py",
        "relay/extended.py",
        "relay/idempotency/claims.py",
        "relay/idempotency/ledger.py",
        "relay/idempotency/twins.py",
        "relay/ops/doctor/",
        "relay/ops/measuring.py",
        "relay/ops/polling.py",
        "relay/ops/process.py",
        "relay/ops/health.py",
        "relay/ops/logs.py",
        "relay/ops/tracing.py",
        "relay/ops/share.py",
        "relay/ops/waiting.py",
        "relay/cli/fleet.py",
        "relay/tracking/arrears.py",
        "relay/tracking/pages.py",
        "relay/tracking/storage.py",
        "relay/tracking/tracker.py",
        "workers/",
    ),
    "supervisor": ("relay/ops/supervision.py",),
    "aiosmtpd": ("relay/ops/catcher.py",),
    "opentelemetry": ("relay/ops/tracing.py",),
    "prometheus_client": ("relay/ops/metrics.py",),
}
"""Packages from outside, and where they may be imported."""

PURE = (
    "relay/contract.py",
    "relay/answers.py",
    "relay/errors.py",
    "relay/redaction.py",
    "relay/histogram.py",
    "relay/journey.py",
    "relay/bus/config.py",
    "relay/bus/messages.py",
    "relay/client/errors.py",
    "relay/client/mail.py",
    "relay/client/replies.py",
    "relay/client/retry.py",
    "relay/ops/catalogue.py",
    "relay/submission/",
    "relay/tracking/record.py",
    "relay/tracking/events.py",
    "relay/tracking/facts.py",
    "relay/tracking/folding.py",
    "relay/tracking/groups.py",
    "relay/tracking/cursors.py",
    "relay/tracking/erasure.py",
    "relay/tracking/comparison.py",
    "relay/idempotency/claim.py",
    "relay/delivery/reply.py",
    "relay/delivery/outcome.py",
    "relay/delivery/trouble.py",
    "relay/delivery/circuit.py",
    "relay/delivery/pool_state.py",
)
"""No sockets, gevent, asyncio, boto3, environment, nor a clock of their own."""

IMPURE_IMPORTS = {"socket", "ssl", "gevent", "asyncio", "boto3", "nats", "threading", "subprocess"}
CLOCKS = {("time", "time"), ("time", "monotonic"), ("datetime", "now"), ("datetime", "utcnow")}

LEVELS = [
    ("relay.__version__",),
    ("relay.contract", "relay.errors", "relay.redaction", "relay.journey", "relay.histogram"),
    ("relay.client",),
    ("relay.submission",),
    ("relay.bus", "relay.aws", "relay.delivery"),
    ("relay.tracking",),
    ("relay.idempotency",),
    ("relay.answers", "relay.bookkeeping"),
    ("relay.extended",),
    ("relay.sending", "relay.engagement", "relay.reporting"),
    ("relay.settings",),
    ("relay.ops",),
    ("relay.cli", "workers"),
]
"""Imports run downhill: a module imports from its own level's package, or from a level above in this list."""


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that is imported, ``from relay import settings`` as ``relay.settings``, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield (f"relay.{alias.name}" if node.module == "relay" else node.module), node.lineno


def _level(module: str) -> int | None:
    for number, packages in enumerate(LEVELS):
        if any(module == package or module.startswith(package + ".") for package in packages):
            return number
    return None


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_outside_packages_are_imported_only_where_they_belong(path: Path) -> None:
    for module, line in _imports(path):
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or _name(path).startswith(allowed), f"{_name(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_only_settings_reads_the_environment(path: Path) -> None:
    if _name(path) == "relay/settings.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            pytest.fail(f"{_name(path)}:{node.lineno} reads the environment")


@pytest.mark.parametrize("path", [path for path in MODULES if _name(path).startswith(PURE)], ids=_name)
def test_deciding_modules_are_pure(path: Path) -> None:
    for module, line in _imports(path):
        assert module.split(".")[0] not in IMPURE_IMPORTS, f"{_name(path)}:{line} imports {module}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in CLOCKS, f"{_name(path)}:{node.lineno} has a clock of its own"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert (node.module, alias.name) not in CLOCKS, f"{_name(path)}:{node.lineno} has a clock of its own"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_run_downhill(path: Path) -> None:
    own = _name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    own_level = _level(own)
    if own_level is None:
        assert own == "relay", f"{own} has no level in this test: give it one"
        return
    for module, line in _imports(path):
        level = _level(module)
        is_own_package = own.split(".")[:2] == module.split(".")[:2]
        assert level is None or level < own_level or is_own_package, f"{_name(path)}:{line} imports {module} uphill"


@pytest.mark.parametrize("path", sorted((ROOT / "workers").glob("[a-z]*.py")), ids=_name)
def test_a_worker_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", sorted((ROOT / "workers").glob("[a-z]*.py")), ids=_name)
def test_a_worker_is_patched_before_anything_else_is_imported(path: Path) -> None:
    """boto3's TLS ends in a RecursionError when it is imported first."""
    if "relay.ops.process" not in {module for module, _ in _imports(path)}:
        return  # it uses no gevent
    docstring, *first = ast.parse(path.read_text()).body[:3]
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(each) for each in first] == ["from gevent import monkey", "monkey.patch_all()"]


@pytest.mark.parametrize(
    ("module", "has_boto3"),
    [("workers.send", False), ("workers.status", False), ("relay.cli.main", False), ("workers.engagement", True)],
)
def test_only_who_reads_a_queue_pays_for_boto3(module: str, has_boto3: bool) -> None:
    program = f"import sys, {module}; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == f"{has_boto3}\n"
