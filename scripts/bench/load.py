"""The load generator, a process of its own: keeps requests in flight over NATS and measures each one's time.

Prints one JSON object: ``rate`` (mails/s), ``p50_ms``, ``p99_ms``, ``errors`` (detail → count).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import nats
import uvloop

from relay import contract


def request_of(size_bytes: int, kind: str) -> bytes:
    """A send request whose two bodies have ``size_bytes`` together."""
    line = {"ascii": "All work and no play makes a dull mail, and this is one of its lines.\n"}.get(
        kind, "Schöne Grüße – ein Text, der Quoted-Printable braucht, Zeile für Zeile.\n"
    )
    half = (line * (size_bytes // 2 // len(line.encode()) + 1)).encode()[: size_bytes // 2].decode(errors="ignore")
    mail = {
        "to": "user@example.com",
        "subject": "A mail of the benchmark",
        "text": half,
        "html": half,
        "group_id": "bench",
    }
    return json.dumps(mail, ensure_ascii=False).encode()


async def load(url: str, payload: bytes, mails: int, callers: int) -> dict[str, Any]:
    """Closed loop: ``callers`` requests in flight until ``mails`` are answered."""
    nc = await nats.connect(url)
    inbox = nc.new_inbox()
    begun: dict[str, float] = {}
    latencies: list[float] = []
    errors: dict[str, int] = {}
    done = asyncio.Event()
    sent = 0

    async def ask() -> None:
        nonlocal sent
        sent += 1
        reply_subject = f"{inbox}.{sent}"
        begun[reply_subject] = time.perf_counter()
        await nc.publish(contract.SEND_EMAIL, payload, reply_subject)

    async def on_reply(msg: Any) -> None:
        latencies.append(time.perf_counter() - begun.pop(msg.subject))
        if b'"error"' in msg.data:
            detail = json.loads(msg.data).get("detail", "")
            errors[detail] = errors.get(detail, 0) + 1
        if sent < mails:
            await ask()
        elif len(latencies) >= mails:
            done.set()

    await nc.subscribe(f"{inbox}.*", cb=on_reply)
    await asyncio.sleep(0)
    await nc.flush()
    start = time.perf_counter()
    for _ in range(min(callers, mails)):
        await ask()
    await asyncio.wait_for(done.wait(), 300)
    seconds = time.perf_counter() - start
    await nc.close()
    latencies.sort()
    return {
        "rate": mails / seconds,
        "p50_ms": latencies[len(latencies) // 2] * 1000,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
        "errors": errors,
    }


def main() -> None:
    """Parses options, loads, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--mails", type=int, required=True)
    parser.add_argument("--callers", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--body", choices=["ascii", "utf8"], required=True)
    options = parser.parse_args()
    work = load(options.url, request_of(options.size, options.body), options.mails, options.callers)
    print(json.dumps(uvloop.run(work)))


if __name__ == "__main__":
    main()
