"""PostgreSQL: the engine, and one transaction at a time.

Driver exceptions stop here: ``translated`` turns them into the program's own.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, MetaData, create_engine, event
from sqlalchemy.exc import DBAPIError

from pipeline import causes, session, stored_times
from pipeline.blockers import who_blocks
from pipeline.errors import PipelineError
from pipeline.handshakes import SSL_REQUEST, sqlstates_of_refusal, why_refused
from pipeline.postgres_errors import SilentServerError, UnreachableError, place, translate

log = structlog.get_logger(__name__)

LOG_SCHEMA = "pipeline"
READ_SCHEMA = "upvest"
SHADOW_SCHEMA = "pipeline_shadow"

LOCK_LOOK_S = 2.0
"""How long a statement may take before we look whether it waits for a lock, and for whose; again
after as long as it has waited."""
NOT_SEEN = "another session holds a lock"
LOCK_LOOK_S_MAX = 300.0
"""Longest time between two such looks."""
SILENCE_S = 5.0
"""How long the server may say nothing to a statement before we ask whether it lives."""
ALIVE_S_MAX = 10.0
"""Longest wait for the answer to that."""
LOGIN_RETRY_S = 15.0
"""How long a refused login is not tried again: accounts are locked after too many."""

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)
"""Every table that the program declares; migrations and this agree, which a test proves."""


class SessionLimits(BaseModel):
    """How long a session of ours may hold up others.

    Attributes:
        idle_in_transaction: After this long without a statement inside a transaction the server
            ends the session; so a stopped process cannot keep a partition's row locked.
        lock_wait: Longest wait for any lock.
        answer: Besides that, longest wait for a statement's answer from a server that lives; None
            for as long as it takes.
    """

    model_config = ConfigDict(frozen=True)

    idle_in_transaction: timedelta = timedelta(seconds=10)
    lock_wait: timedelta = timedelta(seconds=10)
    answer: timedelta | None = None


def open_engine(
    url: str,
    *,
    application: str,
    limits: SessionLimits | None = None,
    pool_size: int = 4,
    read_only: bool = False,
    fresh_url: Callable[[], str] | None = None,
) -> Engine:
    """An engine whose sessions have our settings, and are given up by the server when we vanish.

    Nothing is connected yet. Half-open connections end after about 30 seconds on both sides
    (keepalive and ``tcp_user_timeout``), instead of the two hours of an ordinary socket. A server
    that hangs is given up in 15 seconds, whatever it was asked.

    Args:
        url: ``postgresql://…`` as libpq takes it; it may hold a password, so it is never shown.
        application: Shown as ``application_name``, e.g. ``pipeline ingest``.
        limits: How long a session may hold up others.
        pool_size: Most connections open at a time.
        read_only: A standby will do, and nothing can be written; else only a primary.
        fresh_url: Reads the URL again. When the login is refused, another one than before is used
            from then on: passwords change while we run.
    """
    limits = limits or SessionLimits()
    ours = session.Ours(
        idle_in_transaction_ms=_milliseconds(limits.idle_in_transaction),
        lock_wait_ms=_milliseconds(limits.lock_wait),
        read_only=read_only,
    )
    fixed = {
        "application_name": application,
        "client_encoding": "UTF8",
        "target_session_attrs": "any" if read_only else "primary",
    }
    address = _Address(url, fixed, fresh_url)
    engine = create_engine(
        "postgresql+psycopg://", pool_size=pool_size, max_overflow=0, hide_parameters=True
    )

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: object, _record: object, _arguments: list[Any], options: dict[str, Any]
    ) -> "_Session":
        connection = address.connect(options)
        connection.where = address.where
        connection.answer_s_max = session.PROBE_S_MAX
        try:
            probe = partial(_probe, connection, address.parameters)
            begun = session.begin(connection, ours, probe)
        except BaseException:
            connection.close()
            raise
        if begun.acts_as:
            connection.where += f", which acts as role {begun.acts_as} (ALTER ROLE … SET role)"
        connection.answer_s_max = None
        connection.who_blocks = partial(_who_blocks, probe, ours, begun.pid)
        stored_times.register(connection)
        if limits.answer is not None:
            connection.answer_s_max = (limits.lock_wait + limits.answer).total_seconds()
        return connection

    return engine


# What a URL may say otherwise.
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


class _Address:
    """Where to connect, and as whom.

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

    def connect(self, options: Mapping[str, Any]) -> "_Session":
        """A new connection; if the login is refused and there is a new password, by that one.

        A refused login is not tried again for ``LOGIN_RETRY_S``, whoever wants a connection.
        """
        if self._refused and not self._is_renewed():
            refused_at, error = self._refused
            if time.monotonic() - refused_at < LOGIN_RETRY_S:
                raise error
        try:
            made = self._connect(options)
        except UnreachableError as error:
            if error.cause not in causes.LOGINS:
                raise
            self._refused = (time.monotonic(), error)
            if not self._is_renewed():
                raise
            made = self._connect(options)
        self._refused = None
        return made

    def _connect(self, options: Mapping[str, Any]) -> "_Session":
        try:
            return _Session.connect(**{**self.parameters, **options})
        except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
            refused = session.login_refused(error, self.where)
            words = self._explained(str(error))
            unreachable = UnreachableError(words, self._cause(words))
        if refused is not None:
            raise refused
        place(unreachable, self.where)
        raise unreachable

    def _cause(self, words: str) -> causes.Cause:
        """Why libpq could not connect: by its words, or by the server's code if they do not tell.

        The code of the same words is asked for once, for it takes one more attempt to log in.
        """
        if cause := causes.of_libpq(words):
            return cause
        if words not in self._causes:
            conninfo = make_conninfo(**self.parameters)
            self._causes = {words: causes.of_login(sqlstates_of_refusal(conninfo))}
        return self._causes[words]

    def _explained(self, words: str) -> str:
        """What libpq says, and why a certificate is refused where it says only that it is."""
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

    def _is_renewed(self) -> bool:
        """Whether the URL has changed since it was last read; if so, it is used from now on."""
        if self._fresh_url is None:
            return False
        url = self._fresh_url()
        if url == self._url:
            return False
        log.info("password_read_again", server="PostgreSQL", effect="the new login is used")
        self._use(url)
        return True


