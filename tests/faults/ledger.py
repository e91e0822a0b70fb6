"""What the producer knows it has sent: the oracle that the log is compared with."""

import threading
import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple, cast

from confluent_kafka import Consumer, KafkaError, TopicPartition

from pipeline.positions import Partition
from pipeline.simulator import Books, Chaos, Record, Simulation
from pipeline.simulator.producer import Producer

Headers = tuple[tuple[str, bytes | None], ...]

READ_BACK_SECONDS_MAX = 60.0


class Sent(NamedTuple):
    """One record as the brokers confirmed it."""

    digest: bytes | None
    value: bytes | None
    key: bytes | None
    headers: Headers


class Ledger:
    """Every confirmed record by its coordinates.

    Args:
        keep_values: Without the values it costs little memory, and only digests are compared.
    """

    def __init__(self, *, keep_values: bool = True) -> None:
        self.keeps_values = keep_values
        self.records: dict[tuple[str, int, int], Sent] = {}
        self.ends: dict[Partition, int] = {}
        self.unplaced = 0
        """Confirmed without an offset: a retried request that the broker had already served."""

    def note(self, topic: str, partition: int, offset: int, record: Record) -> None:
        """Take a delivery report."""
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

        For tests that kill the broker: the answer to a request that is sent again may come without
        an offset, so delivery reports alone tell too little there.
        """
        ledger = cls()
        reader = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "reader",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
            }
        )
        try:
            reader.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
            open_ends = set(range(partitions))
            deadline = time.monotonic() + READ_BACK_SECONDS_MAX
            while open_ends:
                assert time.monotonic() < deadline, "Kafka did not give all records back in time"
                for message in reader.consume(1000, 0.5):
                    trouble, number = message.error(), message.partition() or 0
                    if trouble is None:
                        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
                        ledger._add(
                            topic,
                            number,
                            message.offset() or 0,
                            message.value(),
                            message.key(),
                            tuple(headers),
                        )
                    elif trouble.code() == KafkaError._PARTITION_EOF:
                        open_ends.discard(number)
        finally:
            reader.close()
        return ledger


class Feed:
    """Produces a simulated day at a broker in the background, and keeps the ledger.

    As a context manager it starts on entry; on exit it ends at the next consistent point, and the
    ledger and the books are exact from then on.

    Args:
        events: How many; None goes on until stopped.
        rate: Records a second; None for as fast as it goes.
        seed: Printed, for a failure to be repeated.
        into: The ledger to go on with; a new one if None.
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
        into: Ledger | None = None,
    ) -> None:
        print(f"simulated with seed={seed}")
        self.ledger = Ledger(keep_values=keep_values) if into is None else into
        self._simulation = Simulation(
            seed=seed,
            events=events,
            topic=topic,
            partitions=partitions,
            chaos=chaos,
            keep_books=keep_values,
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
        """End soon, and wait for it."""
        self._simulation.stop()
        return self.wait()

    def wait(self) -> Ledger:
        """Wait until everything is with the brokers."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self.ledger

    @property
    def books(self) -> Books:
        """What every read model must hold, once the feed has ended."""
        return self._simulation.books

    def _produce(self) -> None:
        try:
            with Producer(self._options, on_delivery=self.ledger.note) as producer:
                producer.produce(self._records(), rate=self._rate)
        except BaseException as failure:  # noqa: BLE001 - raised by whoever waits for the feed
            self._failure = failure

    def _records(self) -> Iterable[Record]:
        yield from self._simulation
