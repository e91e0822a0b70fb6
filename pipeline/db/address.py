"""Where to connect and as which user; a password that changes while we run."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

from pipeline import causes
from pipeline.backoff import LOGIN_RETRY_S
from pipeline.db import session
from pipeline.db.connection import WatchedConnection
from pipeline.db.postgres_errors import UnreachableError, add_address
from pipeline.handshakes import sqlstates_of_refusal, why_refused

log = structlog.get_logger(__name__)

# A URL may set other values.
_TRANSPORT = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_NOT_VERIFIED = re.compile(
    r'server at "(?P<host>[^"]+)".*?, port (?P<port>\d+) failed: '
    r"SSL error: certificate verify failed"
)


class Address:
    """Where to connect and as which user.

    Args:
        url: As libpq takes it; with a password.
        fixed: Parameters of libpq that the URL cannot change.
        fresh_url: Reads the URL again; None where it cannot change.

    Attributes:
        parameters: Of libpq, the password among them.
        where: Host, port, database and user, for messages.
    """

    def __init__(
        self, url: str, fixed: Mapping[str, Any], fresh_url: Callable[[], str] | None
    ) -> None:
        self._fixed = fixed
        self._fresh_url = fresh_url
        self._refused: tuple[float, UnreachableError] | None = None
        self._causes: dict[str, causes.Cause] = {}
        self._use(url)

    def _use(self, url: str) -> None:
        given = session.parameters_of(url)
        self._url = url
        self.parameters = {**_TRANSPORT, **given, **self._fixed}
        user = given.get("user") or os.environ.get("PGUSER")
        self.where = session.address_of(url) + (f" for user {user}" if user else "")

    def connect(self, options: Mapping[str, Any]) -> WatchedConnection:
        """A new connection. If the login is refused and the password has changed, by the new one.

        A refused login is not tried again for ``LOGIN_RETRY_S``, whoever wants a connection.
        """
        if self._refused and not self._has_changed():
            refused_at, error = self._refused
            if time.monotonic() - refused_at < LOGIN_RETRY_S:
                raise error
        try:
            connection = self._connect(options)
        except UnreachableError as error:
            if error.cause not in causes.LOGINS:
                raise
            self._refused = (time.monotonic(), error)
            if not self._has_changed():
                raise
            connection = self._connect(options)
        self._refused = None
        return connection

    def _connect(self, options: Mapping[str, Any]) -> WatchedConnection:
        try:
            return WatchedConnection.connect(**{**self.parameters, **options})
        except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
            refused = session.login_refused(error, self.where)
            words = self._explained(str(error))
            unreachable = UnreachableError(words, self._cause(words))
        if refused is not None:
            raise refused
        add_address(unreachable, self.where)
        raise unreachable

    def _cause(self, words: str) -> causes.Cause:
        """Why libpq could not connect: by its message, else by the code of the server.

        The code for the same message is requested once, as that takes one more attempt to log in.
        """
        if cause := causes.of_libpq(words):
            return cause
        if words not in self._causes:
            conninfo = make_conninfo(**self.parameters)
            self._causes = {words: causes.of_login(sqlstates_of_refusal(conninfo))}
        return self._causes[words]

    def _explained(self, words: str) -> str:
        """Libpq's message, with the reason where it only says that a certificate is refused."""
        found = _NOT_VERIFIED.search(words)
        if not found:
            return words
        authority = self.parameters.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
        why = why_refused(
            found["host"],
            int(found["port"]),
            str(authority or Path.home() / ".postgresql" / "root.crt"),
            is_postgres=True,
        )
        return f"{words.rstrip()}: {why}" if why else words

    def _has_changed(self) -> bool:
        """Whether the URL has changed since it was last read; if so, it is used from now on."""
        if self._fresh_url is None:
            return False
        url = self._fresh_url()
        if url == self._url:
            return False
        log.info("password_reloaded", server="PostgreSQL", effect="the new login is used")
        self._use(url)
        return True
