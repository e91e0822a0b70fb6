"""What the producer has sent, by its delivery reports: the log is compared with it."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from hashlib import blake2b
from typing import NamedTuple, cast

from confluent_kafka import Consumer, KafkaError, TopicPartition

from pipeline.partitions import Partition
from pipeline.sandbox.simulator import Books, Chaos, Keying, Record, Simulation
from pipeline.sandbox.simulator.chaos import ChaosReport
from pipeline.sandbox.simulator.producer import Producer

Headers = tuple[tuple[str, bytes | None], ...]

SILENT_SECONDS_MAX = 60.0
"""Maximum time until Kafka returns the next records."""


class Sent(NamedTuple):
    """One record as the brokers confirmed it."""

    digest: bytes | None
    value: bytes | None
    key: bytes | None
    headers: Headers


class Ledger:
    """Every confirmed record by its coordinates.

    Args:
        keep_values: Without the values, little memory is used and only digests are compared.
    """

    def __init__(self, *, keep_values: bool = True) -> None:
        self.keeps_values = keep_values
        self.records: dict[tuple[str, int, int], Sent] = {}
        self.ends: dict[Partition, int] = {}
        self.unplaced = 0
        """Confirmed without an offset: a retried request that the broker had already served."""

    def note(self, topic: str, partition: int, offset: int, record: Record) -> None:
        """Add the record of a delivery report."""
        if offset < 0:
            self.unplaced += 1
            return
        self._add(topic, partition, offset, record.value, record.key, tuple(record.headers))

    def __len__(self) -> int:
        return len(self.records)

    def _add(
        self,
        topic: str,
        partition: int,
        offset: int,
        value: bytes | None,
        key: bytes | None,
        headers: Headers,
    ) -> None:
        place = Partition(topic, partition)
        digest = None if value is None else blake2b(value, digest_size=16).digest()
        kept = value if self.keeps_values else None
        assert (topic, partition, offset) not in self.records, f"{place}: two records at {offset}"
        self.records[topic, partition, offset] = Sent(digest, kept, key, headers)
        self.ends[place] = max(self.ends.get(place, 0), offset + 1)

    @classmethod
    def read_back(cls, bootstrap_servers: str, topic: str, partitions: int) -> "Ledger":
        """What Kafka itself holds, read by a client that shares nothing with the pipeline.

        For tests that kill the broker: a retried request may be confirmed without an offset, so the
        delivery reports are not enough there.
        """
        ledger = cls()
        for number in range(partitions):
            for record in read_partition(bootstrap_servers, Partition(topic, number)):
                ledger._add(topic, number, record.offset, record.value, record.key, record.headers)
        return ledger


class LeanLedger(Ledger):
    """The same in 16 bytes per record, for runs of an hour: it holds fingerprints.

    It also holds the records whose report had no offset, by partition.
    """

    def __init__(self) -> None:
        super().__init__(keep_values=False)
        self._prints: dict[Partition, bytearray] = {}
        self._unplaced: dict[Partition, Counter[bytes]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size + self.unplaced

    def note(self, topic: str, partition: int, offset: int, record: Record) -> None:
        """Add the record of a delivery report."""
        if offset < 0:
            seen = self._unplaced.setdefault(Partition(topic, partition), Counter())
            seen[fingerprint(record.value, record.key, tuple(record.headers))] += 1
        super().note(topic, partition, offset, record)

    def claim(self, partition: Partition, record: "Held") -> bool:
        """Whether this record was sent to this partition and offset.

        A report without an offset matches one record. Call it once for every record in Kafka.
        """
        expected = self._prints.get(partition, b"")[record.offset * 16 : record.offset * 16 + 16]
        fingerprint_of_record = fingerprint(record.value, record.key, record.headers)
        if any(expected):
            return expected == fingerprint_of_record
        unplaced = self._unplaced.get(partition, Counter())
        unplaced[fingerprint_of_record] -= 1
        return unplaced[fingerprint_of_record] >= 0

    @property
    def unclaimed(self) -> int:
        """The number of reports without an offset that match no record of Kafka."""
        return sum(max(0, left) for counts in self._unplaced.values() for left in counts.values())

    def _add(
        self,
        topic: str,
        partition: int,
        offset: int,
        value: bytes | None,
        key: bytes | None,
        headers: Headers,
    ) -> None:
        place = Partition(topic, partition)
        prints = self._prints.setdefault(place, bytearray())
        begin = offset * 16
        prints.extend(bytes(max(0, begin + 16 - len(prints))))
        assert not any(prints[begin : begin + 16]), f"{place}: two records at {offset}"
        prints[begin : begin + 16] = fingerprint(value, key, headers)
        self.ends[place] = max(self.ends.get(place, 0), offset + 1)
        self._size += 1


def fingerprint(value: bytes | None, key: bytes | None, headers: Headers) -> bytes:
    """16 bytes that differ for records with different content."""
    return blake2b(repr((value, key, headers)).encode(), digest_size=16).digest()


class Held(NamedTuple):
    """A record as Kafka holds it."""

    offset: int
    value: bytes | None
    key: bytes | None
    headers: Headers


def read_partition(bootstrap_servers: str, partition: Partition) -> Iterator[Held]:
    """What Kafka holds of a partition, in the order of offsets, up to its current end."""
    with closing(
        Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "reader",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
            }
        )
    ) as reader:
        reader.assign([TopicPartition(partition.topic, partition.number, 0)])
        deadline = time.monotonic() + SILENT_SECONDS_MAX
        while True:
            for message in reader.consume(1000, 0.5):
                error = message.error()
                if error is None:
                    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
                    offset = message.offset()
                    assert offset is not None
                    yield Held(offset, message.value(), message.key(), tuple(headers))
                    deadline = time.monotonic() + SILENT_SECONDS_MAX
                elif error.code() == KafkaError._PARTITION_EOF:
                    return
            assert time.monotonic() < deadline, f"Kafka returns no more records of {partition}"


class Feed:
    """Produces a simulated day at a broker in the background, and keeps the ledger.

    As a context manager it starts on entry; on exit it ends at the next consistent point, and the
    ledger and the books are exact from then on.

    Args:
        events: How many; None: until it is stopped.
        rate: Records per second; None: as fast as possible.
        seed: Printed, so that a failure can be repeated.
        keep_books: They take 400 bytes per event; like ``keep_values`` if None.
        into: The ledger to continue; a new ledger if None.
        keying: By what the records are partitioned.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        *,
        partitions: int,
        seed: int,
        events: int | None = None,
        rate: float | None = None,
        chaos: Chaos | None = None,
        keep_values: bool = True,
        keep_books: bool | None = None,
        into: Ledger | None = None,
        keying: Keying = Keying.USER,
    ) -> None:
        print(f"simulated with seed={seed}")
        self.ledger = Ledger(keep_values=keep_values) if into is None else into
        self._simulation = Simulation(
            seed=seed,
            events=events,
            topic=topic,
            partitions=partitions,
            chaos=chaos,
            keep_books=keep_values if keep_books is None else keep_books,
            keying=keying,
        )
        self._options = {"bootstrap.servers": bootstrap_servers}
        self._rate = rate
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Ledger:
        """End the feed at the next consistent point, and wait for its end."""
        self._simulation.stop()
        return self.wait()

    def wait(self) -> Ledger:
        """Wait until the brokers have every record."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.ledger

    @property
    def books(self) -> Books:
        """What every read model must hold, once the feed has ended."""
        return self._simulation.books

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the feed too early."""
        return self._failure

    @property
    def report(self) -> ChaosReport:
        """What chaos has done, complete once the feed has ended."""
        return self._simulation.report

    def _produce(self) -> None:
        try:
            with Producer(self._options, on_delivery=self.ledger.note) as producer:
                producer.produce(self._records(), rate=self._rate)
        except BaseException as failure:  # noqa: BLE001 - raised by whoever waits for the feed
            self._failure = failure

    def _records(self) -> Iterable[Record]:
        yield from self._simulation
