"""What a process loads when it starts: what it has a use for, since all else costs it time to start, and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OF_THE_CLI = (
    "click",
    "rich",
    "supervisor",
    "relay.cli",
    "relay.ops.supervision",
    "relay.ops.preflight",
    "relay.ops.doctor",
)
OF_SENDING = ("relay.sending", "relay.submission.compose", "relay.delivery.smarthost", "relay.tracking.tracker")
OF_EVENTS = ("boto3", "botocore", "relay.aws", "relay.engagement", "relay.ops.polling", "relay.tracking.parked")
OF_QUESTIONS = ("relay.reporting", "relay.tracking.pages", "relay.ops.health", "prometheus_client")
OF_THE_CATCHER = ("aiosmtpd", "relay.ops.catcher")

USELESS = {
    "workers.send": (*OF_THE_CLI, *OF_EVENTS, *OF_QUESTIONS, *OF_THE_CATCHER),
    "workers.status": (*OF_THE_CLI, *OF_EVENTS, *OF_SENDING, *OF_THE_CATCHER, "relay.tracking.folding"),
    "workers.engagement": (*OF_THE_CLI, *OF_SENDING, *OF_QUESTIONS, *OF_THE_CATCHER, "relay.delivery.session"),
    "workers.catcher": (*OF_THE_CLI, *OF_EVENTS, *OF_SENDING, *OF_QUESTIONS, "nats", "relay.bus"),
    "relay.cli.main": ("boto3", "botocore", "workers", "prometheus_client"),
}


def loaded_by(module: str) -> set[str]:
    """Every module that a fresh process has after importing one."""
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", USELESS)
def test_nothing_is_loaded_that_is_of_no_use(module: str) -> None:
    found = loaded_by(module)
    assert not found.intersection(USELESS[module])


def test_what_is_of_no_use_elsewhere_is_loaded_where_it_is_used() -> None:
    """So that a module which moves away does not leave the test above without a meaning."""
    everything = set().union(*(loaded_by(module) for module in USELESS))
    assert everything >= set().union(*USELESS.values())
