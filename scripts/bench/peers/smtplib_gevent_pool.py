"""The standard library's smtplib under gevent: persistent connections in a queue, the pool one writes by hand."""

# ruff: noqa: E402 - line one of a process: gevent must patch before anything else is imported.
from gevent import monkey

monkey.patch_all()

import itertools
import smtplib

import gevent
from contest import FORWARD_PATH, MAIL_SECONDS, REVERSE_PATH, Task, run
from gevent.queue import Queue


def send(task: Task) -> int:
    """Hand over ``task.mails`` mails; return how many were taken."""
    connections: Queue[smtplib.SMTP] = Queue()

    def connect() -> None:
        smtp = smtplib.SMTP("127.0.0.1", task.port, local_hostname="localhost", timeout=MAIL_SECONDS)
        smtp.ehlo()
        connections.put(smtp)

    gevent.joinall([gevent.spawn(connect) for _ in range(task.connections)], raise_error=True)
    left = itertools.repeat(None, task.mails)

    def call() -> int:
        relayed = 0
        for _ in left:
            smtp = connections.get()
            try:
                relayed += not smtp.sendmail(REVERSE_PATH, [FORWARD_PATH], task.content)
            finally:
                connections.put(smtp)
        return relayed

    callers = [gevent.spawn(call) for _ in range(task.connections)]
    gevent.joinall(callers, raise_error=True)
    for _ in range(task.connections):
        connections.get().quit()
    return sum(caller.value for caller in callers)


if __name__ == "__main__":
    run("smtplib under gevent", send)
