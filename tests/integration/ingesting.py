"""Shared by the tests of the ingest loop: a producer's ledger, and ingests that run in threads."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Self
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from pipeline.db import open_engine
from pipeline.ingest.process import Progress
from pipeline.ingest.service import Ingest
from pipeline.settings import Settings
from tests import waiting
from tests.servers.databases import Database

WAIT_S_MAX = 40.0
Headers = Sequence[tuple[str, bytes | None]]
Coordinates = tuple[str, int, int]


until = partial(waiting.until, seconds_max=WAIT_S_MAX)


# ------------------------------------------------------------------------------ what was produced


class Sent(NamedTuple):
    """A record as the brokers confirmed it, or as it is in the log."""

    digest: bytes | None
    key: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp_ms: int
    timestamp_type: int


class Ledger:
    """Produces, and keeps what the brokers confirmed, by its coordinates.

    Args:
        bootstrap_servers: Where to.
        options: librdkafka's, e.g. ``transactional.id``.
    """

    def __init__(self, bootstrap_servers: str, options: Mapping[str, Any] | None = None) -> None:
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "linger.ms": 0,
                "message.max.bytes": 20_000_000,
                "log_level": 0,
                **(options or {}),
            }
        )
        self.records: dict[Coordinates, Sent] = {}
        self.values: dict[Coordinates, bytes | None] = {}
        self._unsettled: dict[Coordinates, tuple[Sent, bytes | None]] = {}

    def send(
        self,
        topic: str,
        values: Iterable[bytes | None],
        *,
        partition: int = 0,
        key: bytes | None = None,
        headers: Headers = (),
        timestamp_ms: int = 0,
    ) -> Self:
        """Produce records; they are in the ledger after ``flush``."""
        for value in values:
            self.producer.produce(
                topic,
                value,
                key,
                partition,
                on_delivery=self._noting(value, key, headers),
                timestamp=timestamp_ms,
                headers=list(headers),
            )
            self.producer.poll(0)
        return self

    def _noting(self, value: bytes | None, key: bytes | None, headers: Headers) -> Any:
        def note(error: KafkaError | None, message: Message) -> None:
            assert error is None, str(error)
            kind, milliseconds = message.timestamp()
            digest = None if value is None else blake2b(value, digest_size=16).digest()
            sent = Sent(digest, key, tuple(headers), milliseconds, kind)
            self._unsettled[coordinates_of(message)] = (sent, value)

        return note

    def flush(self) -> Self:
        """Wait until the brokers have all of it."""
        assert self.producer.flush(WAIT_S_MAX) == 0
        for at, (sent, value) in self._unsettled.items():
            self.records[at] = sent
            self.values[at] = value
        self._unsettled.clear()
        return self

    def forget(self) -> Self:
        """Wait as ``flush`` does, for records of a transaction that is then aborted."""
        assert self.producer.flush(WAIT_S_MAX) == 0
        self._unsettled.clear()
        return self

    def without(self, unwanted: Callable[[Coordinates], bool]) -> dict[Coordinates, Sent]:
        """The records without those at some coordinates."""
        return {at: sent for at, sent in self.records.items() if not unwanted(at)}


def coordinates_of(message: Message) -> Coordinates:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert partition is not None
    assert offset is not None
    return topic, partition, offset


def read_back(bootstrap_servers: str, topic: str, partitions: int = 1) -> set[Coordinates]:
    """The coordinates at which Kafka has records."""
    reader = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "reader",
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
    found, open_ends = set(), set(range(partitions))
    deadline = time.monotonic() + WAIT_S_MAX
    reader.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    while open_ends:
        assert time.monotonic() < deadline, "Kafka did not give its records back"
        for message in reader.consume(500, 0.2):
            if message.error() is None:
                found.add(coordinates_of(message))
            else:
                open_ends.discard(message.partition() or 0)
    reader.close()
    return found


# ---------------------------------------------------------------------------------- what is logged


def logged(database: Database, topic: str) -> dict[Coordinates, Sent]:
    """The rows of a topic in the log, in the form of the ledger; each once, written in order."""
    found: dict[Coordinates, Sent] = {}
    with database.connect() as db:
        rows = db.execute(
            'SELECT topic, "partition", "offset", digest, key, headers, kafka_timestamp, '
            "kafka_timestamp_type, ingested_at FROM pipeline.events WHERE topic = %s "
            "ORDER BY 2, 3",
            [topic],
        ).fetchall()
    written: dict[int, datetime] = {}
    for _, partition, offset, digest, key, headers, sent_at, kind, ingested_at in rows:
        at = (topic, partition, offset)
        assert at not in found, f"{at} is in the log twice"
        in_order = ingested_at >= written.setdefault(partition, ingested_at)
        assert in_order, f"{at} was written before the row that precedes it"
        written[partition] = ingested_at
        found[at] = Sent(digest, key, _as_sent(headers), _milliseconds(sent_at), kind)
    return found


def payloads(database: Database, topic: str) -> dict[Coordinates, tuple[str | None, bytes | None]]:
    """The payload's text and the bytes kept beside it."""
    with database.connect() as db:
        rows = db.execute(
            'SELECT "partition", "offset", payload::text, raw FROM pipeline.events '
            "WHERE topic = %s",
            [topic],
        ).fetchall()
    return {(topic, partition, offset): (text, raw) for partition, offset, text, raw in rows}


