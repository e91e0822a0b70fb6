"""PgBouncer before a PostgreSQL, with its defaults except for addresses and login."""

import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

import psycopg

from pipeline.sandbox.servers.guard import Guarded
from pipeline.sandbox.servers.postgres import _server_account, free_port
from tests.servers import Postgres

PoolMode = Literal["session", "transaction", "statement"]

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0
POLL_SECONDS = 0.02


def find_pgbouncer() -> Path | None:
    """The program; None if it is not on this machine."""
    found = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    return Path(found) if found else None


class PgBouncer:
    """A pooler before one PostgreSQL, for logins as its superuser.

    Args:
        server: The PostgreSQL.
        mode: When a session returns to the pool.
        settings: Anything for the section ``[pgbouncer]``.
    """

    def __init__(
        self,
        server: Postgres,
        mode: PoolMode = "session",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        found = find_pgbouncer()
        if found is None:
            raise RuntimeError("pgbouncer is not on this machine: apt-get install pgbouncer")
        self._program = found
        self._login = psycopg.conninfo.conninfo_to_dict(server.dsn())
        self._settings = {"pool_mode": mode, **(settings or {})}
        self._account = _server_account()
        self.port = free_port()

    def dsn(self, database: str = "postgres") -> str:
        """The URL through the pooler, for libpq."""
        user, password = (quote(str(self._login[key]), safe="") for key in ("user", "password"))
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="pipeline-pgbouncer-"))
        users = self._folder / "users.txt"
        users.write_text(f'"{self._login["user"]}" "{self._login["password"]}"\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(users),
            **self._settings,
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        target = f"* = host={self._login['host']} port={self._login['port']}\n"
        configuration = self._folder / "pgbouncer.ini"
        configuration.write_text(f"[databases]\n{target}[pgbouncer]\n{''.join(lines)}")
        if self._account is not None:
            for path in (self._folder, users, configuration):
                shutil.chown(path, self._account.uid, self._account.gid)
        self._log = self._folder / "pgbouncer.log"
        self._process = Guarded(
            [self._program, configuration], log=self._log, account=self._account
        )
        self._wait_until_it_answers()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.end(signal.SIGTERM, grace_seconds=STOP_SECONDS_MAX)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                psycopg.connect(self.dsn(), connect_timeout=2).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline or self._process.exit_status() is not None:
                    self.__exit__()
                    raise RuntimeError(f"PgBouncer did not start: {error}") from error
                time.sleep(POLL_SECONDS)
            else:
                return
