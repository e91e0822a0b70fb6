"""What an operator reads on a quiet day: the start, one line per minute, the end."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path

import pytest
import structlog

import pipeline
from pipeline.cli.tally import Tally
from pipeline.errors import Server, TransientError
from pipeline.ingest.process import Progress as Ingested
from pipeline.outages import OutageLog, OutagePolicy
from pipeline.projection.loop import CAUGHT_UP_S_MIN, CaughtUp
from pipeline.projection.loop import ProjectionProgress as Projected
from pipeline.sandbox.simulator import Simulation
from pipeline.sandbox.simulator.producer import Producer
from tests.commands import Process, on_mock, wait

MINUTE_S = 2
"""As long as the log's minute is made here."""
SECONDS = 9
PER_SECOND = 10
PARTITIONS = 50
ONCE = {"started", "partitions_claimed", "stop_requested", "partitions_released", "stopped"}
SHORTER = f"import pipeline.cli.tally as t; t.LOG_S = {MINUTE_S}; from pipeline.cli import main; "


@pytest.fixture
def commands(database, mock_broker):
    mock_broker.create_topic("Notifications", PARTITIONS)
    return on_mock(database, mock_broker)


@pytest.mark.faults
@pytest.mark.parametrize("is_idle", [False, True], ids=["ten events per second", "idle"])
def test_a_quiet_worker_logs_at_most_one_line_per_minute(commands, database, mock_broker, is_idle):
    with Quiet(commands, "run") as run:
        run.until('"partitions_claimed"')
        if is_idle:
            wait(lambda: looks(database) > 1)
        else:
            feed(mock_broker, SECONDS * PER_SECOND)
        run.end_in_order()

    counts = Counter(line["event"] for line in run.lines)
    minutes = [line for line in run.lines if line["event"] == "events_processed"]
    logged_at = [datetime.fromisoformat(line["ts"]).timestamp() for line in minutes]
    assert all(later - earlier > MINUTE_S - 0.1 for earlier, later in pairwise(logged_at)), (
        logged_at
    )
    assert bool(minutes) is not is_idle
    del counts["events_processed"]
    assert counts == dict.fromkeys(ONCE, 1), counts
    if not is_idle:
        [last] = [line for line in run.lines if line["event"] == "stopped"]
        # It was stopped within a moment of the last record.
        assert SECONDS * PER_SECOND // 2 < last["projected"] <= last["ingested"]
        assert {"seconds", "ingested", "ingest_lag", "projected", "projection_lag"} <= set(
            minutes[0]
        )


def feed(broker, events):
    with Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        records = Simulation(7, events=None, partitions=PARTITIONS, keep_books=False)
        producer.produce(islice(records, events), rate=PER_SECOND)


def looks(database):
    """How often a worker has recorded Kafka's ends after it had claimed its partitions."""
    with database.connect() as db:
        [(rows,)] = db.execute(
            "SELECT count(*) FROM pipeline.consumer_offsets "
            "WHERE watermarks_at > claimed_at + interval '4 seconds'"
        ).fetchall()
    return rows


class Quiet:
    """A command whose minute is ``MINUTE_S``."""

    def __init__(self, commands, *arguments):
        self._process = Process(
            subprocess.Popen(
                [sys.executable, "-c", f"{SHORTER}main({list(arguments)!r})"],
                env=commands.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        )
        self.until = self._process.until

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.end()

    def end_in_order(self):
        self._process.send(signal.SIGTERM)
        assert self._process.wait() == 0, self._process.err
        self.lines = [json.loads(line) for line in self._process.err]


# ----------------------------------------------------------------------------------- the policies


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("pipeline.cli.tally.time.monotonic", lambda: now[0])
    return now


def test_both_halves_share_one_line_per_minute(clock):
    counted = Tally(OutageLog())
    ingested, projected = counted.of_ingest(), counted.of_projection()

    with structlog.testing.capture_logs() as lines:
        for second in range(1, 301):
            clock[0] += 1
            ingested(Ingested(second * 10, 3))
            projected(Projected(second * 10, 5))

    assert [line["seconds"] for line in lines] == [60] * 5
    assert lines[1] == {
        "event": "events_processed",
        "log_level": "info",
        "seconds": 60,
        "ingested": 600,
        "ingest_lag": 3,
        "projected": 600,
        "projection_lag": 5,
    }
    assert counted.totals == {"ingested": 3000, "projected": 3000}


@pytest.mark.parametrize(
    ("server", "lags"),
    [
        (Server.KAFKA, {"ingest_lag": None, "projection_lag": 5}),
        (Server.POSTGRESQL, {"ingest_lag": None, "projection_lag": None}),
    ],
)
def test_a_lag_is_no_number_while_a_server_that_measures_it_is_unavailable(clock, server, lags):
    outages = OutageLog()
    policy, counted = OutagePolicy(waits_forever=True, outages=outages), Tally(outages)
    ingested, projected = counted.of_ingest(), counted.of_projection()

    with structlog.testing.capture_logs() as lines:
        projected(Projected(10, 5))
        policy.on_error(TransientError("unavailable", server=server))
        clock[0] += 61
        ingested(Ingested(10, 3))
        policy.on_success(server)
        clock[0] += 61
        ingested(Ingested(20, 3))

    logged = [line for line in lines if line["event"] == "events_processed"]
    assert [{name: line[name] for name in lags if name in line} for line in logged] == [
        {"ingest_lag": lags["ingest_lag"], "projection_lag": lags["projection_lag"]},
        {"ingest_lag": 3, "projection_lag": 5},
    ]


def test_counts_continue_when_half_of_run_restarts(clock):
    counted = Tally(OutageLog())
    for _ in range(2):
        counted.of_projection()(Projected(70, 0))

    assert counted.totals == {"projected": 140}


def test_the_end_of_a_backlog_is_logged_and_a_trickle_is_not():
    seen = CaughtUp(100)

    with structlog.testing.capture_logs() as lines:
        for second in range(1000):
            seen.observe(second % 2, second)
        seen.observe(101, 1000)
        seen.observe(90, 1010)
        for second in range(1011, 1011 + round(CAUGHT_UP_S_MIN)):
            seen.observe(150 * (second % 2), second)

    assert [(line["event"], line["after_s"]) for line in lines] == [("projection_caught_up", 10)]


def test_every_event_at_level_info_is_listed():
    """A new one is added here by somebody who has asked how often it comes."""
    root = Path(pipeline.__file__).parent
    found = {
        name
        for path in root.rglob("*.py")
        for name in re.findall(r"log\.info\(\s*\"(\w+)\"", path.read_text())
    }
    assert found == WEIGHED


WEIGHED = {
    # Once per process.
    *("started", "stop_requested", "stopped", "workers_started", "workers_ended"),
    # Once per command on a read model or a topic.
    *(
        "read_model_refilled",
        "read_model_rebuilt",
        "read_model_compared",
        "rebuild_resumed",
        "partition_rewound",
    ),
    # Once per attempt to get a lock, of which there are at most twenty.
    "table_locked",
    # Once per change of what the group has given us, however many partitions.
    *("partitions_claimed", "assignment_pending"),
    # Once per change of the read models that are stale.
    "read_models_current",
    # Once per change of what is halted.
    "partitions_resumed",
    # At most once per minute.
    *("events_processed", "projection_caught_up", "kafka_commit_skipped"),
    # Once per outage or refused login, and once per statement that takes long.
    *("server_available", "topic_available", "password_reloaded", "server_slow"),
}
