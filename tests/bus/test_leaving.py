"""A member that leaves its queue group under load: what NATS had sent it until then is still answered."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import nats
from nats.aio.msg import Msg

from tests.support.nats_server import NatsServer

ROOT = Path(__file__).parents[2]
RATE = 1000.0
"""Requests a second."""
ROUNDS = 15

MEMBER = """
from gevent import monkey
monkey.patch_all()
import json, sys, gevent
from relay.bus.client import Bus
from relay.bus.service import Handler, Service
from relay.submission.admission import Admission

url, rounds = sys.argv[1], int(sys.argv[2])
bus = Bus(url, "member")
bus.start()
assert bus.wait_connected(10)

def answer(msg, deadline, step_aside):
    gevent.sleep(0.005)
    return b"served"

handler = Handler(answer, b"overloaded", b"broken", b"too large")
service = Service(bus, nats_subject="test.leaving", queue_group="group", handler=handler,
                  gate=Admission(100_000, 64_000_000, 100_000), patience_seconds=10, reply_prefixes=("_INBOX",))
print("ready", flush=True)
last = 0
for _ in range(rounds):
    service.start()
    gevent.sleep(0.1)
    service.stop(5)
    assert service.wait_answered(5) == 0
    last = service.answered
    gevent.sleep(0.02)
    assert service.answered == last, "nothing comes after it has left"
bus.close()
print(json.dumps({"answered": service.answered, "refused": service.refused}), flush=True)
"""


async def ask_while(url: str, member: subprocess.Popen[str]) -> tuple[dict[int, list[bytes]], int]:
    """Asks at an even rate until the member has ended: each request's replies, and how many a steady one served."""
    replies: dict[int, list[bytes]] = {}
    served = 0
    nc, other = await nats.connect(url), await nats.connect(url)

    async def serve(msg: Msg) -> None:
        nonlocal served
        served += 1
        await msg.respond(b"steady")

    async def take(msg: Msg) -> None:
        replies[int(msg.subject.rpartition(".")[2])].append(msg.data)

    try:
        await other.subscribe("test.leaving", queue="group", cb=serve)
        inbox = nc.new_inbox()
        await nc.subscribe(f"{inbox}.*", cb=take)
        for each in (nc, other):
            await asyncio.sleep(0)
            await each.flush()
        begun = time.monotonic()
        while member.poll() is None:
            await asyncio.sleep(max(0.0, begun + len(replies) / RATE - time.monotonic()))
            number = len(replies)
            replies[number] = []
            await nc.publish("test.leaving", b"x" * 500, f"{inbox}.{number}")
            assert time.monotonic() - begun < 60
        deadline = time.monotonic() + 10
        while not all(replies.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
    finally:
        await nc.close()
        await other.close()
    return replies, served


def test_who_leaves_and_comes_back_answers_all_that_it_was_sent(nats_server: NatsServer) -> None:
    member = subprocess.Popen(
        [sys.executable, "-c", MEMBER, nats_server.url, str(ROUNDS)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert member.stdout is not None
        assert member.stdout.readline() == "ready\n"
        replies, served = asyncio.run(ask_while(nats_server.url, member))
        told = json.loads(member.communicate(timeout=10)[0])
    finally:
        if member.poll() is None:
            member.kill()
            member.communicate()
    assert member.returncode == 0
    assert {len(each) for each in replies.values()} == {1}, "each request got exactly one reply"
    assert {each[0] for each in replies.values()} == {b"served", b"steady"}
    assert told == {"answered": len(replies) - served, "refused": 0}
    assert told["answered"] > 10 * ROUNDS
