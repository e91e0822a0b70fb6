"""Events become Kafka records, as a producer at Upvest might write them.

Upvest's public documentation says one JSON event per record, in UTF-8, in a topic of 6 partitions,
keyed by tenant, by user or by entity (``Keying``). The partition is what the default partitioner of
Kafka's own client makes of the key.
"""

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from random import Random
from typing import Final, NamedTuple

import orjson

from pipeline.sandbox.simulator.market import Instrument
from pipeline.sandbox.simulator.timeline import SimulatedEvent


class Keying(StrEnum):
    """By what a topic's records are partitioned; Upvest states it per topic.

    Within one key events are in order; two keys may share a partition.
    """

    TENANT = "tenant"
    """All events of a client: one partition has everything, the others stay empty."""
    USER = "user"
    """The user or business that an event is about, instruments by themselves."""
    ENTITY = "entity"
    """The order, execution, account … itself."""


TENANT: Final = b"0d4c8a1e-7f3b-4b52-9a6e-2c1f5e8d7b90"
"""The key of all records of the one tenant that is simulated."""

Headers = Sequence[tuple[str, bytes | None]]

_MASK: Final = 0xFFFFFFFF
_MULTIPLIER: Final = 0x5BD1E995
_SEED: Final = 0x9747B28C


class Record(NamedTuple):
    """A record to be produced.

    Attributes:
        partition: None leaves it to the client's partitioner.
        value: None is a tombstone.
        timestamp_ms: When it happened in the simulation, milliseconds since 1970.
    """

    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


@lru_cache(maxsize=100_000)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's default partitioner (murmur2) gives a key."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(key: bytes) -> int:
    """Kafka's 32-bit murmur2, unsigned."""
    length = len(key)
    hashed = _SEED ^ length
    whole = length - length % 4
    for at in range(0, whole, 4):
        block = int.from_bytes(key[at : at + 4], "little") * _MULTIPLIER & _MASK
        block = (block ^ block >> 24) * _MULTIPLIER & _MASK
        hashed = hashed * _MULTIPLIER & _MASK ^ block
    if whole < length:
        hashed = (hashed ^ int.from_bytes(key[whole:], "little")) * _MULTIPLIER & _MASK
    hashed = (hashed ^ hashed >> 13) * _MULTIPLIER & _MASK
    return hashed ^ hashed >> 15


def encode(event: dict[str, object]) -> bytes:
    """Compact JSON with ``&``, ``<`` and ``>`` escaped, as Go writes it."""
    value = orjson.dumps(event)
    if b"&" in value or b"<" in value or b">" in value:
        value = value.replace(b"&", rb"\u0026").replace(b"<", rb"\u003c").replace(b">", rb"\u003e")
    return value


class Recorder:
    """Makes the records of one topic pair.

    Args:
        seed: Of the headers and prices; the events' own chance is not touched by them.
        topic: Where events go.
        partitions: Of that topic.
        prices_topic: Where price ticks go.
        keying: By what records are partitioned.
    """

    def __init__(
        self,
        seed: int | str,
        *,
        topic: str,
        partitions: int,
        prices_topic: str | None,
        keying: Keying = Keying.USER,
    ) -> None:
        self._keying = keying
        self._random = Random(f"records {seed}")
        self._topic = topic
        self._partitions = partitions
        self._prices_topic = prices_topic

    def event(self, simulated: SimulatedEvent) -> Record:
        """The record of an event; a quarter of them have headers."""
        dice = self._random.random()
        headers: Headers = ()
        if dice < 0.25:
            trace = f"{self._random.getrandbits(64):016x}".encode()
            headers = (("content-type", b"application/json"), ("trace-id", trace))
            if dice < 0.01:  # names may repeat, values may be missing or no text
                headers = (*headers, ("trace-id", None), ("binary", b"\x00\xff\xfe"))
        key = self._key(simulated)
        return Record(
            self._topic,
            partition_of(key, self._partitions),
            key,
            encode(simulated.event),
            headers,
            simulated.occurred_ns // 1_000_000,
        )

    def _key(self, simulated: SimulatedEvent) -> bytes:
        match self._keying:
            case Keying.TENANT:
                return TENANT
            case Keying.USER:
                return simulated.key
            case Keying.ENTITY:
                # Balances and positions have no id of their own, but that of what they belong to.
                thing = simulated.event["object"]
                names = ("id", "account_id", "account_group_id", "user_id")
                return next(
                    (str(thing[name]).encode() for name in names if name in thing), simulated.key
                )

    def price(self, instruments: Sequence[Instrument], timestamp_ms: int) -> Record | None:
        """Now and then a tick of some instrument's price: JSON, but no event.

        Upvest has a topic for prices, whose payload it has not published; this one is invented.
        """
        if self._prices_topic is None or not instruments or self._random.random() > 0.1:
            return None
        instrument = instruments[int(self._random.random() * len(instruments))]
        tick = {
            "isin": instrument.isin,
            "price": str(instrument.price),
            "currency": instrument.currency,
            "time": timestamp_ms,
        }
        key = TENANT if self._keying is Keying.TENANT else instrument.isin.encode()
        return Record(self._prices_topic, None, key, encode(tick), (), timestamp_ms)
