"""The servers and workers of the demo. They end with it, however it ends."""

import os
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

from sqlalchemy import Engine

from pipeline.db import open_engine
from pipeline.errors import ConfigurationError, ExitCode, PipelineError
from pipeline.sandbox.servers.broker import MockBroker, MockBrokerError
from pipeline.sandbox.servers.guard import Guarded
from pipeline.sandbox.servers.postgres import BinariesMissingError, PostgresServer, ServerStartError
from pipeline.settings.fields import PREFIX
from pipeline.signals import ending

TOPIC = "Notifications"
PARTITIONS = 6
STOP_SECONDS_MAX = 10.0

_T = TypeVar("_T")


class DemoError(PipelineError):
    """The demo cannot continue: a server or a worker failed."""

    exit_code = ExitCode.FOUND


class Worker:
    """One process of `pipeline run`.

    Attributes:
        name: For people.
        pid: Its process id, which the database has too.
        log: The file of its log.
    """

    def __init__(self, number: int, environment: dict[str, str], folder: Path) -> None:
        self.name = f"worker {number}"
        self.log = folder / f"worker-{number}.log"
        self._process = Guarded(
            [sys.executable, "-m", "pipeline", "run"],
            log=self.log,
            env=environment,
            when_orphaned=signal.SIGTERM,
        )
        self.pid = self._process.pid
        self._killed = False

    def kill(self) -> None:
        """SIGKILL."""
        self._killed = True
        self._process.end(signal.SIGKILL, grace_seconds=STOP_SECONDS_MAX)

    def request_stop(self) -> None:
        """SIGTERM, without waiting."""
        self._process.send(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, and wait until it has ended."""
        self._process.end(signal.SIGTERM, grace_seconds=STOP_SECONDS_MAX)

    def check(self) -> None:
        """Raise if it has ended by itself."""
        status = self._process.exit_status()
        if status is not None and not self._killed:
            raise DemoError(f"{self.name} has ended with {status}")


class Environment:
    """PostgreSQL, the broker and the workers, in one folder.

    As a context manager: on exit everything stops and the folder is removed. Every signal that
    ends a command ends the block as Ctrl-C does, and no signal can interrupt the exit.
    """

    def __init__(self) -> None:
        self._parts = ExitStack()
        self._workers: list[Worker] = []
        self._signals = ending()

    def __enter__(self) -> Self:
        for number in self._signals:
            before = signal.signal(number, _interrupt)
            self._parts.callback(signal.signal, number, before)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        # In parallel, so that the exit takes as long as the slowest of them.
        for worker in self._workers:
            worker.request_stop()
        self._parts.close()

    # ------------------------------------------------------------------------------------- starting

    def start_postgres(self) -> PostgresServer:
        """An empty PostgreSQL; its folder is that of the demo.

        Raises:
            ConfigurationError: There are no binaries, or it did not start.
        """
        self.postgres = _started(lambda: self._parts.enter_context(PostgresServer()))
        return self.postgres

    def start_broker(self) -> MockBroker:
        """The mock broker with the topic.

        Raises:
            ConfigurationError: It is not in this librdkafka, or did not start.
        """
        self.broker = _started(lambda: self._parts.enter_context(MockBroker()))
        _started(lambda: self.broker.create_topic(TOPIC, PARTITIONS))
        return self.broker

    def open_engine(self) -> Engine:
        """The demo's own connections to the database."""
        engine = open_engine(self.postgres.url(), application="pipeline demo")
        self._parts.callback(engine.dispose)
        return engine

    def start_worker(self) -> Worker:
        """One more process of `pipeline run`."""
        # Settings of the user for another pipeline must not reach these.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        worker = _started(
            lambda: Worker(
                len(self._workers) + 1, {**inherited, **self.settings}, self.postgres.directory
            )
        )
        self._workers.append(worker)
        self._parts.callback(worker.stop)
        return worker

    # ------------------------------------------------------------------------------- while it runs

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a command that works on these servers."""
        return {
            "PIPELINE_DATABASE_URL": self.postgres.url(),
            "PIPELINE_KAFKA_BOOTSTRAP_SERVERS": self.broker.bootstrap_servers,
            "PIPELINE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            # The mock broker assigns partitions under this protocol only.
            "PIPELINE_KAFKA_GROUP_PROTOCOL": "consumer",
            "PIPELINE_TOPICS": TOPIC,
        }

    def write_environment(self) -> Path:
        """A file for `source`: the settings, and the PATH of the commands."""
        path = self.postgres.directory / "environment"
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.settings.items()]
        lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"\n')
        path.touch(mode=0o600)
        path.write_text("".join(lines))
        return path

    @property
    def psql(self) -> str:
        """The command: the system's, or the one that came with the server."""
        own = self.postgres.binaries / "psql"
        return "psql" if shutil.which("psql") or not own.exists() else shlex.quote(str(own))

    def check(self) -> None:
        """Raise if a worker has ended by itself."""
        for worker in self._workers:
            worker.check()

    def keep_logs(self) -> Path | None:
        """Copy the logs to a folder that stays; None if there are none yet."""
        logs = [worker.log for worker in self._workers]
        if hasattr(self, "postgres"):
            logs.append(self.postgres.log)
        existing = [path for path in logs if path.exists()]
        if not existing:
            return None
        folder = Path(tempfile.mkdtemp(prefix="pipeline-demo-logs-"))
        for path in existing:
            shutil.copyfile(path, folder / path.name)
        return folder


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _started(start: Callable[[], _T]) -> _T:
    """Start a server or a worker; raise its error as one of a command."""
    try:
        return start()
    except (BinariesMissingError, ServerStartError, MockBrokerError, OSError) as error:
        raise ConfigurationError(str(error)) from None