def is_faithful(value: bytes | None, stored: tuple[str | None, bytes | None]) -> bool:
    """Whether the bytes are there, or the same JSON value."""
    text, raw = stored
    if raw is not None or text is None or value is None:
        return raw == value

    def parsed(of: str | bytes) -> object:
        return json.loads(of, parse_float=Decimal, parse_int=Decimal)

    return parsed(text) == parsed(value)


def _as_sent(headers: list[list[Any]] | None) -> tuple[tuple[str, bytes | None], ...]:
    def plain(part: Any) -> bytes | None:
        if part is None:
            return None
        return base64.b64decode(part["base64"]) if isinstance(part, dict) else part.encode()

    return tuple(((plain(name) or b"").decode(), plain(value)) for name, value in headers or [])


def _milliseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


class OffsetRow(NamedTuple):
    """A partition's row."""

    next_offset: int
    epoch: int
    lag: int | None
    problem: str | None
    owner: str | None


def offset_rows(database: Database) -> dict[tuple[str, int], OffsetRow]:
    """The row of every partition."""
    with database.connect() as db:
        rows = db.execute(
            'SELECT o.topic, o."partition", o.next_offset, o.epoch, l.lag_events, o.problem, '
            "o.owner_member FROM pipeline.consumer_offsets o "
            'JOIN pipeline.lag l USING (topic, "partition")'
        ).fetchall()
    return {(topic, partition): OffsetRow(*rest) for topic, partition, *rest in rows}


def next_offsets(database: Database, topic: str) -> dict[int, int]:
    """The next offsets of a topic's partitions."""
    return {
        partition: row.next_offset
        for (of_topic, partition), row in offset_rows(database).items()
        if of_topic == topic
    }


def installation(database: Database) -> UUID:
    """The identity of the database."""
    with database.connect() as db:
        row = db.execute("SELECT installation_id FROM pipeline.installation").fetchone()
    assert row is not None
    return UUID(str(row[0]))


# ----------------------------------------------------------------------------------------- ingests


def settings_for(
    database: Database, bootstrap_servers: str, topic: str, **changes: Any
) -> Settings:
    """Settings of a quick ingest of one topic, in a group of the same name."""
    options = {
        "fetch.wait.max.ms": "50",
        "reconnect.backoff.max.ms": "300",
        **changes.pop("options", {}),
    }
    return Settings.model_validate(
        {
            "database_url": database.url,
            "kafka_bootstrap_servers": bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            "topics": topic,
            "kafka_options": json.dumps(options),
            "group_id": topic,
            "linger_ms": 10,
            "segment_offsets": 1000,
            **changes,
        }
    )


def ingest_until_end(settings: Settings) -> int:
    """Run `pipeline ingest --until-end`; returns the number of records written."""
    written = 0

    def observe(progress: Progress) -> None:
        nonlocal written
        written = progress.written

    engine = open_engine(settings.database(), application="ingest")
    try:
        Ingest(settings, engine, stop=threading.Event(), until_end=True, observe=observe).run()
    finally:
        engine.dispose()
    return written


class Running:
    """An ingest in a thread, until it ends or is stopped."""

    def __init__(self, settings: Settings) -> None:
        self.stop = threading.Event()
        self.progress = Progress(0, 0)
        self.error: BaseException | None = None
        self._engine = open_engine(settings.database(), application="ingest")
        self._ingest = Ingest(settings, self._engine, stop=self.stop, observe=self._observe)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _observe(self, progress: Progress) -> None:
        self.progress = progress

    def _run(self) -> None:
        try:
            self._ingest.run()
        except BaseException as error:  # noqa: BLE001 - returned by end()
            self.error = error
        finally:
            self._engine.dispose()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, stopped or not."""
        return not self._thread.is_alive()

    def end(self) -> BaseException | None:
        """Stop it; the error that it ended with."""
        self.stop.set()
        self._thread.join(WAIT_S_MAX)
        assert self.has_ended, "the ingest does not stop"
        return self.error


@contextmanager
def running(settings: Settings) -> Iterator[Running]:
    """An ingest for the length of the block; an error of its own is raised at the end."""
    ingest = Running(settings)
    try:
        yield ingest
    finally:
        error = ingest.end()
    if error is not None:
        raise error
