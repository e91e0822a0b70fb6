"""What a server does with TLS, by a handshake of our own.

libpq and librdkafka say "certificate verify failed" for an unknown authority, an expired
certificate and a wrong host name alike; OpenSSL tells them apart. And a port with TLS closes a
connection without it, or the other way round, as a port whose server restarts does.

libpq drops the code of a refused login, and the words are in the language of the server's
lc_messages.
"""

import re
import select
import socket
import ssl
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from psycopg import pq
from psycopg.pq.abc import PGconn

SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
"""Asks a PostgreSQL whether it speaks TLS; it answers with one byte, before any login."""

_API_VERSIONS = bytes.fromhex("0000000a 0012 0000 00000001 ffff")
"""Kafka's first request: size, ApiVersions, version 0, correlation id 1, no client id."""

ANSWER_S_MAX = 3.0
"""Longest wait for each answer of the server."""
LOGIN_S_MAX = 5.0
"""Longest wait for all answers of a login."""


def why_refused(host: str, port: int, authority: str, *, is_postgres: bool = False) -> str | None:
    """OpenSSL's words on why it refuses the certificate, e.g. ``certificate has expired``.

    Args:
        host: As the certificate must name it.
        port: Of the server.
        authority: File with the authorities' certificates; those of this machine if there is none.
        is_postgres: Whether the server must first be asked, in PostgreSQL's protocol, to begin TLS.

    Returns:
        None where the handshake succeeds or the server cannot be reached.
    """
    known = authority if Path(authority).is_file() else None
    try:
        _shake_hands(ssl.create_default_context(cafile=known), host, port, is_postgres=is_postgres)
    except ssl.SSLCertVerificationError as refused:
        return str(refused.verify_message)
    except (OSError, ValueError):
        return None
    return None


def speaks_tls(host: str, port: int) -> bool:
    """Whether a server answers the beginning of a TLS handshake, whatever its certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _shake_hands(context, host, port)
    except ssl.SSLError as refused:
        # It wants a certificate of ours, or another version; without TLS the words are not its own.
        return "ALERT" in (refused.reason or "")
    except (OSError, ValueError):
        return False
    return True


def speaks_kafka(host: str, port: int) -> bool:
    """Whether a server answers Kafka's first request without TLS."""
    try:
        with socket.create_connection((host, port), ANSWER_S_MAX) as dialed:
            dialed.sendall(_API_VERSIONS)
            return dialed.recv(8)[4:] == _API_VERSIONS[8:12]
    except OSError:
        return False


_REFUSAL = re.compile(rb'^B\t\d+\tErrorResponse\t.*? V "[A-Z]+" C "([0-9A-Z]{5})"', re.MULTILINE)


def sqlstates_of_refusal(conninfo: str) -> Sequence[str]:
    """The codes with which PostgreSQL refuses a connection, in the order of the hosts.

    It is one more attempt to log in, for libpq gives the code to its trace alone.

    Args:
        conninfo: As libpq takes it.

    Returns:
        Nothing where the connection succeeds now, or no server answers within ``LOGIN_S_MAX``.
    """
    with tempfile.TemporaryFile() as trace:
        connection = pq.PGconn.connect_start(conninfo.encode())
        try:
            if connection.status == pq.ConnStatus.BAD:
                return []
            connection.trace(trace.fileno())
            connection.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
            _finish_login(connection)
            connection.untrace()  # which also writes what is buffered
        finally:
            connection.finish()
        trace.seek(0)
        return [code.decode() for code in _REFUSAL.findall(trace.read())]


def _finish_login(connection: PGconn) -> None:
    deadline = time.monotonic() + LOGIN_S_MAX
    while (left_s := deadline - time.monotonic()) > 0:
        match connection.connect_poll():
            case pq.PollingStatus.READING:
                select.select([connection.socket], [], [], left_s)
            case pq.PollingStatus.WRITING:
                select.select([], [connection.socket], [], left_s)
            case _:
                return


def _shake_hands(
    context: ssl.SSLContext, host: str, port: int, *, is_postgres: bool = False
) -> None:
    with socket.create_connection((host, port), ANSWER_S_MAX) as dialed:
        if is_postgres:
            dialed.sendall(SSL_REQUEST)
            dialed.recv(1)
        context.wrap_socket(dialed, server_hostname=host).close()
