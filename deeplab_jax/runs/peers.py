"""Detects at once the death of another process of a job.

JAX's coordination service notices a dead process only by its missing heartbeats, and ends one whose connection to
process 0 closes with an abort and a stack trace, from a thread of its own. So the connections to it run through
relays, one in each process: process 0's listens at the coordinator's address, and those of the others keep JAX's
side open when process 0 is gone. Each process also holds a connection to process 0's relay over which it only sends
its rank, and "bye" if it ends together with all others; a connection that closes without it means a death. A host
that disappears closes nothing: the system's own probes (TCP keepalive) detect it.
"""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable

_HELLO, _BYE, _LOST = b"deeplab_jax process ", b"bye", b"lost "
_NO_PROXY = "no_grpc_proxy"
_RETRY = 0.2  # seconds between attempts to reach process 0, which may start later


class Watch:
    """Relays JAX's coordination, and calls `on_loss(rank)` from its thread when another process is gone.

    Args:
      address: "host:port" of process 0, as all processes know it.
      rank: this process's rank.
      on_loss: called once.
      host_timeout: seconds after which a host that no longer answers counts as gone.
    """

    def __init__(self, address: str, rank: int, on_loss: Callable[[int], object], host_timeout: int = 100):
        host, _, port = address.rpartition(":")
        self._host, self._port, self._rank = host.strip("[]"), int(port), rank
        self._on_loss, self._host_timeout = on_loss, host_timeout
        self._controls: dict[int, asyncio.StreamWriter] = {}  # rank -> connection for news of others
        self._lost = False
        self._watched = asyncio.Event()  # set when this process watches process 0
        self._loop = asyncio.new_event_loop()
        # gRPC would otherwise send even local traffic through a proxy.
        exceptions = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy", "")
        os.environ[_NO_PROXY] = ",".join(filter(None, (exceptions, "127.0.0.1")))

    def start(self) -> dict[str, str]:
        """Starts the relay; returns the addresses with which to call `jax.distributed.initialize`.

        Raises:
          OSError: process 0 cannot listen at its address.
        """
        threading.Thread(target=self._loop.run_forever, daemon=True, name="peers").start()
        return asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def leave(self) -> None:
        """Announces that this process ends because all of them do."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(timeout=10)

    async def _start(self) -> dict[str, str]:
        if self._rank:
            server = await asyncio.start_server(self._to_process_0, "127.0.0.1", 0)
            self._task = asyncio.create_task(self._watch_process_0())
            return {"coordinator_address": _address_of(server)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._service = free.getsockname()[1]
        self._server = await asyncio.start_server(self._at_process_0, None, self._port)
        own = f"127.0.0.1:{self._service}"
        return {"coordinator_address": own, "coordinator_bind_address": own}

    async def _leave(self) -> None:
        for writer in self._controls.values():
            writer.write(_BYE + b"\n")
            with contextlib.suppress(OSError):
                await writer.drain()

    # ---- process 0 -------------------------------------------------------------------------------------------------

    async def _at_process_0(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from another process: JAX's, which is relayed to its service, or the watched one."""
        try:
            line = await reader.readline()
        except (OSError, ValueError):
            line = b""
        rank = line.removeprefix(_HELLO).strip()
        if line.startswith(_HELLO) and rank.isdigit():
            self._controls[int(rank)] = writer
            await self._until_gone(int(rank), reader, writer)
            return
        try:
            service = await asyncio.open_connection("127.0.0.1", self._service)
        except OSError:  # not listening yet; JAX tries again
            writer.close()
            return
        service[1].write(line)
        await asyncio.gather(_pump(reader, service[1]), _pump(service[0], writer))

    # ---- the others ------------------------------------------------------------------------------------------------

    async def _to_process_0(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection of this process's JAX; its side stays open when the other side closes."""
        await self._watched.wait()  # otherwise process 0 could be gone before anybody watches
        up_reader, up_writer = await self._reach()
        await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer, close=False))

    async def _watch_process_0(self) -> None:
        reader, writer = await self._reach()
        writer.write(_HELLO + str(self._rank).encode() + b"\n")
        self._controls[0] = writer
        self._watched.set()
        await self._until_gone(0, reader, writer)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:  # JAX itself gives up after its time-out
            try:
                return await asyncio.open_connection(self._host, self._port)
            except OSError:
                await asyncio.sleep(_RETRY)

    # ---- both ------------------------------------------------------------------------------------------------------

    async def _until_gone(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Reads a process's messages about itself and others until its connection closes."""
        _keep_alive(writer, self._host_timeout)
        said_bye = False
        while line := await _line(reader):
            said_bye = said_bye or line.startswith(_BYE)
            other = line.removeprefix(_LOST).strip()
            if line.startswith(_LOST) and other.isdigit():
                rank = int(other)
                break
        if said_bye or self._lost:
            return
        self._lost = True
        for other_rank, control in self._controls.items():
            if other_rank != rank:
                control.write(_LOST + str(rank).encode() + b"\n")
        await asyncio.sleep(1)  # this process may be about to end by itself, with its own sentence
        self._on_loss(rank)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end of the connection, whatever its cause."""
    try:
        return await reader.readline()
    except (OSError, ValueError):
        return b""


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, close: bool = True) -> None:
    """Forwards data until the connection ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    if close:
        writer.close()


def _address_of(server: asyncio.Server) -> str:
    host, port = server.sockets[0].getsockname()[:2]
    return f"{host}:{port}"


def _keep_alive(writer: asyncio.StreamWriter, seconds: int) -> None:
    """Enables the system's probes, so that a lost host is noticed after about `seconds`."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = {"TCP_KEEPIDLE": seconds // 2, "TCP_KEEPINTVL": seconds // 10, "TCP_KEEPCNT": 5}
    for name, value in probes.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))
