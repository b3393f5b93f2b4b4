"""The benchmark itself: its load generator against callers' true waiting, its verdicts, and that it runs as a whole."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg

from relay import contract
from tests.conftest import require
from tests.support.nats_server import NatsServer

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
RUN_SECONDS = 120
PAUSE_SECONDS = 0.5
LONG_MS = 200.0
"""What only those wait who ask during the pause."""
SENT = b'{"email_id":"1","group_id":"bench"}'


@pytest.fixture
def bench_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmark as its own processes do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


Answer = Callable[[Msg, int], Awaitable[None]]


async def loaded(url: str, answer: Answer | None, *options: str) -> dict[str, Any]:
    """What the load generator says of a service that answers so."""
    nc = await nats.connect(url)
    taken = 0

    async def on_request(msg: Msg) -> None:
        nonlocal taken
        taken += 1
        assert answer is not None
        await answer(msg, taken)

    try:
        if answer is not None:
            await nc.subscribe(contract.SEND_EMAIL, cb=on_request)
            await nc.flush()
        command = [sys.executable, str(BENCH / "load.py"), url, "--size", "1000", *options]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await asyncio.wait_for(process.communicate(), RUN_SECONDS)
        assert process.returncode == 0
        lines = [json.loads(line) for line in printed.splitlines()]
        assert [line["tenth"] for line in lines[:-1]] == list(range(1, 11))
        figures: dict[str, Any] = lines[-1]
        assert sum(figures["histogram"].values()) == figures["answered"]
        return figures | {"taken": taken}
    finally:
        await nc.close()


async def sends(msg: Msg, number: int) -> None:
    """Answers at once."""
    await msg.respond(SENT)


async def pauses(msg: Msg, number: int) -> None:
    """Answers at once, but for the twentieth request, which keeps all behind it waiting."""
    if number == 20:
        await asyncio.sleep(PAUSE_SECONDS)
    await msg.respond(SENT)


def above_long(figures: dict[str, Any], histogram: ModuleType) -> int:
    """How many waited long."""
    return sum(
        count for bucket, count in figures["histogram"].items() if histogram.upper_bound(int(bucket)) * 1000 > LONG_MS
    )


def test_closed_loop_answers_everything(new_nats_server: Callable[..., NatsServer]) -> None:
    url = new_nats_server(jetstream=False).url

    figures = asyncio.run(loaded(url, sends, "--callers", "10", "--seconds", "0.5"))

    assert figures["requests"] == figures["answered"] == figures["relayed"] == figures["taken"] > 10
    assert figures["errors"] == {}
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]


def test_a_pause_is_felt_by_all_who_would_have_asked(
    new_nats_server: Callable[..., NatsServer], bench_module: Callable[[str], ModuleType]
) -> None:
    url, histogram = new_nats_server(jetstream=False).url, bench_module("histogram")

    open_loop = asyncio.run(loaded(url, pauses, "--rate", "200", "--seconds", "2"))
    one_caller = asyncio.run(loaded(url, pauses, "--callers", "1", "--seconds", "2"))

    assert open_loop["requests"] == open_loop["answered"] == open_loop["taken"] == 400
    # Due during the first 0.3 s of the pause: 60. The machine may add some, never take any away.
    assert above_long(open_loop, histogram) >= 50
    # A caller that waits asks for nothing: one of hundreds, which no quantile shows.
    assert above_long(one_caller, histogram) < 10
    assert open_loop["late_p99_ms"] < LONG_MS


def test_what_is_no_success_is_told(new_nats_server: Callable[..., NatsServer]) -> None:
    url = new_nats_server(jetstream=False).url

    async def refuses_first_and_doubles_second(msg: Msg, number: int) -> None:
        if number == 1:
            await msg.respond(b'{"error":"email delivery failed","detail":"overloaded"}')
            return
        await msg.respond(SENT)
        if number == 2:
            await msg.respond(SENT)

    figures = asyncio.run(loaded(url, refuses_first_and_doubles_second, "--callers", "2", "--seconds", "0.3"))
    nobody = asyncio.run(loaded(url, None, "--callers", "1", "--seconds", "0.1"))

    assert figures["errors"] == {"overloaded": 1, "a second reply to one request": 1}
    assert figures["answered"] == figures["taken"] == figures["relayed"] + 1
    assert nobody["errors"] == {"nobody serves": nobody["requests"]}
    assert nobody["relayed"] == 0


@given(st.lists(st.floats(1e-7, 1e4), min_size=1, max_size=50), st.floats(0, 1))
def test_buckets_hold_what_they_say(values: list[float], share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        histogram = importlib.import_module("histogram")
    width = 2 ** (1 / histogram.PER_DOUBLING) * (1 + 1e-9)

    for value in values:
        upper = histogram.upper_bound(histogram.bucket_of(value))
        assert value <= upper * (1 + 1e-9)
        assert upper <= max(value, histogram.LEAST) * width

    # It is the smallest bound that so large a share does not exceed.
    found = histogram.quantile(histogram.counted(values), share)
    assert sum(value <= found * (1 + 1e-9) for value in values) >= share * len(values)
    assert found <= max(max(values), histogram.LEAST) * width


def test_an_empty_histogram_has_no_quantiles(bench_module: Callable[[str], ModuleType]) -> None:
    histogram = bench_module("histogram")

    with pytest.raises(ValueError, match="no quantiles"):
        histogram.quantile(histogram.counted([]), 0.5)


def run_script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A script of the benchmark, to its end."""
    for program in ("smtp-sink", "smtp-source"):
        require(shutil.which(program, path="/usr/sbin:/usr/bin") is not None, program)
    command = [sys.executable, str(BENCH / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)


@pytest.mark.parametrize(
    ("changed", "at_sink", "stored", "faults"),
    [
        ({}, 10, {"facts": 10, "records": 10}, 0),
        ({}, 10, {}, 0),
        ({"errors": {"overloaded": 1}, "relayed": 9}, 9, {"facts": 9, "records": 9}, 1),
        ({"relayed": 9}, 9, {}, 1),
        ({}, 9, {"facts": 10, "records": 10}, 1),
        ({}, 11, {"facts": 10, "records": 10}, 1),
        ({}, 10, {"facts": 9, "records": 10}, 1),
        ({}, 10, {"facts": 10, "records": 9}, 1),
    ],
)
def test_a_run_counts_only_when_everything_was_sent_and_tracked(
    bench_module: Callable[[str], ModuleType],
    changed: dict[str, Any],
    at_sink: int,
    stored: dict[str, int],
    faults: int,
) -> None:
    figures = {"requests": 10, "relayed": 10, "errors": {}} | changed
    assert len(bench_module("run").faults_of("a row", figures, at_sink, stored)) == faults


@pytest.mark.parametrize(
    ("errors", "relayed", "faults"), [({"overloaded": 1}, 9, 0), ({"timed out": 1}, 9, 1), ({"overloaded": 1}, 8, 1)]
)
def test_in_an_open_loop_some_may_be_refused(
    bench_module: Callable[[str], ModuleType], errors: dict[str, int], relayed: int, faults: int
) -> None:
    figures = {"requests": 10, "relayed": relayed, "errors": errors}
    assert len(bench_module("run").faults_of("a row", figures, relayed, {}, may_refuse=True)) == faults


def test_a_run_counts_every_mail_and_says_what_is_missed(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"

    done = run_script("run.py", "--quick", "--only", "composing", "--output", str(output))

    assert output.exists(), done.stderr
    measured = json.loads(output.read_text())
    [row] = measured["rows"]
    [run] = row["runs"]
    assert measured["faults"] == []
    assert run["requests"] == run["relayed"] > 0
    assert run["errors"] == {}
    assert row["median"]["workers cpu_us"] > 0
    verdicts = {aim["figure"]: aim["is_reached"] for aim in measured["aims"]}
    assert verdicts["added latency at low load, p50, ms"] is None
    assert verdicts["tracked sends, 2 workers, against smtp-source"] in {True, False}
    assert done.returncode == (1 if False in verdicts.values() else 0), done.stderr
    assert "What DESIGN asks of sending" in done.stdout


def test_bytecodes_are_counted_by_function(tmp_path: Path) -> None:
    output = tmp_path / "bytecodes.json"

    done = run_script("bytecodes.py", "--seconds", "1", "--output", str(output))

    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    bytecodes, calls = measured["functions"]["relay/submission/compose.py:compose"]
    assert calls == 1.0
    assert 20 < bytecodes < measured["all"][0]
