"""How much memory ``pipeline ingest`` takes while it works off a backlog."""

from benchmarks.report import Section
from benchmarks.stage import Stage

WANTED_BYTES = 250_000_000


def measure(stage: Stage, events: int) -> Section:
    """Ingest a topic of so many events, and tell the most memory that was resident."""
    topic = stage.load(events)
    with stage.database() as database:
        finished = stage.ingest(topic, database)
        with database.connect() as connection:
            counted, bytes_on_disk = connection.execute(
                "SELECT (SELECT count(*) FROM pipeline.events), sum(pg_total_relation_size(relid)) "
                "FROM pg_partition_tree('pipeline.events')"
            ).fetchall()[0]
    assert counted == events
    return Section(
        "Memory",
        f"A backlog of {events:,} events, `pipeline ingest --until-end`, "
        f"{finished.seconds:.0f} s from start to end.",
        [
            "| | |",
            "|---|---|",
            f"| most resident memory (wanted: {WANTED_BYTES / 1e6:.0f} MB at most) "
            f"| **{finished.peak_bytes / 1e6:.0f} MB** |",
            f"| log on disk, with indexes | {int(bytes_on_disk) / events:.0f} bytes an event |",
        ],
    )
