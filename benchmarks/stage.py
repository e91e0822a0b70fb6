"""The servers of a run, its topics, and the real command as a process of its own."""

import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import orjson
import psycopg
from confluent_kafka import Consumer, TopicPartition

from pipeline.sandbox.servers.postgres import PostgresServer
from pipeline.sandbox.simulator import Keying, Simulation
from pipeline.sandbox.simulator.producer import Producer
from pipeline.sandbox.simulator.records import Record
from pipeline.schema.migrate import migrate
from tests.servers import Kafka, KafkaServer, Postgres, find_kafka, find_postgres
from tests.servers.databases import Database, fresh_database
from tests.servers.kafka import class_path

SEED = 7
PARTITIONS = 6
"""The default number of partitions of a topic."""
SAMPLE_S = 0.05
"""How often a process's memory is measured."""
PATIENCE_S = 900.0
"""A process that takes longer is killed."""
SERVER_SETTINGS = {
    # A checkpoint in the middle would hit one side of a pair and not the other; there is one
    # before each measurement instead. The settings of durability are at their default: on.
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "shared_buffers": "512MB",
    "track_commit_timestamp": "on",
}
_PIPELINE = (sys.executable, "-m", "pipeline")


@dataclass(frozen=True)
class Finished:
    """The cost of a process.

    Attributes:
        seconds: From its start to its end, or until the measured work was done.
        cpu_s: User and system time, with the child processes that it has waited for.
        peak_bytes: Peak of resident memory of the process alone, if measured.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int = 0


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
        """Write back dirty pages, so that each measurement starts in the same state."""
        with psycopg.connect(self.postgres.dsn(), autocommit=True) as connection:
            connection.execute("CHECKPOINT")

    def load(
        self,
        events: int,
        *,
        about: bytes = b"",
        size: int | None = None,
        topic: str | None = None,
        partitions: int = PARTITIONS,
        keying: Keying = Keying.USER,
    ) -> str:
        """Make a topic with simulated events; its name.

        Args:
            events: How many.
            about: Only events that contain this text, e.g. a part of their type.
            size: Bytes of each value, see ``sized``; None for their own sizes.
            topic: Append the events to this topic; None for a new topic.
            partitions: How many the topic has.
            keying: By what its records are partitioned; by tenant, one partition has every record.
        """
        if topic is None:
            topic = f"benchmark-{events}-{secrets.token_hex(3)}"
            self.kafka.create_topic(topic, partitions)
        simulated = Simulation(
            seed=SEED,
            events=None,
            topic=topic,
            partitions=partitions,
            keep_books=False,
            keying=keying,
        )
        about_it = (record for record in simulated if about in (record.value or b""))
        wanted = about_it if size is None else sized(about_it, size)
        with Producer({"bootstrap.servers": self.kafka.bootstrap_servers}) as producer:
            produced = producer.produce(islice(wanted, events))
        assert produced == events
        return topic

    def ends(self, topic: str) -> Mapping[int, int]:
        """The end of each partition of a topic that is not empty."""
        asking = Consumer(
            {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": "benchmark"}
        )
        ends = {}
        for number in asking.list_topics(topic, 10).topics[topic].partitions:
            _low, high = asking.get_watermark_offsets(TopicPartition(topic, number), 10)
            if high:
                ends[number] = high
        asking.close()
        return ends

    def ingest(
        self, topic: str, database: Database, *, workers: int = 1, kafka_options: str = ""
    ) -> Finished:
        """``pipeline ingest --until-end`` of a topic, with default settings otherwise."""
        return run_process(
            [*_PIPELINE, "ingest", "--until-end", "--workers", str(workers)],
            {**self.environment(topic, database), "PIPELINE_KAFKA_OPTIONS": kafka_options},
        )

    def warm_up(self, topic: str) -> None:
        """Read a topic once: a broker that has just started is slow for its first reader."""
        with self.database() as database:
            self.ingest(topic, database)

    def project(self, database: Database, *, workers: int = 1) -> Finished:
        """``pipeline project --until-end``, all read models, with default settings."""
        return run_process(
            [*_PIPELINE, "project", "--until-end", "--workers", str(workers)],
            {"PIPELINE_DATABASE_URL": database.dsn},
        )

    def environment(self, topic: str, database: Database) -> dict[str, str]:
        """The environment to read a topic into a database, with a new group."""
        return {
            "PIPELINE_DATABASE_URL": database.dsn,
            "PIPELINE_KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "PIPELINE_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
            "PIPELINE_TOPICS": topic,
            "PIPELINE_GROUP_ID": f"benchmark-{secrets.token_hex(6)}",
        }

    def server_cpu_s(self) -> float | None:
        """CPU that PostgreSQL's processes have used so far; None if they cannot be seen."""
        if not isinstance(self.postgres, PostgresServer) or sys.platform != "linux":
            return None
        return _cpu_with_children(self.postgres.pid)

    def server_us(self, since: float | None, rows: int) -> float | None:
        """CPU of PostgreSQL since an earlier ``server_cpu_s``, microseconds per row."""
        now = self.server_cpu_s()
        return None if since is None or now is None else (now - since) / rows * 1e6

    def kafka_version(self) -> str:
        """The version of the broker, if the benchmark started it."""
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


def sized(records: Iterable[Record], size: int) -> Iterator[Record]:
    """The records whose value can have exactly this size, changed to this size.

    A shorter one gets a longer ``client_reference``; one that is too long by its ``webhook_id``,
    which not all events have, goes without it; the others are left out.
    """
    choose = random.Random(SEED)
    for record in records:
        if record.value is None:
            continue
        event = orjson.loads(record.value)
        event["object"].setdefault("client_reference", "")
        if len(orjson.dumps(event)) > size:
            event.pop("webhook_id", None)
        lacking = size - len(orjson.dumps(event))
        if lacking >= 0:
            event["object"]["client_reference"] += _words(choose, lacking)
            yield record._replace(value=orjson.dumps(event))


def _words(choose: random.Random, length: int) -> str:
    """Text of this length made of words."""
    four_digits_each = choose.randbytes(-(-length // 5) * 2).hex(" ", 2)
    return four_digits_each[:length].ljust(length, "-")


def run_process(
    command: list[str],
    environment: Mapping[str, str],
    *,
    until: Callable[[], bool] = lambda: False,
) -> Finished:
    """Run a command to its end, or until a condition is true.

    Args:
        command: What to run.
        environment: Added to our own.
        until: Called repeatedly; once it returns True, the measured work is done and the process is
            ended. The maximum is ``PATIENCE_S``.

    Raises:
        RuntimeError: It failed; the message ends with its last lines.
    """
    with tempfile.TemporaryFile("w+") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output
        )
        peak, done_after = 0, None
        # The kernel's ru_maxrss of a child begins with that of its parent, so we measure ourselves.
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _peak_bytes(process.pid))
            if done_after is None and until():
                done_after = time.monotonic() - begun
                os.kill(process.pid, signal.SIGTERM)
            elif time.monotonic() - begun > PATIENCE_S:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(SAMPLE_S)
        seconds = done_after or time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and done_after is None:
            output.seek(0)
            last = "".join(output.readlines()[-20:])
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
    """CPU of a process, of its living children, and of those that have ended."""
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
