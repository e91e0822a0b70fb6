"""A connection that does not wait forever, and reports which lock it waits for.

Where the server is stopped or its disk hangs, the kernel below it still acknowledges every packet:
neither keepalive nor ``tcp_user_timeout`` ends the wait, and the server checks none of its own
timeouts. So while a statement has no answer, the connection itself checks whether the server lives.
"""

import socket
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg.abc import PQGen

from pipeline import handshakes
from pipeline.db.postgres_errors import SilentServerError, add_address

log = structlog.get_logger(__name__)

LOCK_CHECK_S = 2.0
"""After this time without an answer, the connection checks whether its statement waits for a lock,
and for whose. It checks again after as long as it has waited."""
LOCK_CHECK_S_MAX = 300.0
"""Longest time between two such checks."""
NOT_KNOWN = "another session holds a lock"
SILENCE_S = 5.0
"""After this time without an answer, the connection checks whether the server lives."""
ALIVE_S_MAX = 10.0
"""Longest wait for the answer to that check."""

Result = TypeVar("Result")


class WatchedConnection(psycopg.Connection[Any]):
    """A connection to PostgreSQL whose waits are watched.

    Attributes:
        where: Host, port, database and user, for messages.
        answer_s_max: Longest wait for an answer; None for as long as the server lives.
        who_blocks: Reports, by another session, which lock this one waits for and who holds it.
            None until the session has our settings.
    """

    where: str | None = None
    answer_s_max: float | None = None
    who_blocks: Callable[[], str | None] | None = None
    _given_up: SilentServerError | None = None
    _blocked_by: str | None = None

    def wait(self, gen: PQGen[Result], *arguments: Any, **options: Any) -> Result:
        """Every wait of psycopg comes through here: statements, COPY, COMMIT."""
        if self._given_up is not None:
            raise self._given_up
        self._blocked_by = None
        try:
            return super().wait(self._watched(gen), *arguments, **options)
        except psycopg.Error as refused:
            if self.where:
                add_address(refused, self.where)
            if isinstance(refused, psycopg.errors.LockNotAvailable):
                refused.add_note(self._blocked_by or NOT_KNOWN)
            raise

    def _watched(self, gen: PQGen[Result]) -> Generator[Any, Any, Result]:
        answered_at = time.monotonic()
        server_check_at = answered_at + SILENCE_S
        lock_check_at = answered_at + LOCK_CHECK_S
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    answered_at, server_check_at = now, now + SILENCE_S
                    lock_check_at = now + LOCK_CHECK_S
                elif self.answer_s_max is not None and now - answered_at > self.answer_s_max:
                    self._give_up(f"no answer to a statement within {self.answer_s_max:.0f} s")
                elif now > server_check_at:
                    self._check_server(now - answered_at)
                    server_check_at = time.monotonic() + SILENCE_S
                elif now > lock_check_at:
                    self._check_locks(now - answered_at)
                    lock_check_at = time.monotonic() + min(now - answered_at, LOCK_CHECK_S_MAX)
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _check_locks(self, waited_s: float) -> None:
        blocked_by = self.who_blocks() if self.who_blocks else None
        if blocked_by:
            # Kept when a later check finds nothing: the lock timeout may have ended the wait since.
            self._blocked_by = blocked_by
            log.warning(
                "waiting_for_lock",
                waited_s=round(waited_s),
                reason=blocked_by,
                effect="waits until the lock is free or the lock timeout ends it",
            )

    def _check_server(self, silent_s: float) -> None:
        if not self._server_lives():
            self._give_up(
                f"it accepts no new connections, and has sent nothing for {silent_s:.0f} s"
            )
        if silent_s < 2 * SILENCE_S:  # the first check
            log.info(
                "server_slow",
                silent_s=round(silent_s),
                effect="waiting; the server still answers new connections",
            )

    def _give_up(self, why: str) -> None:
        # The transaction may still be committed, by a server that continues: an unknown outcome.
        self._given_up = SilentServerError(why)
        self.close()
        raise self._given_up

    def _server_lives(self) -> bool:
        """Whether it answers a new connection."""
        host, port = self.info.hostaddr or self.info.host, self.info.port
        try:
            with _dial(host, port) as connection:
                connection.settimeout(ALIVE_S_MAX)
                connection.sendall(handshakes.SSL_REQUEST)
                return bool(connection.recv(1))
        except OSError:
            return False


def _dial(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), ALIVE_S_MAX)
    local = socket.socket(socket.AF_UNIX)
    local.settimeout(ALIVE_S_MAX)
    local.connect(f"{host}/.s.PGSQL.{port}")
    return local
