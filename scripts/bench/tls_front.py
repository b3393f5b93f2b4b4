"""TLS in front of a server that has none: decrypts, passes on, encrypts. A process of its own for ``smtp.py``.

Prints ``listening on 127.0.0.1:PORT``. uvloop, so that it is not what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from typing import cast

import uvloop


class _Side(asyncio.Protocol):
    """One side of a connection: what it gets goes to the other."""

    def __init__(self, other: _Side | None = None, target_port: int = 0) -> None:
        self.transport: asyncio.Transport | None = None
        self._other = other
        self._target_port = target_port
        self._early = bytearray()
        self._opening: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's by class.
        self.transport = cast(asyncio.Transport, transport)
        if self._other is None:
            self._opening = asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        """Connect to the server behind."""
        behind = _Side(self)
        try:
            await asyncio.get_running_loop().create_connection(lambda: behind, "127.0.0.1", self._target_port)
        except OSError:
            self.close()
            return
        self._other = behind
        behind.write(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early += data
        else:
            self._other.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        if self._other is not None:
            self._other.close()

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


async def serve(target_port: int, certificate: str, key: str) -> None:
    """Serves until the process is ended."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Side(target_port=target_port), "127.0.0.1", 0, ssl=context, backlog=1000)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Parses options, serves."""
    parser = argparse.ArgumentParser(description="TLS in front of a server that has none.")
    parser.add_argument("--to-port", type=int, required=True)
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.to_port, options.certificate, options.key))


if __name__ == "__main__":
    main()
