"""A TCP proxy in front of PostgreSQL that sees the COMMIT and can lose it, or its answer."""

import ctypes
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from urllib.parse import urlsplit

_CHUNK = 65536
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# SSLRequest, GSSENCRequest: answered with one byte, and then the start begins again.
_NEGOTIATIONS = {80877103, 80877104}


class Loss(Enum):
    """How a COMMIT is lost."""

    REQUEST = auto()  # the COMMIT never reaches the server
    ANSWER = auto()  # the COMMIT reaches the server, and the answer is lost
    CLIENT = auto()  # the client is cut off before the answer; the server continues


class Proxy:
    """Forwards to one PostgreSQL; each method below changes what it forwards.

    Args:
        host, port: The server's.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._losses: list[Loss] = []
        self._ends: list[socket.socket] = []
        self._deaf: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @classmethod
    def before(cls, url: str) -> "Proxy":
        """A proxy for the server of a URL."""
        parts = urlsplit(url)
        return cls(parts.hostname or "127.0.0.1", parts.port or 5432)

    def through(self, url: str) -> str:
        """The same URL through the proxy."""
        parts = urlsplit(url)
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@127.0.0.1:{self.port}").geturl()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        _cut(self._listener)
        self._acceptor.join()  # from here on no new connection is accepted
        self.cut()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def lose(self, loss: Loss) -> None:
        """Lose the next COMMIT."""
        with self._lock:
            self._losses.append(loss)

    @property
    def is_to_lose(self) -> bool:
        """Whether a COMMIT is still to be lost."""
        return bool(self._losses)

    def forgive(self) -> None:
        """Lose no more COMMIT."""
        with self._lock:
            self._losses.clear()

    def cut(self) -> int:
        """Cut every open connection, on both sides; the number of connections."""
        ends = list(self._ends)
        for end in ends:
            _cut(end)
        return len(ends) // 2

    def black_hole(self, *, for_newcomers: bool = False) -> None:
        """Drop every packet on open connections, without acknowledging it.

        Like a cut cable: no FIN, no RST. The kernel drops each packet before TCP handles it.

        Args:
            for_newcomers: Also drop the packets that would open a connection.
        """
        for end in [*self._ends, self._listener] if for_newcomers else list(self._ends):
            _drop_all(end)

    def restore(self) -> None:
        """Let packets pass again; connections that neither side has closed continue."""
        for end in [*self._ends, self._listener]:
            _drop_none(end)

    def _start(self, work: Callable[..., None], *ends: socket.socket) -> None:
        def work_and_close() -> None:
            work(*ends)
            with self._lock:
                self._threads.remove(thread)

        thread = threading.Thread(target=work_and_close, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:  # the server is unavailable, so the proxy is too
                client.close()
                continue
            with self._lock:
                self._ends += [client, server]
            self._start(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """One connection, until either side ends it."""
        answers = threading.Thread(target=self._answers, args=(client, server), daemon=True)
        answers.start()
        self._requests(client, server)
        answers.join()
        with self._lock:
            for end in (client, server):
                self._ends.remove(end)
                self._deaf.discard(end)
                end.close()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        watched, started = b"", False
        with suppress(OSError):
            while data := client.recv(_CHUNK):
                watched += data
                commits = False
                while (size := _size(watched, started=started)) and len(watched) >= size:
                    message, watched = watched[:size], watched[size:]
                    if started:
                        commits |= message[:1] in b"QP" and b"COMMIT" in message
                    else:
                        started = struct.unpack("!i", message[4:8])[0] not in _NEGOTIATIONS
                loss = self._next_loss() if commits else None
                if loss is Loss.REQUEST:
                    break
                if loss is Loss.ANSWER:
                    self._deaf.add(server)
                server.sendall(data)
                if loss is Loss.CLIENT:
                    _cut(client)
                    return
        _cut(client)
        _cut(server)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(_CHUNK):
                if server in self._deaf:
                    break
                client.sendall(data)
        _cut(client)
        _cut(server)

    def _next_loss(self) -> Loss | None:
        with self._lock:
            return self._losses.pop(0) if self._losses else None


def _size(watched: bytes, *, started: bool) -> int:
    """Bytes of the message that begins here; 0 if its length has not arrived yet."""
    if started:
        return 1 + int(struct.unpack("!i", watched[1:5])[0]) if len(watched) >= 5 else 0
    return int(struct.unpack("!i", watched[:4])[0]) if len(watched) >= 4 else 0


def _cut(end: socket.socket) -> None:
    # A plain close() sends no FIN while another thread waits in recv().
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


CAN_DROP = sys.platform == "linux"


def _drop_none(end: socket.socket) -> None:
    with suppress(OSError):  # closed meanwhile, or it has no filter
        end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _drop_all(end: socket.socket) -> None:
    """A socket filter with one instruction: keep 0 bytes of each packet."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with suppress(OSError):  # the socket has been closed meanwhile
        end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
