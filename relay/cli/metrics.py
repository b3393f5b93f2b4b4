"""``relayctl metrics``."""

from __future__ import annotations

import sys

import click

from relay.cli.terminal import current_supervision, fail
from relay.ops.supervision import SupervisionError


@click.command()
def metrics() -> None:
    """Prints what /metrics shows, in Prometheus's text format.

    Made from the files in the state directory: it needs neither PORT nor NATS, nor a relay that runs.

    Example: relayctl metrics
    """
    # Here, since it costs 30 ms: the other commands do without.
    from relay.ops.metrics import Metrics

    state_dir = current_supervision().state_dir
    if not (state_dir / "run").is_dir():
        fail(SupervisionError(f"no relay has run in {state_dir}; `relayctl start` starts one"))
    sys.stdout.write(Metrics(state_dir).page().decode())
