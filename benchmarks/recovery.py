"""The time until events are committed again: after a start, a SIGKILL, a restart of either server.

A producer runs all the time. Each time is that of PostgreSQL's first commit of events after the
fault, by its own clock (``track_commit_timestamp``), which is the machine's.
"""

import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from confluent_kafka import Producer

from benchmarks.background import background
from benchmarks.report import Section
from benchmarks.stage import PARTITIONS, Stage
from pipeline.sandbox.servers.postgres import PostgresServer
from tests.servers import KafkaServer
from tests.servers.databases import Database

WANTED_S = 3.0
RATE = 200
COMMIT_S_MAX = 90.0
"""Longest wait for a commit; Kafka reassigns a dead member's partitions after 45 s."""
VALUE = b'{"id":"00000000-0000-4000-8000-000000000000","created_at":"2026-01-05T09:00:00Z"}'
FIRST_COMMIT = """
SELECT extract(epoch FROM min(at)) FROM (
    SELECT pg_xact_commit_timestamp(xmin) AS at FROM pipeline.events
) AS committed WHERE at > to_timestamp(%s)
"""

Fault = Callable[[], float]
"""Causes the fault; the time, seconds since 1970, at which all servers were up again."""


def measure(stage: Stage, times: int) -> Section:
    """Cause each fault a number of times."""
    static = {"PIPELINE_GROUP_INSTANCE_ID": "benchmark"}
    rows = [
        ("start of the command, first commit", _starts(stage, times, {})),
        ("SIGKILL and a new start", _killed(stage, times, {})),
        ("the same with PIPELINE_GROUP_INSTANCE_ID", _killed(stage, times, static)),
    ]
    if isinstance(stage.postgres, PostgresServer):
        postgres = stage.postgres
        rows.append(
            (
                "PostgreSQL up again, after a crash",
                _restarted(stage, times, lambda: postgres.restart("immediate")),
            )
        )
    if isinstance(stage.kafka, KafkaServer):
        kafka = stage.kafka

        def crash() -> None:
            kafka.kill()
            kafka.start()

        rows.append(("Apache Kafka up again, after SIGKILL", _restarted(stage, times, crash)))
    return Section(
        "Recovery",
        f"`pipeline ingest` of {RATE} events/s, {times} times each. Seconds from the start of the "
        "process, or from the moment when the server answered again, to the first commit of events "
        f"after it. Wanted for the start: {WANTED_S:g} s at most.",
        [
            "| | median | all |",
            "|---|---|---|",
            *(
                f"| {name} | **{statistics.median(taken):.1f} s** "
                f"| {', '.join(f'{seconds:.1f}' for seconds in sorted(taken))} |"
                for name, taken in rows
            ),
        ],
    )


def _starts(stage: Stage, times: int, more: Mapping[str, str]) -> list[float]:
    taken = []
    for _ in range(times):
        with _flowing(stage) as (database, environment):
            begun = time.time()
            with background(_COMMAND, {**environment, **more}):
                taken.append(_first_commit(database, begun) - begun)
    return taken


def _killed(stage: Stage, times: int, more: Mapping[str, str]) -> list[float]:
    taken = []
    with _flowing(stage) as (database, environment):
        environment = {**environment, **more}
        for _ in range(times):
            with background(_COMMAND, environment) as running:
                begun = time.time()
                _first_commit(database, begun)
                running.kill()
            begun = time.time()
            with background(_COMMAND, environment):
                taken.append(_first_commit(database, begun) - begun)
    return taken


def _restarted(stage: Stage, times: int, restart: Callable[[], None]) -> list[float]:
    taken = []
    with _flowing(stage) as (database, environment), background(_COMMAND, environment):
        _first_commit(database, time.time())
        for _ in range(times):
            restart()
            up_again = time.time()
            taken.append(_first_commit(database, up_again) - up_again)
    return taken


_COMMAND = [sys.executable, "-m", "pipeline", "ingest"]


@contextmanager
def _flowing(stage: Stage) -> Iterator[tuple[Database, dict[str, str]]]:
    """A topic that events flow into, and a fresh database for them."""
    topic = f"recovery-{time.time_ns()}"
    stage.kafka.create_topic(topic, PARTITIONS)
    stop = threading.Event()
    producing = threading.Thread(target=_produce, args=[stage, topic, stop], name="producer")
    with stage.database() as database:
        producing.start()
        try:
            yield database, stage.environment(topic, database)
        finally:
            stop.set()
            producing.join()


def _produce(stage: Stage, topic: str, stop: threading.Event) -> None:
    quiet = logging.getLogger("librdkafka")  # the outage of a broker is what is measured
    producer = Producer(
        {"bootstrap.servers": stage.kafka.bootstrap_servers, "linger.ms": 0, "logger": quiet}
    )
    while not stop.wait(1 / RATE):
        producer.produce(topic, VALUE)
        producer.poll(0)
    producer.flush(COMMIT_S_MAX)


def _first_commit(database: Database, after: float) -> float:
    deadline = time.monotonic() + COMMIT_S_MAX
    while time.monotonic() < deadline:
        with database.connect() as connection:
            [(at,)] = connection.execute(FIRST_COMMIT, [after]).fetchall()
        if at is not None:
            return float(at)
        time.sleep(0.1)
    raise RuntimeError(f"nothing was committed for {COMMIT_S_MAX:g} s")
