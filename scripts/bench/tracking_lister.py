"""A caller that lists a whole group, page by page, in a process of its own; prints what came as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import nats

from relay import contract

PAGE_SECONDS = 30


async def list_group(url: str, group_id: str, limit: int) -> dict[str, float]:
    """Every page after the other; only its records' number and its cursor are looked at."""
    nc = await nats.connect(url)
    begun = time.perf_counter()
    records = pages = most_bytes = 0
    cursor = ""
    while True:
        question = {"group_id": group_id, "limit": limit, "cursor": cursor}
        answer = (await nc.request(contract.GET_EMAIL_STATUS, json.dumps(question).encode(), timeout=PAGE_SECONDS)).data
        if not answer.startswith(b'{"records":['):
            raise SystemExit(f"no page: {answer[:200]!r}")
        pages += 1
        records += answer.count(b'"email_id":')
        most_bytes = max(most_bytes, len(answer))
        if answer.endswith(b'"cursor":null}'):
            break
        cursor = answer[-60:].split(b'"')[-2].decode()
    seconds = time.perf_counter() - begun
    await nc.close()
    return {"records": records, "pages": pages, "most_bytes": most_bytes, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(list_group(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
