"""How much memory ``pipeline ingest`` takes while it works off a backlog, and with large events."""

import secrets
from collections.abc import Iterator
from itertools import islice

from benchmarks.filling import one_row
from benchmarks.report import Section
from benchmarks.stage import PARTITIONS, SEED, Stage, sized
from pipeline.sandbox.simulator import Simulation
from pipeline.sandbox.simulator.producer import Producer
from pipeline.sandbox.simulator.records import Record

WANTED_BYTES = 250_000_000
LARGE = 40
QUICK_LARGE = 6
LARGE_BYTES = 20_000_000
"""Of a value."""
LARGE_EACH = 25
"""One of this number of events is large."""
RECORD_BYTES_MAX = 25_000_000
"""The maximum that topic and producer accept: the value, its key and its headers."""
LARGE_WANTED_BYTES = 400_000_000
ROWS = "SELECT count(*) FROM pipeline.events"
LARGE_ROWS = f"{ROWS} WHERE octet_length(payload::text) >= {LARGE_BYTES}"
DISK = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('pipeline.events')"


def measure(stage: Stage, events: int, *, quick: bool) -> Section:
    """Ingest two topics, and report the peak of resident memory.

    Args:
        stage: The servers.
        events: The number of events of the backlog.
        quick: Few large ones.
    """
    topic = stage.load(events)
    with stage.database() as database:
        finished = stage.ingest(topic, database)
        assert one_row(database, ROWS) == (events,)
        (bytes_on_disk,) = one_row(database, DISK)
    large = QUICK_LARGE if quick else LARGE
    peak_with_large = _peak_with_large(stage, large)
    return Section(
        "Memory",
        f"A backlog of {events:,} events, `pipeline ingest --until-end`, "
        f"{finished.seconds:.0f} s from start to end. Then another of {large * LARGE_EACH:,} "
        f"events, of which {large} have {LARGE_BYTES:,} bytes.",
        [
            "| | |",
            "|---|---|",
            f"| most resident memory (wanted: {WANTED_BYTES / 1e6:.0f} MB at most) "
            f"| **{finished.peak_bytes / 1e6:.0f} MB** |",
            f"| log on disk, with indexes | {int(bytes_on_disk) / events:.0f} bytes per event |",
            f"| most resident memory with events of {LARGE_BYTES / 1e6:.0f} MB (wanted: "
            f"{LARGE_WANTED_BYTES / 1e6:.0f} MB at most) | **{peak_with_large / 1e6:.0f} MB** |",
        ],
    )


def _peak_with_large(stage: Stage, large: int) -> int:
    """Ingest large events among small ones; the peak of resident bytes."""
    events = large * LARGE_EACH
    topic = f"benchmark-large-{secrets.token_hex(3)}"
    limit = str(RECORD_BYTES_MAX)
    stage.kafka.create_topic(topic, PARTITIONS, {"max.message.bytes": limit})
    options = {"bootstrap.servers": stage.kafka.bootstrap_servers, "message.max.bytes": limit}
    with Producer(options) as producer:
        assert producer.produce(islice(_some_large(topic), events)) == events
    with stage.database() as database:
        finished = stage.ingest(topic, database)
        assert one_row(database, ROWS) == (events,)
        assert one_row(database, LARGE_ROWS) == (large,)
    return finished.peak_bytes


def _some_large(topic: str) -> Iterator[Record]:
    """Simulated events without end, the last one of each ``LARGE_EACH`` large."""
    simulated = Simulation(
        seed=SEED, events=None, topic=topic, partitions=PARTITIONS, keep_books=False
    )
    records = iter(simulated)
    while True:
        yield from islice(records, LARGE_EACH - 1)
        yield from islice(sized(records, LARGE_BYTES), 1)
