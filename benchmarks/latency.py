"""The latency of an event: from produced to committed in ``events`` and visible in ``orders``.

All three times are of one machine's clock: the producer's before it hands an event over, and
PostgreSQL's own of the commits that wrote the rows (``track_commit_timestamp``). The bare side is a
loop that polls one record, inserts it and commits, without any projection.
"""

import math
import secrets
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson
from confluent_kafka import Producer

from benchmarks.background import background
from benchmarks.report import Lines, Section
from benchmarks.stage import Stage
from pipeline.sandbox.simulator import Simulation
from tests.servers.databases import Database

RATES = (10, 1_000, 10_000)
SECONDS = 15
QUICK = ((1_000,), 5)
WARM_UP_S = 3.0
"""Not counted: the first records find no plan, no segment and no page in memory."""
WARM_UP_RATE = 1_000
START_S_MAX = 30.0
LATE_S_MAX = 20.0
"""Maximum wait for events after the last event was produced."""
WANTED = 3.0

BARE_LOOP = ("-m", "benchmarks.bare_loop")
BARE = "bare loop: committed"
COMMITTED_BY = "pipeline run: committed in `events`"
VISIBLE_BY = "pipeline run: visible in `orders`"
COMMITTED = """
SELECT event_id, extract(epoch FROM pg_xact_commit_timestamp(xmin)) FROM pipeline.events
"""
VISIBLE = """
SELECT _event_id, extract(epoch FROM pg_xact_commit_timestamp(xmin)) FROM upvest.orders
"""


@dataclass(frozen=True)
class Latencies:
    """The latencies of one way at one rate.

    Attributes:
        ms: Milliseconds of each event that arrived in time.
        produced: The number of produced events.
        cpu: CPU of the process, in cores.
    """

    ms: Sequence[float]
    produced: int
    cpu: float

    def percentile(self, percent: int) -> float:
        """A percentile of the milliseconds; missing events count as late."""
        rank = math.ceil(self.produced * percent / 100)
        return sorted(self.ms)[rank - 1] if rank <= len(self.ms) else float("inf")


def measure(stage: Stage, *, quick: bool) -> Section:
    """Produce at several rates, for ours and for the bare loop in turn."""
    rates, seconds = QUICK if quick else (RATES, SECONDS)
    lines = [
        "| events/s | | p50 | p95 | p99 | cores |",
        "|---|---|---|---|---|---|",
    ]
    # A broker that has just started is slow for every reader.
    _run(stage, WARM_UP_RATE, WARM_UP_S, BARE_LOOP)
    shown: dict[str, list[tuple[float, float]]] = {BARE: [], COMMITTED_BY: [], VISIBLE_BY: []}
    for rate in rates:
        bare, _ = _run(stage, rate, seconds, BARE_LOOP)
        committed, visible = _run(stage, rate, seconds, ["-m", "pipeline", "run"])
        lines += [
            f"| {rate:,} | {BARE} {_columns(bare)}",
            f"| | {COMMITTED_BY} {_columns(committed)}",
            f"| | {VISIBLE_BY} {_columns(visible)}",
            f"| | **p99 committed / bare** (wanted: {WANTED:g} or less) | | | "
            f"**{committed.percentile(99) / bare.percentile(99):.2f}** | |",
        ]
        for label, latencies in zip(shown, (bare, committed, visible), strict=True):
            if (p99 := latencies.percentile(99)) < float("inf"):
                shown[label].append((rate, p99))
    return Section(
        "Latency",
        f"Orders, each a new one, for {seconds} s at each rate; the first {WARM_UP_S:.0f} s are "
        "left out. From the producer's call to PostgreSQL's commit, milliseconds. An event that "
        f"is not there {LATE_S_MAX:.0f} s after the last one was produced counts as late "
        "forever. Cores: CPU of the process, without PostgreSQL.",
        lines,
        [Lines("latency", "Latency, p99", "events/s", "ms", shown, logarithmic=True)],
    )


def _columns(latencies: Latencies) -> str:
    percentiles = [latencies.percentile(percent) for percent in (50, 95, 99)]
    figures = " | ".join("late" if ms == float("inf") else f"{ms:.1f}" for ms in percentiles)
    return f"| {figures} | {latencies.cpu:.2f} |"


def _run(
    stage: Stage, rate: int, seconds: float, arguments: Sequence[str]
) -> tuple[Latencies, Latencies]:
    topic = f"latency-{rate}-{secrets.token_hex(3)}"
    stage.kafka.create_topic(topic, 6)
    with stage.database() as database:
        is_ours = "pipeline" in arguments
        table = "upvest.orders" if is_ours else "pipeline.events"
        with background([sys.executable, *arguments], stage.environment(topic, database)) as child:
            first = _produce(stage, topic, 1, 1)
            _wait_for(database, table, len(first), at_most_s=START_S_MAX)
            cpu_before, begun = child.cpu_s(), time.monotonic()
            sent = _produce(stage, topic, rate, WARM_UP_S + seconds)
            cpu = (child.cpu_s() - cpu_before) / (time.monotonic() - begun)
            counted_from = min(sent.values()) + WARM_UP_S
            counted = {event: at for event, at in sent.items() if at >= counted_from}
            _wait_for(database, table, len(first) + len(sent), at_most_s=LATE_S_MAX)
        committed = _since(database, COMMITTED, counted)
        visible = _since(database, VISIBLE, counted) if is_ours else []
    return Latencies(committed, len(counted), cpu), Latencies(visible, len(counted), cpu)


def _since(database: Database, query: str, sent: dict[uuid.UUID, float]) -> list[float]:
    with database.connect() as connection:
        found = connection.execute(query.encode()).fetchall()
    return [(float(at) - sent[event]) * 1000 for event, at in found if event in sent]


def _wait_for(database: Database, table: str, rows: int, *, at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    with database.connect() as connection:
        while time.monotonic() < deadline:
            [(rows_so_far,)] = connection.execute(
                f"SELECT count(*) FROM {table}".encode()
            ).fetchall()
            if rows_so_far >= rows:
                return
            time.sleep(0.2)


def _produce(stage: Stage, topic: str, rate: int, seconds: float) -> dict[uuid.UUID, float]:
    """Produce at an even pace; when each event was handed over, seconds since 1970."""
    producer = Producer({"bootstrap.servers": stage.kafka.bootstrap_servers, "linger.ms": 0})
    events = _orders(topic)
    sent = {}
    begun = time.monotonic()
    for number in range(int(rate * seconds)):
        event, key, value = next(events)
        while (ahead := begun + number / rate - time.monotonic()) > 0:
            producer.poll(min(ahead, 0.05))
        sent[event] = time.time()
        producer.produce(topic, value, key)
    assert producer.flush(30) == 0
    return sent


def _orders(topic: str) -> Iterator[tuple[uuid.UUID, bytes, bytes]]:
    """New orders without end: event id, key, value."""
    simulated = Simulation(seed=7, events=None, topic=topic, partitions=6, keep_books=False)
    model = next(
        orjson.loads(record.value)
        for record in simulated
        if record.value and b'"type":"ORDER.NEW"' in record.value
    )
    while True:
        event, order = uuid.uuid4(), str(uuid.uuid4())
        model["id"], model["object"]["id"] = str(event), order
        yield event, order.encode(), orjson.dumps(model)