def _probe(first: "_Session", parameters: Mapping[str, Any]) -> "_Session":
    """One more connection to the server that the first one has reached; soon, or none."""
    info = first.info
    there: dict[str, Any] = {
        "host": info.host,
        "port": info.port,
        "connect_timeout": ceil(session.PROBE_S_MAX),
    }
    if info.hostaddr and not info.host.startswith("/"):
        there["hostaddr"] = info.hostaddr
    probe = _Session.connect(**{**parameters, **there, "application_name": "pipeline probe"})
    probe.answer_s_max = session.PROBE_S_MAX
    return probe


def _who_blocks(
    another: Callable[[], "_Session"], ours: session.Ours, waiting_pid: int
) -> str | None:
    """What a waiting session waits for, as another one sees it; None if that cannot be had."""
    try:
        with closing(another()) as asking:
            session.begin(asking, ours)
            return who_blocks(asking, waiting_pid)
    except (psycopg.Error, OSError, PipelineError):
        return None


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


# ----------------------------------------------------------------------------- a server that hangs

Result = TypeVar("Result")


class _Session(psycopg.Connection[Any]):
    """A connection that does not wait for ever.

    Where the server is stopped, or its disk hangs, the kernel below it still acknowledges every
    packet: neither keepalive nor ``tcp_user_timeout`` ends the wait, and no timeout of the server's
    own is looked at.
    """

    where: str | None = None
    """Host, port, database and user, for messages."""
    answer_s_max: float | None = None
    _given_up: SilentServerError | None = None
    _blocked_by: str | None = None
    who_blocks: Callable[[], str | None] | None = None
    """Asks another session what this one waits for; not before it has our settings."""

    def wait(self, gen: PQGen[Result], *arguments: Any, **options: Any) -> Result:
        """All that psycopg waits for comes through here: statements, COPY, COMMIT."""
        if self._given_up is not None:
            raise self._given_up
        self._blocked_by = None
        try:
            return super().wait(self._watched(gen), *arguments, **options)
        except psycopg.Error as refused:
            if self.where:
                place(refused, self.where)
            if isinstance(refused, psycopg.errors.LockNotAvailable):
                refused.add_note(self._blocked_by or NOT_SEEN)
            raise

    def _watched(self, gen: PQGen[Result]) -> Generator[Any, Any, Result]:
        heard_at = time.monotonic()
        look_at = heard_at + SILENCE_S
        lock_look_at = heard_at + LOCK_LOOK_S
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard_at, look_at = now, now + SILENCE_S
                    lock_look_at = now + LOCK_LOOK_S
                elif self.answer_s_max is not None and now - heard_at > self.answer_s_max:
                    self._give_up(f"no answer to a statement within {self.answer_s_max:.0f} s")
                elif now > look_at:
                    self._look(now - heard_at)
                    look_at = time.monotonic() + SILENCE_S
                elif now > lock_look_at:
                    self._look_for_locks(now - heard_at)
                    lock_look_at = time.monotonic() + min(now - heard_at, LOCK_LOOK_S_MAX)
                wanted = gen.send(ready)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _look_for_locks(self, waited_s: float) -> None:
        self._blocked_by = self.who_blocks() if self.who_blocks else None
        if self._blocked_by:
            log.warning(
                "waiting_for_lock",
                waited_s=round(waited_s),
                reason=self._blocked_by,
                effect="waits until the lock is free or the lock timeout ends it",
            )

    def _look(self, silent_s: float) -> None:
        if not self._server_lives():
            self._give_up(f"it takes connections no more, and was silent for {silent_s:.0f} s")
        if silent_s < 2 * SILENCE_S:  # the first look
            log.info(
                "server_slow", silent_s=round(silent_s), effect="waiting; it still answers others"
            )

    def _give_up(self, why: str) -> None:
        # The transaction may still be committed, by a server that wakes up: an unknown outcome.
        self._given_up = SilentServerError(why)
        self.close()
        raise self._given_up

    def _server_lives(self) -> bool:
        """Whether it answers somebody who begins to talk to it."""
        host, port = self.info.hostaddr or self.info.host, self.info.port
        try:
            with _dial(host, port) as asking:
                asking.settimeout(ALIVE_S_MAX)
                asking.sendall(SSL_REQUEST)
                return bool(asking.recv(1))
        except OSError:
            return False


def _dial(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), ALIVE_S_MAX)
    near = socket.socket(socket.AF_UNIX)
    near.settimeout(ALIVE_S_MAX)
    near.connect(f"{host}/.s.PGSQL.{port}")
    return near


# ------------------------------------------------------------------------------------- transactions


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """All or nothing: commits at the end of the block, rolls back when it raises.

    Raises:
        TransientError: The server went away or ended the transaction to resolve a conflict. If it
            happened at COMMIT, whether the transaction took effect is unknown.
        PoisonRecordError: A value was refused.
        MissingSegmentError: No segment of the log covers an offset.
        ConfigurationError: Login, rights or schema are wrong.
        InvariantError: Anything else, a unique violation among them.
    """
    with translated(), engine.begin() as db:
        yield db


def descriptor(db: Connection) -> int:
    """The file descriptor of a connection's socket, for the fail points that cut it."""
    return int(db.connection.driver_connection.fileno())  # type: ignore[union-attr]  # psycopg's


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's exceptions into ours."""
    try:
        yield
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise translate(error.orig) from None
        raise
    except psycopg.Error as error:
        raise translate(error) from None
