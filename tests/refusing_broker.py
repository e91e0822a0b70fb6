"""A Kafka broker without users: it refuses every login."""

import socketserver
import struct
import threading
from types import TracebackType
from typing import Self

_API_VERSIONS, _SASL_HANDSHAKE, _SASL_AUTHENTICATE = 18, 17, 36
_UNSUPPORTED_VERSION, _SASL_AUTHENTICATION_FAILED = 35, 58
# Key, oldest and newest version of each request, with Metadata and FindCoordinator, which every
# client requires.
_ANSWERS = [(3, 0, 4), (10, 0, 0), (17, 0, 1), (18, 0, 0), (36, 0, 0)]
_WHY = b"Authentication failed during authentication due to invalid credentials"


class RefusingBroker:
    """Listens on the loopback until the block ends.

    Attributes:
        logins: The bytes that clients have sent to log in.
    """

    def __init__(self) -> None:
        self.logins: list[bytes] = []
        logins = self.logins

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while len(size := self.rfile.read(4)) == 4:
                    request = self.rfile.read(int.from_bytes(size))
                    key, version, correlation = struct.unpack(">hhi", request[:8])
                    if key == _SASL_AUTHENTICATE:
                        logins.append(request[8:])
                    body = struct.pack(">i", correlation) + _answer(key, version)
                    self.wfile.write(struct.pack(">i", len(body)) + body)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])

    @property
    def bootstrap_servers(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _answer(key: int, version: int) -> bytes:
    if key == _API_VERSIONS:
        error = _UNSUPPORTED_VERSION if version > 0 else 0
        listed = b"".join(struct.pack(">hhh", *versions) for versions in _ANSWERS)
        return struct.pack(">hi", error, len(_ANSWERS)) + listed
    if key == _SASL_HANDSHAKE:
        return struct.pack(">hi", 0, 1) + struct.pack(">h", 5) + b"PLAIN"
    assert key == _SASL_AUTHENTICATE, f"request {key} before the login"
    return struct.pack(">hh", _SASL_AUTHENTICATION_FAILED, len(_WHY)) + _WHY + struct.pack(">i", 0)
