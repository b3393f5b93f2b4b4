"""Draws ``docs/bench.svg`` from ``var/bench.json``.

Text stays text and nothing in it tells the time of drawing, so that a change of the file is a change of a figure.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
from histogram import quantile
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
KB = 1024
BLUE, GREY, ORANGE, GREEN = "#2563a8", "#9aa5b1", "#d97a1d", "#3f8f5f"
NINES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Writes the chart; what was not measured is left out."""
    panels = [panel for panel in (_rates, _sizes, _times, _costs) if panel(measured, None)]
    if not panels:
        raise SystemExit("nothing was measured that could be drawn")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "relay",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
    }
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.4 * rows), layout="tight")
    places = list(figure.subplots(rows, min(2, len(panels)), squeeze=False).flat)
    for panel, place in zip(panels, places, strict=False):
        panel(measured, place)
    for place in places[len(panels) :]:
        place.set_axis_off()
    about = measured["machine"]
    figure.suptitle(
        f"Relay on {about['cores']} cores that it shares with nats-server, smtp-sink and the load generator; "
        f"one run, {measured['at'][:10]}",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Date": None})


def _rows(measured: dict[str, Any], *parts: str) -> list[dict[str, Any]]:
    return [row for row in measured["rows"] if row["part"] in parts]


def _reference(measured: dict[str, Any], size: int, name: str) -> float:
    found = sorted(each[name] for each in measured["references"][str(size)])
    return float(found[len(found) // 2])


def _rates(measured: dict[str, Any], axes: Axes | None) -> bool:
    """Mails a second by the number of workers, tracked and not, beside smtp-source and the SMTP layer alone."""
    tracked, untracked = _rows(measured, "base", "workers"), _rows(measured, "untracked")
    if axes is not None:
        for shift, rows, color, label in (
            (-0.2, tracked, BLUE, "tracked"),
            (0.2, untracked, GREY, "without JetStream"),
        ):
            rows = sorted(rows, key=lambda row: row["setup"]["workers"])
            places = [("1", "2", "4").index(str(row["setup"]["workers"])) + shift for row in rows]
            bars = axes.bar(places, [row["median"]["rate"] for row in rows], 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
        for name, label, color in (
            ("smtp_source", "smtp-source, nothing but SMTP", ORANGE),
            ("smtp_layer", "Relay's SMTP layer alone", GREEN),
        ):
            axes.axhline(_reference(measured, 4 * KB, name), color=color, linestyle="--", linewidth=1, label=label)
        axes.set_xticks(range(3), ["1 worker", "2 workers", "4 workers"])
        axes.set_title("Mails a second, 4 KB, 200 callers")
        axes.legend(frameon=False, fontsize=7, loc="center right")
    return bool(_rows(measured, "workers") and untracked)


def _sizes(measured: dict[str, Any], axes: Axes | None) -> bool:
    """Megabytes a second by the size of the bodies."""
    rows = sorted(_rows(measured, "base", "body"), key=lambda row: row["size"])
    if axes is not None:
        sizes = [row["size"] / KB for row in rows]
        axes.plot(sizes, [row["median"]["rate"] for row in rows], "o-", color=BLUE, label="Relay, 2 workers, tracked")
        references = [_reference(measured, row["size"], "smtp_source") for row in rows]
        axes.plot(sizes, references, "o--", color=ORANGE, label="smtp-source")
        for size, row in zip(sizes, rows, strict=True):
            axes.annotate(
                f"{row['median']['to smtp-source']:.2f} ×",
                (size, row["median"]["rate"]),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=7,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size:.0f} KB" for size in sizes])
        axes.minorticks_off()
        axes.set_title("Mails a second by size of the bodies")
        axes.legend(frameon=False, fontsize=7)
    return len(rows) > 1


def _times(measured: dict[str, Any], axes: Axes | None) -> bool:
    """Quantiles of the time from when a request was due to its reply."""
    rows = [*_rows(measured, "open"), *(row for row in _rows(measured, "callers") if row["callers"] == 1)]
    if axes is not None:
        for row, color in zip(rows, (BLUE, ORANGE, GREEN), strict=False):
            buckets: Counter[int] = Counter()
            for run in row["runs"]:
                buckets.update({int(bucket): count for bucket, count in run["histogram"].items()})
            label = f"open loop, {row['share_of_peak']:.0%} of the peak" if row["share_of_peak"] else "1 caller"
            values = [quantile(buckets, share) * 1000 for share in NINES]
            axes.plot(range(len(NINES)), values, "o-", color=color, label=label, markersize=3)
        axes.set_xticks(range(len(NINES)), [f"{share * 100:g} %" for share in NINES])
        axes.set_yscale("log")
        axes.set_ylabel("ms")
        axes.set_title("Time from when a request is due to its reply")
        axes.legend(frameon=False, fontsize=7)
    return bool(_rows(measured, "open"))


def _costs(measured: dict[str, Any], axes: Axes | None) -> bool:
    """CPU of the workers for each mail: what should not grow."""
    parts = ("callers", "workers", "connections", "uptime")
    rows = _rows(measured, *parts)
    if axes is not None:
        bars: list[tuple[str, float]] = []
        [base] = _rows(measured, "base")
        for row in [base, *(row for row in rows if row["callers"] > 1)]:
            figures = row["median"]
            if row["is_long"]:
                bars += [
                    ("first tenth of the long row", figures["first tenth cpu_us"]),
                    ("last tenth of the long row", figures["last tenth cpu_us"]),
                ]
            else:
                bars.append((row["name"], figures["workers cpu_us"]))
        labels, values = zip(*reversed(bars), strict=True)
        shown = axes.barh(labels, values, color=BLUE, height=0.6)
        axes.bar_label(shown, fmt="{:.0f}", fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title("CPU of all workers, µs a mail (tracked, 4 KB)")
    return bool(rows)


if __name__ == "__main__":
    draw(json.loads((ROOT / "var" / "bench.json").read_text()), ROOT / "docs" / "bench.svg")
    sys.exit(0)
