"""What ``make bench`` measured, as tables."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

KB = 1024
QUIET_CORES = 0.15
"""What others may use without being told of."""


def show(measured: dict[str, Any], console: Console) -> None:
    """Prints everything that ``var/bench.json`` has, but for what each round had."""
    _show_machine(measured, console)
    _show_rows(measured, console)
    _show_open_loop(measured, console)
    _show_references(measured, console)
    _show_aims(measured, console)
    for fault in measured["faults"]:
        console.print(f"does not count: {fault}", markup=False, style="red")


def _show_machine(measured: dict[str, Any], console: Console) -> None:
    about = measured["machine"]
    console.print(
        f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:.0f} GB; Linux {about['kernel']}; "
        f"{about['python']} (a fixed piece of work: {about['interpreter_ms']:.2f} ms); {measured['at']}, "
        f"{measured['seconds'] / 60:.1f} minutes",
        markup=False,
    )
    missing = [kind for kind in ("PGO", "LTO") if kind not in about["python_built_with"]]
    if missing:
        console.print(
            f"The build options of this Python do not show {' and '.join(missing)}. Without both it is up to half as "
            "slow again, and so is every figure in µs of CPU. Some builds use them and do not show it: the piece of "
            "work above tells.",
            style="yellow",
        )


def _show_rows(measured: dict[str, Any], console: Console) -> None:
    rounds = measured["pace"]["rounds"]
    title = f"Medians of {rounds} round{'s' * (rounds > 1)} (rates: least-most); tracked, 4 KB unless said"
    table = Table(title=f"{title}; CPU in µs a mail")
    table.add_column("row", no_wrap=True)
    headings = ("mails/s", "to smtp-source", "to SMTP layer", "workers", "nats", "sink", "load")
    for heading in (*headings, "p50 ms", "p99 ms", "MB", "others"):
        table.add_column(heading, justify="right")
    for row in measured["rows"]:
        figures, rates = row["median"], [run["rate"] for run in row["runs"]]
        table.add_row(
            row["name"],
            f"{figures['rate']:,.0f}" + (f" ({min(rates):,.0f}-{max(rates):,.0f})" if len(rates) > 1 else ""),
            f"{figures['to smtp-source']:.2f}",
            f"{figures['to SMTP layer']:.2f}",
            *(f"{figures[f'{name} cpu_us']:.0f}" for name in ("workers", "nats-server", "sink")),
            f"{figures['cpu_us']:.0f}",
            *(f"{figures[name]:.2f}" for name in ("p50_ms", "p99_ms")),
            f"{figures['resident_mb']:.0f}",
            f"{figures['others_cores']:.2f}" + ("!" if figures["others_cores"] > QUIET_CORES else ""),
        )
    console.print(table)
    console.print(f"others: cores that everything else on the machine used; !: more than {QUIET_CORES}.", markup=False)


def _show_open_loop(measured: dict[str, Any], console: Console) -> None:
    rows = [row for row in measured["rows"] if row["share_of_peak"]]
    if not rows:
        return
    table = Table(title=f"Open loop, time counted from when a request was due; peak {measured['peak']:,.0f} mails/s")
    table.add_column("row")
    for heading in ("mails/s", "refused", "p50 ms", "p90", "p99", "p99.9", "most", "left late, p99 ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = row["median"]
        names = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms", "late_p99_ms")
        refused = 1 - figures["relayed"] / figures["requests"]
        told = (f"{figures[name]:.2f}" for name in names)
        table.add_row(row["name"], f"{figures['rate']:,.0f}", f"{refused:.1%}", *told)
    console.print(table)


def _show_references(measured: dict[str, Any], console: Console) -> None:
    for size, found in measured["references"].items():
        rates = [statistics.median(each[name] for each in found) for name in ("smtp_source", "smtp_layer")]
        console.print(
            f"{int(size) // KB} KB straight to the sink, 20 connections: smtp-source -d {rates[0]:,.0f} mails/s, "
            f"Relay's SMTP layer alone {rates[1]:,.0f}."
        )
    if bare := measured["bare_transaction_ms"]:
        console.print(f"An SMTP transaction by nothing but a socket, 4 KB, p50: {statistics.median(bare):.3f} ms.")
    if (smtp := measured.get("smtp")) and not smtp["near"]:
        console.print("The SMTP layer alone: no round was quiet, its ratios are those of disturbed ones.")


def _show_aims(measured: dict[str, Any], console: Console) -> None:
    table = Table(title="What DESIGN asks of sending")
    for heading in ("figure", "measured", "aim", ""):
        table.add_column(heading, justify="left" if heading in {"figure", ""} else "right")
    verdicts = {True: "[green]met[/]", False: "[red]missed[/]", None: "not measured"}
    for aim in measured["aims"]:
        value = "" if aim["value"] is None else f"{aim['value']:.2f}"
        table.add_row(aim["figure"], value, aim["aim"], verdicts[aim["is_reached"]])
    console.print(table)
