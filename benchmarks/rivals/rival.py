"""The common interface of all rivals, and how each is run."""

import hashlib
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg.errors import UndefinedTable

from benchmarks.filling import fill, one_row
from benchmarks.report import Run
from benchmarks.stage import Finished, Stage, run_process
from tests.servers.databases import Database

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".bench"
"""The folder in which each rival is installed on first use."""


class CannotRunError(RuntimeError):
    """A rival cannot run here; the message has the reason, for the report."""


@dataclass(frozen=True)
class Job:
    """The work of a rival: write every record of a topic to its table.

    Attributes:
        bootstrap_servers: Of Kafka.
        topic: Its values are events in JSON.
        group: A new consumer group.
        rows: How many records the topic holds.
        database: The database with the rival's empty table.
        folder: A folder for the files of this run.
    """

    bootstrap_servers: str
    topic: str
    group: str
    rows: int
    database: Database
    folder: Path


@dataclass(frozen=True)
class Command:
    """A process to run, and the variables added to its environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Rival:
    """An alternative that a user could choose.

    Attributes:
        name: Its usual name.
        version: The pinned version.
        settings: Its settings that are not defaults, and the reason for its table.
        lacks: The guarantees that it lacks and we have.
        wanted: The ratio of our rate to its rate that we want.
        install: Makes it ready below ``ENVIRONMENTS``, or raises ``CannotRunError``.
    """

    name: str
    version: str
    settings: str
    lacks: str
    wanted: float
    install: Callable[[], None]


@dataclass(frozen=True)
class Reader(Rival):
    """A rival of ingest: Kafka into a table.

    Attributes:
        command: The process that does a job.
        table: The table to which it writes the rows.
        prepare: Statements that make it, with ``ingested_at DEFAULT now()``; they may say
            ``%(topic)s``.
    """

    command: Callable[[Job], Command]
    prepare: Sequence[str]
    table: str = "stored"

    def run(self, stage: Stage, topic: str, rows: int) -> Run:
        """Let it read a topic into a fresh database, and measure it by PostgreSQL's clock.

        It is ended once the last record of each partition is there: rivals write a partition in
        order, and the rows are counted afterwards.
        """
        with (
            stage.database() as database,
            tempfile.TemporaryDirectory(prefix="pipeline-rival-") as folder,
        ):
            with database.connect() as connection:
                for statement in self.prepare:
                    connection.execute(statement.encode(), {"topic": topic})
            command = self.command(
                Job(
                    bootstrap_servers=stage.kafka.bootstrap_servers,
                    topic=topic,
                    group=f"benchmark-{secrets.token_hex(6)}",
                    rows=rows,
                    database=database,
                    folder=Path(folder),
                )
            )
            last_records = ", ".join(
                f"({part}, {end - 1})" for part, end in stage.ends(topic).items()
            )
            still_missing = (
                f"SELECT {len(stage.ends(topic))} - count(*) FROM {self.table} "
                f'WHERE (partition, "offset") IN ({last_records})'
            )

            def work() -> Finished:
                return run_process(
                    list(command.arguments),
                    command.environment,
                    until=lambda: one_row(database, still_missing) == (0,),
                )

            return fill(stage, database, rows, work, table=self.table)


@dataclass(frozen=True)
class Projecting(Rival):
    """A rival of rebuild: the events of orders into ``benchmark.orders``.

    Attributes:
        prepare: Gives the rival the events of a database's ``pipeline.events`` in its own form,
            none of them projected.
        command: The process that projects them.
        handled: A query: how many events it has projected so far.
    """

    prepare: Callable[[Database], None]
    command: Callable[[Database], Command]
    handled: str

    def run(self, database: Database, events: int) -> Run:
        """Let it project so many events, and measure it from the first one that PostgreSQL shows.

        It is ended once it has handled all.
        """
        with database.connect() as connection:
            connection.execute("TRUNCATE benchmark.orders")
        self.prepare(database)
        command = self.command(database)
        seen: list[tuple[float, int]] = []

        def all_handled() -> bool:
            try:
                (handled,) = one_row(database, self.handled)
            except UndefinedTable:  # it has not made it yet
                return False
            if handled:
                seen.append((time.monotonic(), handled))
            return bool(handled == events)

        finished = run_process(list(command.arguments), command.environment, until=all_handled)
        (first_at, first), (last_at, last) = seen[0], seen[-1]
        return Run(
            rate=(last - first) / (last_at - first_at),
            client_us=finished.cpu_s / events * 1e6,
            whole_rate=events / finished.seconds,
        )


def virtual_environment(requirements: Path) -> Path:
    """The Python of an environment that holds exactly these, installed by their hashes.

    Raises:
        CannotRunError: They could not be had.
    """
    folder = environment(requirements)
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run_installer([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run_installer([*pip, "--require-hashes", "--requirement", str(requirements)])
        (folder / "installed").touch()
    return python


def environment(pins: Path) -> Path:
    """The folder of what a file pins; another folder once the file says something else."""
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    return ENVIRONMENTS / f"{pins.parent.name}-{digest}"


def run_installer(command: Sequence[str], *, folder: Path | None = None) -> None:
    """Run an installer to its end.

    Raises:
        CannotRunError: It is not on this machine, or failed; with its last words.
    """
    if shutil.which(command[0]) is None:
        raise CannotRunError(f"{command[0]} is not installed")
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = " ".join(done.stdout.strip().splitlines()[-3:])
        raise CannotRunError(f"`{' '.join(command[:3])} …` failed: {last}")
