"""The servers of a run, its topics, and the real command as a process of its own."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psycopg

from pipeline.embedded.postgres import PostgresServer
from pipeline.migrate import migrate
from pipeline.simulator import Simulation
from pipeline.simulator.producer import Producer
from tests.servers import Kafka, KafkaServer, Postgres, find_kafka, find_postgres
from tests.servers.databases import Database, fresh_database
from tests.servers.kafka import class_path

SEED = 7
PARTITIONS = 6
SAMPLE_S = 0.05
"""How often a process's memory is looked at."""
SERVER_SETTINGS = {
    # A checkpoint in the middle would hit one side of a pair and not the other; there is one
    # before each measurement instead. Everything that makes a commit last is at its default: on.
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "shared_buffers": "512MB",
    "track_commit_timestamp": "on",
}


@dataclass(frozen=True)
class Finished:
    """What a process has cost.

    Attributes:
        seconds: From its start to its end.
        cpu_s: User and system time.
        peak_bytes: Most memory that was resident at a time.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Stage:
    """A PostgreSQL, an Apache Kafka, and a migrated database to copy."""

    postgres: Postgres
    kafka: Kafka
    template: Database

    @contextlib.contextmanager
    def database(self) -> Iterator[Database]:
        """A fresh database with the pipeline's schema, its pages written back."""
        with fresh_database(self.postgres, template=self.template) as database:
            self.settle()
            yield database

    def settle(self) -> None:
        """Write back what is dirty, so that each measurement begins at the same place."""
        with psycopg.connect(self.postgres.dsn(), autocommit=True) as connection:
            connection.execute("CHECKPOINT")

    def load(self, events: int, *, about: bytes = b"", topic: str | None = None) -> str:
        """A topic with so many simulated events, in partitions; its name.

        Args:
            events: How many.
            about: Only those that hold this text, e.g. a part of their type.
            topic: Put them behind what this one has; None for a new one.
        """
        if topic is None:
            topic = f"benchmark-{events}-{secrets.token_hex(3)}"
            self.kafka.create_topic(topic, PARTITIONS)
        simulated = Simulation(
            seed=SEED, events=None, topic=topic, partitions=PARTITIONS, keep_books=False
        )
        wanted = (record for record in simulated if about in (record.value or b""))
        with Producer({"bootstrap.servers": self.kafka.bootstrap_servers}) as producer:
            produced = producer.produce(islice(wanted, events))
        assert produced == events
        return topic

    def ingest(self, topic: str, database: Database) -> Finished:
        """``pipeline ingest --until-end`` of a topic, with default settings."""
        return run_process(
            [sys.executable, "-m", "pipeline", "ingest", "--until-end"],
            self.environment(topic, database),
        )

    def environment(self, topic: str, database: Database) -> dict[str, str]:
        """What tells the pipeline to read a topic into a database, as a group of its own."""
        return {
            "PIPELINE_DATABASE_URL": database.dsn,
            "PIPELINE_KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "PIPELINE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            "PIPELINE_TOPICS": topic,
            "PIPELINE_GROUP_ID": f"benchmark-{secrets.token_hex(6)}",
        }

    def server_cpu_s(self) -> float | None:
        """CPU that PostgreSQL's processes have used so far; None where they are not ours to see."""
        if not isinstance(self.postgres, PostgresServer) or sys.platform != "linux":
            return None
        return _cpu_with_children(self.postgres.pid)

    def kafka_version(self) -> str:
        """The version of the broker, where it is one of our own."""
        if not isinstance(self.kafka, KafkaServer):
            return "an endpoint or a container"
        found = re.search(r"kafka_[\d.]+-([\d.]+)\.jar", class_path())
        return found[1] if found else "unknown"

    def postgres_version(self) -> str:
        """Version and the settings that decide about durability."""
        with psycopg.connect(self.postgres.dsn()) as connection:
            names = (
                *("server_version", "fsync", "synchronous_commit", "full_page_writes"),
                *("shared_buffers", "max_wal_size"),
            )
            rows = [connection.execute(f"SHOW {name}").fetchone() for name in names]
        values = [str(row[0]) for row in rows if row]
        settings = zip(names[1:], values[1:], strict=True)
        return f"{values[0]} ({', '.join(f'{name} {value}' for name, value in settings)})"


@contextlib.contextmanager
def set_up(postgres_version: int) -> Iterator[Stage]:
    """Both servers, for the length of the block."""
    with (
        find_postgres(postgres_version, SERVER_SETTINGS) as postgres,
        find_kafka() as kafka,
        fresh_database(postgres) as template,
    ):
        migrate(template.url)
        yield Stage(postgres, kafka, template)


def run_process(command: list[str], environment: dict[str, str]) -> Finished:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; the message ends with its last lines.
    """
    with tempfile.TemporaryFile("w+") as said:
        begun = time.monotonic()
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=said, stderr=said
        )
        peak = 0
        # The kernel's ru_maxrss of a child begins with that of its parent, so we look ourselves.
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(SAMPLE_S)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            last = "".join(said.readlines()[-20:])
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
    return Finished(seconds, used.ru_utime + used.ru_stime, peak or used.ru_maxrss * 1024)


_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = _PEAK.search(status)
    return int(found[1]) * 1024 if found else 0


def _cpu_with_children(pid: int) -> float:
    """CPU of a process, of its children that live, and of those that have ended."""
    ticks = sum(_ticks(pid))
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                ticks += sum(_ticks(int(child))[:2])
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> tuple[int, int, int, int]:
    """User and system ticks of a process, and of its children that have ended."""
    # The second field, the name in parentheses, may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = map(int, fields[11:15])
    return user, system, children_user, children_system
