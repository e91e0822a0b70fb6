"""Kafka's half: connection, topics, group, and whether it still is what the log was read from."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, text

from pipeline.errors import ExitCode
from pipeline.health.check.database import is_loopback
from pipeline.health.check.findings import Finding, ok, unknown, warning, wrong
from pipeline.health.check.promises import Promise
from pipeline.kafka import Access, Brokers, right_to_request, user_of, why_not_visible
from pipeline.log import ownership
from pipeline.partitions import NextOffset, Partition
from pipeline.settings import Settings


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
    brokers = Brokers(settings)
    try:
        there = brokers.partition_counts()
        cluster = brokers.cluster_id()
        yield ok("kafka", f"cluster {cluster} at {servers} answers, {len(there)} topics to be seen")
        known = recorded.partitions if recorded else []
        yield from _cluster(cluster, known)
        yield from _topics(brokers, settings, there)
        mine = [Partition(t, n) for t in settings.topics for n in range(there.get(t, 0))]
        yield from _group(brokers, settings, mine, recorded)
        yield from _topic_ids(brokers, known, there)
        yield from _places(brokers, known, there)
    finally:
        brokers.close()


def kafka_tls(servers: str, protocol: str) -> Finding:
    """Whether anybody could listen in, or pass for the brokers."""
    touched = (Promise.FAITHFUL_LOG, Promise.SECRECY)
    if protocol in {"SASL_SSL", "SSL"}:
        return ok("kafka", f"{protocol}: TLS, the broker's name is verified", *touched)
    if all(is_loopback(server.rpartition(":")[0]) for server in servers.split(",")):
        return ok("kafka", f"{protocol} on this machine", *touched)
    return warning(
        "kafka",
        f"{protocol}: others can read the events{' and the login' if 'SASL' in protocol else ''}",
        "set PIPELINE_KAFKA_SECURITY_PROTOCOL to SASL_SSL",
        *touched,
    )


_Known = Sequence[tuple[Partition, NextOffset, str | None, str | None]]


def _cluster(cluster: str, known: _Known) -> Iterator[Finding]:
    others = {recorded for _, _, recorded, _ in known if recorded not in (None, cluster)}
    if others:
        yield wrong(
            "kafka",
            f"the log holds records of cluster {', '.join(map(str, others))}, this is {cluster}",
            "check PIPELINE_KAFKA_BOOTSTRAP_SERVERS and PIPELINE_DATABASE_URL",
            Promise.NO_SILENT_LOSS,
        )
    elif known:
        yield ok("kafka", "it is the cluster that the log was read from", Promise.NO_SILENT_LOSS)


def _topics(brokers: Brokers, settings: Settings, there: Mapping[str, int]) -> Iterator[Finding]:
    absent = [topic for topic in settings.topics if topic not in there]
    access = brokers.access(absent) if absent else {}
    for topic in settings.topics:
        if topic not in there:
            why = why_not_visible(settings, topic, access.get(topic, Access.ABSENT))
            yield missing_topic(settings, why, absent, there)
            continue
        yield ok("kafka", f"topic {topic}: {there[topic]} partitions")
        yield may_read(brokers, settings, topic)
        told = brokers.topic_settings(topic)
        yield from retention(topic, told, timedelta(hours=settings.longest_outage_hours))
        yield from replication(topic, told, brokers.replicas(topic))
        yield record_size(topic, told, settings.batch_bytes)


def missing_topic(
    settings: Settings, why: str, absent: Sequence[str], there: Collection[str]
) -> Finding:
    """A topic of the default list may be missing; one that somebody configured may not."""
    seen = ", ".join(sorted(name for name in there if name[:2] != "__")[:20])
    touched = (Promise.NO_SILENT_LOSS, Promise.BOUNDED_MEMORY)
    if "topics" not in settings.model_fields_set and len(absent) < len(settings.topics):
        rest = ",".join(one for one in settings.topics if one not in absent)
        return warning(
            "kafka",
            f"{why}; the other topics are read",
            f"have Upvest provide it (Prices needs a contract of its own), or set "
            f"PIPELINE_TOPICS={rest}",
            *touched,
        )
    return wrong(
        "kafka",
        why,
        f"or set PIPELINE_TOPICS; Kafka shows {seen or 'no topic'}",
        *touched,
        code=ExitCode.CONFIGURATION,
    )


def may_read(brokers: Brokers, settings: Settings, topic: str) -> Finding:
    """Whether Kafka gives a record of a topic; it is asked for one."""
    with brokers.record_reader() as reader:
        if reader.may_read(topic):
            return ok("kafka", f"topic {topic}: {user_of(settings)} may read it")
    return wrong(
        "kafka",
        f"topic {topic}: {user_of(settings)} may not read it (TOPIC_AUTHORIZATION_FAILED)",
        f"ask for {right_to_request(settings, 'READ', 'topic', topic)}",
        Promise.NO_SILENT_LOSS,
        code=ExitCode.CONFIGURATION,
    )


def retention(topic: str, told: Mapping[str, str], outage: timedelta) -> Iterator[Finding]:
    """Whether Kafka still has what was published while we were away for the longest time planned.

    Args:
        topic: Which.
        told: Its settings, as far as the broker tells them.
        outage: The longest that is planned for.
    """
    touched = Promise.NO_SILENT_LOSS
    policy = told.get("cleanup.policy")
    if policy is None:
        yield unknown("kafka", f"topic {topic}: whether it is compacted", touched)
    elif "compact" in policy:
        yield warning(
            "kafka",
            f"topic {topic} is compacted: what is not read in time is thinned out unseen",
            "ask for cleanup.policy=delete",
            touched,
        )
    if "retention.ms" not in told:
        yield unknown("kafka", f"topic {topic}: how long it keeps its records", touched)
        return
    kept = timedelta(milliseconds=int(told["retention.ms"]))
    if timedelta(0) <= kept < outage:
        yield warning(
            "kafka",
            f"topic {topic} keeps its records for {_length(kept)}, you plan for an outage of "
            f"{_length(outage)}",
            "ask for more, or set PIPELINE_LONGEST_OUTAGE_HOURS to what you can be sure of",
            touched,
        )
    else:
        how_long = "for ever" if kept < timedelta(0) else f"for {_length(kept)}"
        yield ok(
            "kafka",
            f"topic {topic} keeps its records {how_long}, you plan for an outage of "
            f"{_length(outage)}",
            touched,
        )
    most = int(told.get("retention.bytes", -1))
    if most >= 0:
        yield warning(
            "kafka",
            f"topic {topic} keeps at most {most:,} bytes a partition, however young: on a busy "
            "day that may be less than the outage that you plan for",
            "ask for retention by time alone",
            touched,
        )


def _length(of: timedelta) -> str:
    hours = of / timedelta(hours=1)
    if hours >= 24 and hours % 24 == 0:
        return "1 day" if hours == 24 else f"{hours / 24:.0f} days"
    return "1 hour" if hours == 1 else f"{hours:,.1f} hours".replace(".0 ", " ")


def replication(topic: str, told: Mapping[str, str], replicas: int) -> Iterator[Finding]:
    """Whether a broker may vanish without taking records along that it had confirmed.

    Args:
        topic: Which.
        told: Its settings, as far as the broker tells them.
        replicas: Of each partition, at least.
    """
    touched = Promise.NO_SILENT_LOSS
    unclean, in_sync = (
        told.get("unclean.leader.election.enable"),
        told.get("min.insync.replicas"),
    )
    if unclean is None or in_sync is None:
        yield unknown("kafka", f"topic {topic}: what it loses with a broker", touched)
    if unclean == "true":
        yield warning(
            "kafka",
            f"topic {topic}: unclean.leader.election.enable is true: a broker that lags behind may "
            "take over, and what it lacks is gone",
            "ask for unclean.leader.election.enable=false",
            touched,
        )
    if replicas < 2:
        yield warning(
            "kafka",
            f"topic {topic} has one copy: its broker's disk takes all that was not read",
            "ask for a replication factor of 3",
            touched,
        )
    elif in_sync is not None and int(in_sync) < 2:
        yield warning(
            "kafka",
            f"topic {topic}: min.insync.replicas is {in_sync}: what one broker alone has confirmed "
            "may go with it",
            "ask for min.insync.replicas=2",
            touched,
        )
    elif unclean == "false" and in_sync is not None:
        yield ok(
            "kafka",
            f"topic {topic}: {replicas} copies, at least {in_sync} of them confirm a record",
            touched,
        )


def record_size(topic: str, told: Mapping[str, str], batch_bytes: int) -> Finding:
    """Whether a record may be larger than a batch, which memory is laid out for."""
    if "max.message.bytes" not in told:
        return unknown("kafka", f"topic {topic}: how large a record may be", Promise.BOUNDED_MEMORY)
    most = int(told["max.message.bytes"])
    if most > batch_bytes:
        return warning(
            "kafka",
            f"topic {topic} takes records of up to {most:,} bytes, a batch holds {batch_bytes:,}: "
            "one such record is held whole, and more than once",
            f"see that there is memory for it, and set PIPELINE_BATCH_BYTES to {most} or more",
            Promise.BOUNDED_MEMORY,
        )
    return ok(
        "kafka",
        f"topic {topic} takes records of up to {most:,} bytes, which go into a batch",
        Promise.BOUNDED_MEMORY,
    )


def _group(
    brokers: Brokers,
    settings: Settings,
    partitions: Sequence[Partition],
    recorded: Recorded | None,
) -> Iterator[Finding]:
    allowed = brokers.group.operations()
    if allowed and not allowed & {"READ", "ALL"}:
        yield wrong(
            "kafka",
            f"{user_of(settings)} may not join consumer group {settings.group_id!r} "
            "(GROUP_AUTHORIZATION_FAILED)",
            f"ask for {right_to_request(settings, 'READ', 'group', settings.group_id)}; or set "
            "PIPELINE_GROUP_ID to a group that you may use",
            Promise.NO_SILENT_LOSS,
            code=ExitCode.CONFIGURATION,
        )
        return
    commits = brokers.group.last_commits(partitions)
    if not allowed:
        yield unknown("kafka", f"whether {user_of(settings)} may join group {settings.group_id}")
    others = {
        str(commit.installation)
        for commit in commits.values()
        if recorded and commit.installation != recorded.installation
    }
    if others:
        yield wrong(
            "kafka",
            f"group {settings.group_id} also feeds database {', '.join(others)}: each would get a "
            "part of the events",
            "give each database its own PIPELINE_GROUP_ID",
            Promise.NO_SILENT_LOSS,
        )
    else:
        yield ok("kafka", f"group {settings.group_id} may be used", Promise.NO_SILENT_LOSS)


def _topic_ids(brokers: Brokers, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    topics = sorted({partition.topic for partition, *_ in known} & set(there))
    if not topics:
        return
    told = brokers.topic_ids(topics)
    if not told:
        yield unknown(
            "kafka",
            "topic ids, so that a topic which is made anew under a running worker is known only at "
            "its next assignment, by the last stored record",
            Promise.NO_SILENT_LOSS,
        )
    for topic, topic_id in told.items():
        recorded = {one for partition, _, _, one in known if partition.topic == topic and one}
        if recorded - {topic_id}:
            yield wrong(
                "kafka",
                f"topic {topic} was deleted and made anew since the log was read",
                "ingest it under another topic name or into another database",
                Promise.NO_SILENT_LOSS,
            )


def _places(brokers: Brokers, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    """Whether Kafka still has what is to be read next."""
    faulty = False
    for partition, next_offset, _, _ in known:
        if partition.number >= there.get(partition.topic, 0):
            continue
        low, high = brokers.watermarks(partition)
        if next_offset < low:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition}: {low - next_offset:,} offsets from {next_offset} on are gone",
                "run `pipeline ingest`, then see `pipeline gaps list`",
                Promise.NO_SILENT_LOSS,
            )
        elif next_offset > high:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition} ends at {high}, but the log has read up to {next_offset}: the topic "
                "was made anew, or this is another cluster",
                "ingest it under another topic name or into another database",
                Promise.NO_SILENT_LOSS,
            )
    if known and not faulty:
        yield ok(
            "kafka",
            "it still has what the log wants to read next, in every partition",
            Promise.NO_SILENT_LOSS,
        )
