"""aiosmtplib on uvloop: one persistent client for each task, each task hands over one mail after another."""

from __future__ import annotations

import asyncio
import itertools

import aiosmtplib
import uvloop
from contest import FORWARD_PATH, MAIL_SECONDS, REVERSE_PATH, Task, run


async def send(task: Task) -> int:
    """Hand over ``task.mails`` mails; return how many were taken."""
    left = itertools.repeat(None, task.mails)

    async def call() -> int:
        relayed = 0
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=task.port, local_hostname="localhost", start_tls=False, timeout=MAIL_SECONDS
        )
        async with client:
            for _ in left:
                errors, _reply = await client.sendmail(REVERSE_PATH, [FORWARD_PATH], task.content)
                relayed += not errors
        return relayed

    return sum(await asyncio.gather(*(call() for _ in range(task.connections))))


if __name__ == "__main__":
    run("aiosmtplib", lambda task: uvloop.run(send(task)))
