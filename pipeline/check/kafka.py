"""Kafka's half: connection, topics, group, and whether it still is what the log was read from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, text

from pipeline.check.database import is_loopback
from pipeline.check.findings import Finding, ok, warning, wrong
from pipeline.errors import ExitCode, TransientError
from pipeline.log import ownership
from pipeline.positions import NextOffset, Partition
from pipeline.settings import Settings
from pipeline.source import KafkaSource

RETENTION_MIN = timedelta(days=3)
"""A weekend: what less retention does not forgive."""


@dataclass(frozen=True)
class Recorded:
    """What the log says of where its records come from."""

    installation: object
    partitions: Sequence[tuple[Partition, NextOffset, str | None, str | None]]

    @classmethod
    def of(cls, db: Connection) -> "Recorded":
        """Read it."""
        rows = db.execute(RECORDED).all()
        return cls(
            ownership.installation_id(db),
            [
                (Partition(row.topic, row.partition), row.next_offset, row.cluster_id, row.topic_id)
                for row in rows
            ],
        )


RECORDED = text("""
SELECT topic, "partition", next_offset, cluster_id, topic_id
FROM pipeline.consumer_offsets ORDER BY topic, "partition"
""")


def look_at_kafka(settings: Settings, recorded: Recorded | None) -> Iterator[Finding]:
    """What is found there, as soon as it is known.

    Args:
        settings: What is configured.
        recorded: What the log says of its source; None if the log could not be read.

    Raises:
        PipelineError: The brokers are away, or refuse us.
    """
    servers = settings.kafka_client()["bootstrap.servers"]
    yield kafka_tls(str(servers), settings.kafka_security_protocol)
    source = KafkaSource(settings)
    try:
        there = source.topics_there()
        cluster = source.cluster_id()
        yield ok("kafka", f"cluster {cluster} at {servers} answers, {len(there)} topics to be seen")
        known = recorded.partitions if recorded else []
        yield from _cluster(cluster, known)
        yield from _topics(source, settings, there)
        mine = [Partition(t, n) for t in settings.topics for n in range(there.get(t, 0))]
        yield from _group(source, settings, mine, recorded)
        yield from _topic_ids(source, known, there)
        yield from _places(source, known, there)
    finally:
        source.leave()


def kafka_tls(servers: str, protocol: str) -> Finding:
    """Whether anybody could listen in, or pass for the brokers."""
    if protocol in {"SASL_SSL", "SSL"}:
        return ok("kafka", f"{protocol}: TLS, the broker's name is verified")
    if all(is_loopback(server.rpartition(":")[0]) for server in servers.split(",")):
        return ok("kafka", f"{protocol} on this machine")
    return warning(
        "kafka",
        f"{protocol}: others can read the events{' and the login' if 'SASL' in protocol else ''}",
        "set PIPELINE_KAFKA_SECURITY_PROTOCOL to SASL_SSL",
    )


_Known = Sequence[tuple[Partition, NextOffset, str | None, str | None]]


def _cluster(cluster: str, known: _Known) -> Iterator[Finding]:
    others = {recorded for _, _, recorded, _ in known if recorded not in (None, cluster)}
    if others:
        yield wrong(
            "kafka",
            f"the log holds records of cluster {', '.join(map(str, others))}, this is {cluster}",
            "check PIPELINE_KAFKA_BOOTSTRAP_SERVERS and PIPELINE_DATABASE_URL",
            ExitCode.FOUND,
        )
    elif known:
        yield ok("kafka", "it is the cluster that the log was read from")


def _topics(source: KafkaSource, settings: Settings, there: Mapping[str, int]) -> Iterator[Finding]:
    for topic in settings.topics:
        if topic not in there:
            seen = ", ".join(sorted(name for name in there if name[:2] != "__")[:20])
            yield wrong(
                "kafka",
                f"topic {topic} does not exist or is hidden from this user",
                f"set PIPELINE_TOPICS; there are {seen or 'none'}",
                ExitCode.CONFIGURATION,
            )
            continue
        yield ok("kafka", f"topic {topic}: {there[topic]} partitions")
        yield from _retention(topic, source.topic_settings(topic))


def _retention(topic: str, told: Mapping[str, str]) -> Iterator[Finding]:
    if "retention.ms" not in told:
        yield ok("kafka", f"topic {topic}: the broker does not tell its retention; ask Upvest")
        return
    if "compact" in told.get("cleanup.policy", ""):
        yield warning(
            "kafka",
            f"topic {topic} is compacted: what is not read in time is thinned out unseen",
            "ask for cleanup.policy=delete",
        )
    kept = timedelta(milliseconds=int(told["retention.ms"]))
    if kept < timedelta(0):
        yield ok("kafka", f"topic {topic} keeps its records for ever")
    elif kept < RETENTION_MIN:
        yield warning(
            "kafka",
            f"topic {topic} keeps its records for {kept}: a longer downtime loses some",
            "ask for more, or watch `pipeline status` closely",
        )
    else:
        yield ok("kafka", f"topic {topic} keeps its records for {kept}; downtime must be shorter")


def _group(
    source: KafkaSource,
    settings: Settings,
    partitions: Sequence[Partition],
    recorded: Recorded | None,
) -> Iterator[Finding]:
    try:
        feeds = source.feeds(partitions)
    except TransientError as error:
        if "AUTHORIZATION" not in str(error):
            raise
        yield wrong(
            "kafka",
            f"group {settings.group_id} is not to be read: {error}",
            "ask for READ on the group, or set PIPELINE_GROUP_ID to one that you may use",
            ExitCode.CONFIGURATION,
        )
        return
    others = {str(one) for one in feeds.values() if recorded and one != recorded.installation}
    if others:
        yield wrong(
            "kafka",
            f"group {settings.group_id} also feeds database {', '.join(others)}: each would get a "
            "part of the events",
            "give each database its own PIPELINE_GROUP_ID",
        )
    else:
        yield ok("kafka", f"group {settings.group_id} may be used")


def _topic_ids(source: KafkaSource, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    topics = sorted({partition.topic for partition, *_ in known} & set(there))
    if not topics:
        return
    told = source.topic_ids(topics)
    if not told:
        yield ok("kafka", "topic ids are not told; the last stored record is compared with Kafka's")
    for topic, topic_id in told.items():
        recorded = {one for partition, _, _, one in known if partition.topic == topic and one}
        if recorded - {topic_id}:
            yield wrong(
                "kafka",
                f"topic {topic} was deleted and made anew since the log was read",
                "ingest it under another topic name or into another database",
            )


def _places(source: KafkaSource, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    """Whether Kafka still has what is to be read next."""
    faulty = False
    for partition, next_offset, _, _ in known:
        if partition.number >= there.get(partition.topic, 0):
            continue
        low, high = source.watermarks(partition)
        if next_offset < low:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition}: {low - next_offset:,} offsets from {next_offset} on are gone",
                "run `pipeline ingest`, then see `pipeline gaps list`",
            )
        elif next_offset > high:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition} ends at {high}, but the log has read up to {next_offset}: the topic "
                "was made anew, or this is another cluster",
                "ingest it under another topic name or into another database",
            )
    if known and not faulty:
        yield ok("kafka", "it still has what the log wants to read next, in every partition")
