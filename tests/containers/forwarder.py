"""Lets containers reach a server that listens on 127.0.0.1 alone: TCP from an address of theirs, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence

_IP_FREEBIND = 15  # the bridge has its address only while a container is on it


@contextlib.contextmanager
def forwarded(address: str, ports: Sequence[int]) -> Iterator[None]:
    """`address:port` leads to `127.0.0.1:port` for the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    servers = [asyncio.run_coroutine_threadsafe(_listen(address, port), loop).result() for port in ports]
    try:
        yield
    finally:
        for server in servers:
            loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _listen(address: str, port: int) -> asyncio.Server:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, back), _copy(there, writer))

    return await asyncio.start_server(connect, sock=listener)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    writer.close()
