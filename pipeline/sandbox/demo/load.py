"""Produces records at a rate that the mock broker can take, and keeps a ledger of them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple, Self

from pipeline.partitions import Offset
from pipeline.sandbox.simulator import Record
from pipeline.sandbox.simulator.producer import Producer

BATCH_RECORDS = 250
UNREAD_RECORDS_MAX = 6_000
"""Maximum lag of the log. The mock broker keeps 5 MB per partition, which is far more."""
POLL_S = 0.1
"""How often the lag is read."""


class Comparison(NamedTuple):
    """The log against the ledger, record by record.

    Attributes:
        compared: Records in the ledger.
        missing: Confirmed by the broker, and not in the log.
        extra: In the log, and never confirmed.
        changed: In both, with other bytes.
    """

    compared: int
    missing: int
    extra: int
    changed: int

    @property
    def differing(self) -> int:
        """Records that are not what was produced."""
        return self.missing + self.extra + self.changed


class Ledger:
    """Every record that the broker confirmed: its coordinates, and the digest of its bytes."""

    def __init__(self) -> None:
        self._digests: dict[tuple[int, int], bytes | None] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def note(self, _topic: str, partition: int, offset: Offset, record: Record) -> None:
        """Take a delivery report."""
        self._digests[partition, offset] = self.digest(record.value)

    @staticmethod
    def digest(value: bytes | None) -> bytes | None:
        """As the log has it; a tombstone has none."""
        return None if value is None else blake2b(value, digest_size=16).digest()

    def compare(self, logged: Mapping[tuple[int, int], bytes | None]) -> Comparison:
        """What differs from the log; the log's digests are read from it, by coordinates."""
        sent = self._digests
        both = sent.keys() & logged.keys()
        return Comparison(
            compared=len(sent),
            missing=len(sent.keys() - both),
            extra=len(logged.keys() - both),
            changed=sum(sent[record] != logged[record] for record in both),
        )


class _HaltedError(Exception):
    """Leaves the producer with what it has not sent yet."""


class Feed:
    """Produces in the background, in small batches, never too far ahead of the log.

    As a context manager it starts on entry; on exit it drops what is left.

    Args:
        bootstrap_servers: Of the broker.
        records: What to produce.
        ledger: Gets what was confirmed.
        rate: Maximum records per second.
        logged: Counts the records in the log.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        records: Iterable[Record],
        ledger: Ledger,
        *,
        rate: float,
        logged: Callable[[], int],
    ) -> None:
        self._options = {"bootstrap.servers": bootstrap_servers}
        self._records = iter(records)
        self._ledger = ledger
        self._rate = rate
        self._logged = logged
        self._halt = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self._thread.join()

    @property
    def is_done(self) -> bool:
        """Whether the broker has confirmed everything.

        Raises:
            PipelineError: Producing has failed.
        """
        if self._thread.is_alive():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def _run(self) -> None:
        try:
            with Producer(self._options, on_delivery=self._ledger.note) as producer:
                while batch := list(islice(self._records, BATCH_RECORDS)):
                    self._wait_for_the_log()
                    producer.produce(self._until_halted(batch), rate=self._rate)
        except _HaltedError:
            pass
        except Exception as failure:  # noqa: BLE001 - raised in the thread that looks
            self._failure = failure

    def _wait_for_the_log(self) -> None:
        while len(self._ledger) - self._logged() > UNREAD_RECORDS_MAX:
            if self._halt.wait(POLL_S):
                raise _HaltedError

    def _until_halted(self, batch: Iterable[Record]) -> Iterator[Record]:
        for record in batch:
            if self._halt.is_set():
                raise _HaltedError
            yield record
