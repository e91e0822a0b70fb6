"""A run of the simulator: a broker's events as Kafka records, the books beside them."""

from collections.abc import Iterator

from pipeline.sandbox.simulator.books import Books
from pipeline.sandbox.simulator.broker import Broker
from pipeline.sandbox.simulator.chaos import Chaos, ChaosReport, Disturber
from pipeline.sandbox.simulator.records import TENANT, Keying, Record, Recorder, partition_of


class Simulation:
    """Kafka records of a believable broker, in the order in which a producer would send them.

    Deterministic: the same arguments give the same records, byte for byte. May be iterated once.
    The books are exact when the iteration has ended; before that they are ahead of the records
    that chaos holds back.

    Args:
        seed: Everything random comes from it.
        events: Exactly so many events of the broker; chaos adds records to them. None: no end.
        topic: Where events go.
        partitions: Of that topic.
        prices_topic: Where to put about one price tick per ten events; None for no ticks.
        chaos: What goes wrong; None for nothing.
        keep_books: Keep the books; they grow with the run, everything else is bounded.
        customers: Account groups at which onboarding stops.
        start: The simulation's first day, YYYY-MM-DD.
        keying: By what the records are partitioned; by tenant, all are in one partition.

    Attributes:
        report: What chaos has done so far.
    """

    def __init__(
        self,
        seed: int | str,
        *,
        events: int | None,
        topic: str = "Notifications",
        partitions: int = 6,
        prices_topic: str | None = None,
        chaos: Chaos | None = None,
        keep_books: bool = True,
        customers: int = 400,
        start: str = "2026-01-05",
        keying: Keying = Keying.USER,
    ) -> None:
        self.report = ChaosReport()
        self._broker = Broker(seed, customers=customers, start=start)
        self._recorder = Recorder(
            seed, topic=topic, partitions=partitions, prices_topic=prices_topic, keying=keying
        )
        used = [partition_of(TENANT, partitions)] if keying is Keying.TENANT else range(partitions)
        self._disturber = (
            Disturber(chaos, seed, partitions=used, report=self.report) if chaos else None
        )
        self._books = Books() if keep_books else None
        self._records = self._run(events)

    def __iter__(self) -> Iterator[Record]:
        return self._records

    @property
    def books(self) -> Books:
        """What every read model must say once all records have arrived.

        Raises:
            ValueError: The simulation was created without books.
        """
        if self._books is None:
            raise ValueError("this simulation keeps no books (keep_books=False)")
        return self._books

    def stop(self) -> None:
        """End at the next point where the books add up; what is held back still comes."""
        self._broker.stop()

    def _run(self, events: int | None) -> Iterator[Record]:
        for simulated in self._broker.events(events):
            if self._books is not None:
                self._books.record(simulated)
            record = self._recorder.event(simulated)
            if self._disturber is None:
                yield record
            else:
                yield from self._disturber.disturb(record, simulated.type)
            price = self._recorder.price(self._broker.market.all, record.timestamp_ms)
            if price is not None:
                yield price
        if self._disturber is not None:
            yield from self._disturber.rest()
