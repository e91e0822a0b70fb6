"""Kafka: connection, topics, group, and whether they are still what the log was read from."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from pipeline.counts import count
from pipeline.errors import ExitCode
from pipeline.health import problem, problems
from pipeline.health.check.database import is_loopback
from pipeline.health.check.promises import Promise
from pipeline.health.check.result import Result, found, ok
from pipeline.kafka.access import Access, right_to_request, user_of, why_not_visible
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.log.installation import installation_id
from pipeline.log.origin import KafkaPartition, LastRecord, last_record, why_other_topic
from pipeline.log.ranges import LoggedPartition, halted_partitions, logged_partitions
from pipeline.partitions import NextOffset, Partition
from pipeline.settings import Settings


@dataclass(frozen=True)
class Recorded:
    """What the log has recorded about where its records come from."""

    installation: object
    partitions: Mapping[Partition, LoggedPartition]
    halted: Collection[Partition]
    last: Mapping[Partition, LastRecord | None]

    @classmethod
    def of(cls, db: Connection) -> "Recorded":
        """Read it."""
        partitions = logged_partitions(db)
        last = {
            partition: last_record(db, partition, logged.next_offset)
            for partition, logged in partitions.items()
        }
        return cls(installation_id(db), partitions, halted_partitions(db), last)


def check_kafka(settings: Settings, recorded: Recorded | None) -> Iterator[Result]:
    """Examine Kafka; each result comes as soon as it is known.

    Args:
        settings: What is configured.
        recorded: What the log has recorded about its origin; None if the log could not be read.

    Raises:
        PipelineError: The brokers are unavailable, or refuse us.
    """
    servers = settings.kafka_client()["bootstrap.servers"]
    yield kafka_tls(str(servers), settings.kafka_security_protocol)
    brokers = Brokers(settings, ClientReports())
    try:
        counts = brokers.partition_counts()
        cluster = brokers.cluster_id()
        yield ok(
            "kafka",
            f"cluster {cluster} at {servers} answers, "
            f"{count(len(counts), 'topic is', 'topics are')} visible",
        )
        yield from _topics(brokers, settings, counts)
        mine = [Partition(t, n) for t in settings.topics for n in range(counts.get(t, 0))]
        yield from _group(brokers, settings, mine, recorded)
        if recorded and recorded.partitions:
            yield from _origins(brokers, recorded, cluster, counts)
    finally:
        brokers.close()


def kafka_tls(servers: str, protocol: str) -> Result:
    """Whether others could read the connection, or pretend to be the brokers."""
    touched = (Promise.FAITHFUL_LOG, Promise.SECRECY)
    if protocol in {"SASL_SSL", "SSL"}:
        return ok("kafka", f"{protocol}: TLS, the broker's name is verified", *touched)
    if all(is_loopback(server.rpartition(":")[0]) for server in servers.split(",")):
        return ok("kafka", f"{protocol} on this machine", *touched)
    exposed = f"the events{' and the login' if 'SASL' in protocol else ''}"
    return found(
        problems.KAFKA_WITHOUT_TLS.of("kafka", protocol=protocol, exposed=exposed), *touched
    )


def _topics(brokers: Brokers, settings: Settings, counts: Mapping[str, int]) -> Iterator[Result]:
    absent = [topic for topic in settings.topics if topic not in counts]
    access = brokers.access(absent) if absent else {}
    for topic in settings.topics:
        if topic not in counts:
            why = why_not_visible(settings, topic, access.get(topic, Access.ABSENT))
            yield missing_topic(settings, topic, why, absent, counts)
            continue
        yield ok(_name(topic), f"has {count(counts[topic], 'partition')}")
        yield may_read(brokers, settings, topic)
        reported = brokers.topic_settings(topic)
        yield from retention(topic, reported, timedelta(hours=settings.longest_outage_hours))
        yield from replication(topic, reported, brokers.replicas(topic))
        yield record_size(topic, reported, settings.batch_bytes)


def _name(topic: str) -> str:
    return f"topic {topic}"


def missing_topic(
    settings: Settings, topic: str, why: str, absent: Sequence[str], counts: Collection[str]
) -> Result:
    """A topic of the default list may be missing; one that somebody configured may not."""
    touched = Promise.NO_SILENT_LOSS
    if "topics" not in settings.model_fields_set and len(absent) < len(settings.topics):
        rest = ",".join(name for name in settings.topics if name not in absent)
        kind = problems.DEFAULT_TOPIC_MISSING
        return found(kind.of(_name(topic), why=why, rest=rest), touched)
    visible = ", ".join(sorted(name for name in counts if name[:2] != "__")[:20])
    return found(
        problems.TOPIC_MISSING.of(_name(topic), why=why, visible=visible or "no topic"),
        touched,
        code=ExitCode.CONFIGURATION,
    )


def may_read(brokers: Brokers, settings: Settings, topic: str) -> Result:
    """Whether Kafka lets us read a topic: one record is requested."""
    with brokers.record_reader() as reader:
        if reader.may_read(topic):
            return ok(_name(topic), f"{user_of(settings)} may read this topic")
    return found(
        problems.TOPIC_REFUSED.of(
            _name(topic),
            user=user_of(settings),
            right=right_to_request(settings, "READ", "topic", topic),
        ),
        Promise.NO_SILENT_LOSS,
        code=ExitCode.CONFIGURATION,
    )


def retention(topic: str, reported: Mapping[str, str], outage: timedelta) -> Iterator[Result]:
    """Whether Kafka still has the records that were published during the longest planned outage.

    Args:
        topic: Which.
        reported: Its settings, as far as the broker reports them.
        outage: The longest that is planned for.
    """
    name, touched = _name(topic), Promise.NO_SILENT_LOSS
    policy = reported.get("cleanup.policy")
    if policy is None:
        what = "whether the topic is compacted (cleanup.policy)"
        yield found(problems.NOT_REPORTED.of(name, what=what), touched)
    elif "compact" in policy:
        yield found(problems.COMPACTED.of(name), touched)
    if "retention.ms" not in reported:
        what = "how long the topic keeps its records (retention.ms)"
        yield found(problems.NOT_REPORTED.of(name, what=what), touched)
        return
    kept = timedelta(milliseconds=int(reported["retention.ms"]))
    if timedelta(0) <= kept < outage:
        problem = problems.RETENTION_SHORT.of(name, kept=_length(kept), outage=_length(outage))
        yield found(problem, touched)
    else:
        how_long = "for ever" if kept < timedelta(0) else f"for {_length(kept)}"
        planned = f"PIPELINE_LONGEST_OUTAGE_HOURS is {_length(outage)}"
        yield ok(name, f"keeps its records {how_long}, {planned}", touched)
    most = int(reported.get("retention.bytes", -1))
    if most >= 0:
        yield found(problems.RETENTION_BY_SIZE.of(name, bytes=most), touched)


def _length(of: timedelta) -> str:
    hours = of / timedelta(hours=1)
    if hours >= 24 and hours % 24 == 0:
        return "1 day" if hours == 24 else f"{hours / 24:.0f} days"
    return "1 hour" if hours == 1 else f"{hours:,.1f} hours".replace(".0 ", " ")


def replication(topic: str, reported: Mapping[str, str], replicas: int) -> Iterator[Result]:
    """Whether the loss of one broker loses no record that it had confirmed.

    Args:
        topic: Which.
        reported: Its settings, as far as the broker reports them.
        replicas: Of each partition, at least.
    """
    name, touched = _name(topic), Promise.NO_SILENT_LOSS
    unclean = reported.get("unclean.leader.election.enable")
    in_sync = reported.get("min.insync.replicas")
    if unclean is None or in_sync is None:
        what = "min.insync.replicas or unclean.leader.election.enable of the topic"
        yield found(problems.NOT_REPORTED.of(name, what=what), touched)
    if unclean == "true":
        yield found(problems.UNCLEAN_ELECTION.of(name), touched)
    if replicas < 2:
        yield found(problems.ONE_COPY.of(name), touched)
    elif in_sync is not None and int(in_sync) < 2:
        yield found(problems.ONE_CONFIRMS.of(name, in_sync=in_sync), touched)
    elif unclean == "false" and in_sync is not None:
        yield ok(
            name,
            f"has {count(replicas, 'replica')}; at least {in_sync} must confirm a record",
            touched,
        )


def record_size(topic: str, reported: Mapping[str, str], batch_bytes: int) -> Result:
    """Whether a record may be larger than a batch, which memory is planned for."""
    name, touched = _name(topic), Promise.BOUNDED_MEMORY
    if "max.message.bytes" not in reported:
        what = "how large a record of the topic may be (max.message.bytes)"
        return found(problems.NOT_REPORTED.of(name, what=what), touched)
    most = int(reported["max.message.bytes"])
    if most > batch_bytes:
        return found(problems.LARGE_RECORDS.of(name, most=most, batch=batch_bytes), touched)
    return ok(name, f"allows records of {most:,} bytes, which fit into a batch", touched)


def _group(
    brokers: Brokers,
    settings: Settings,
    partitions: Sequence[Partition],
    recorded: Recorded | None,
) -> Iterator[Result]:
    user, group = user_of(settings), settings.group_id
    allowed = brokers.group.operations()
    if allowed and not allowed & {"READ", "ALL"}:
        right = right_to_request(settings, "READ", "group", group)
        yield found(
            problems.GROUP_REFUSED.of("kafka", user=user, group=group, right=right),
            Promise.NO_SILENT_LOSS,
            code=ExitCode.CONFIGURATION,
        )
        return
    commits = brokers.group.last_commits(partitions)
    if not allowed:
        what = f"whether {user} may join group {group}"
        yield found(problems.NOT_REPORTED.of("kafka", what=what))
    others = {
        str(commit.installation)
        for commit in commits.values()
        if recorded and commit.installation != recorded.installation
    }
    if others:
        problem = problems.GROUP_SHARED.of("kafka", group=group, others=", ".join(others))
        yield found(problem, Promise.NO_SILENT_LOSS)
    else:
        yield ok("kafka", f"group {group} may be used", Promise.NO_SILENT_LOSS)


def _origins(
    brokers: Brokers, recorded: Recorded, cluster: str, counts: Mapping[str, int]
) -> Iterator[Result]:
    """Whether Kafka's topics are still those in the log, and have what is to be read next."""
    visible = {
        p: logged for p, logged in recorded.partitions.items() if p.number < counts.get(p.topic, 0)
    }
    topic_ids = brokers.topic_ids({partition.topic for partition in visible})
    if visible and not topic_ids:
        what = (
            "topic ids. So if a topic is recreated while a worker runs, the program detects it "
            "only at the next assignment, by the last record in the log"
        )
        yield found(problems.NOT_REPORTED.of("kafka", what=what), Promise.NO_SILENT_LOSS)
    is_right = True
    with brokers.record_reader() as reader:
        for partition, logged in visible.items():
            source = KafkaPartition(
                cluster, topic_ids.get(partition.topic), *brokers.watermarks(partition)
            )
            last = recorded.last[partition]
            refusal = why_other_topic(partition, logged, last, source, reader.record_at)
            if refusal is not None:
                wrong = problem.of_refusal(refusal)
            elif logged.next_offset < source.low:
                wrong = _deleted(partition, recorded, logged.next_offset, source.low)
            else:
                continue
            is_right = False
            yield found(wrong, Promise.NO_SILENT_LOSS)
    if visible and is_right:
        yield ok(
            "kafka",
            f"cluster {cluster} has the topics of the log, and the next record of each partition",
            Promise.NO_SILENT_LOSS,
        )


def _deleted(
    partition: Partition, recorded: Recorded, first: NextOffset, low: int
) -> problem.Problem:
    deleted = count(low - first, "offset")
    if partition in recorded.halted:
        return problems.RECORDS_DELETED_AND_HALTED.of(partition, deleted=deleted, first=first)
    return problems.RECORDS_DELETED.of(partition, deleted=deleted, first=first)
