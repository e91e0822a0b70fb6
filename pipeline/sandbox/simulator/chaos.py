"""What goes wrong between a broker and us, on purpose: repeats, disorder, surprises, rubbish.

None of it changes the books: a reader that keeps its promises ends with the same read models.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import orjson

from pipeline.sandbox.simulator.records import Record, encode
from pipeline.sandbox.simulator.timeline import Json

_DELAY_MAX: Final = 1_000
"""A late or repeated record comes at most so many records later."""

# Fields that the books leave out, with values that Upvest does not (yet) know.
_NEW_VALUES: Final = {
    "USER": ("salutation", "SALUTATION_NEUTRAL"),
    "USER_CHECK": ("method", "NFC_ID"),
    "ORDER": ("initiation_flow", "ROBO_ADVICE"),
}
_UNKNOWN_TYPES: Final = (
    "FOO.BAR", "CRYPTO_WALLET.CREATED", "LOAN.PARTIALLY.REPAID", "lower.case", "NODOT",
)  # fmt: skip
_BAD_AMOUNTS: Final = ("12,5", "NaN", "Infinity", "0x10", "1 000", "--1", "twelve")


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """How much goes wrong: each rate is a share of the broker's events, from 0 to 1.

    Attributes:
        repeats: The same bytes again, up to a thousand records later; a quarter of them in
            another partition.
        late: Held back, up to a thousand records.
        astray: In a random partition, apart from the other events of its entity.
        unknown_fields: With fields that nobody has seen before.
        unknown_enums: With a new value in an enum that the books leave out.
        blank_updated_at: With an ``updated_at`` that is empty, null or missing.
        unknown_types: Events, added, of types that nobody has seen before.
        malformed: Records, added, that are no event at all.
        bad_amounts: Events, added, whose amount is no number; of entities in no book.
    """

    repeats: float = 0.02
    late: float = 0.02
    astray: float = 0.03
    unknown_fields: float = 0.01
    unknown_enums: float = 0.01
    blank_updated_at: float = 0.003
    unknown_types: float = 0.005
    malformed: float = 0.01
    bad_amounts: float = 0.001


@dataclass
class ChaosReport:
    """What was done to the records.

    Attributes:
        counts: How often, by kind.
        bad_amounts: (event id, event type) of each event whose amount is no number.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad_amounts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def malformed(self) -> int:
        """How many records were added that are no event."""
        return sum(self.counts[kind] for kind in MALFORMED)

    @property
    def repeats(self) -> int:
        """How many records came again, in their own partition or another."""
        return self.counts["repeat"] + self.counts["repeat_elsewhere"]

    @property
    def added(self) -> int:
        """How many records there are on top of the broker's events."""
        events = self.counts["unknown_type"] + self.counts["bad_amount"]
        return self.malformed + self.repeats + events


class Disturber:
    """Does to records what ``chaos`` says. The same arguments and records, the same outcome.

    Args:
        chaos: The rates.
        seed: Its own source of chance, so that the broker's events stay the same without it.
        partitions: Those of the topic that get records.
        report: Where it counts what it does.
    """

    def __init__(
        self, chaos: Chaos, seed: int | str, *, partitions: Sequence[int], report: ChaosReport
    ) -> None:
        self._chaos = chaos
        self._random = Random(f"chaos {seed}")
        self._partitions = partitions
        self._report = report
        self._held: list[tuple[int, int, Record]] = []
        self._passed = self._holds = self._spoilt = 0

    def disturb(self, record: Record, event_type: str) -> Iterator[Record]:
        """What is sent where ``record`` should have been: it, changed, or nothing yet, and more."""
        self._passed += 1
        record = self._change(record, event_type)
        if self._happens(self._chaos.astray, "astray"):
            record = record._replace(partition=self._any_partition())
        if self._happens(self._chaos.late, "late"):
            self._hold(record)
        else:
            yield record
        if self._random.random() < self._chaos.repeats:
            self._repeat(record)
        yield from self._added(record)
        while self._held and self._held[0][0] <= self._passed:
            yield heapq.heappop(self._held)[2]

    def rest(self) -> Iterator[Record]:
        """All that is still held back."""
        while self._held:
            yield heapq.heappop(self._held)[2]

    def _happens(self, rate: float, kind: str) -> bool:
        happens = self._random.random() < rate
        if happens:
            self._report.counts[kind] += 1
        return happens

    def _any_partition(self) -> int:
        return self._partitions[int(self._random.random() * len(self._partitions))]

    def _hold(self, record: Record) -> None:
        due = self._passed + 1 + int(self._random.random() ** 2 * _DELAY_MAX)
        self._holds += 1
        heapq.heappush(self._held, (due, self._holds, record))

    def _repeat(self, record: Record) -> None:
        if self._random.random() < 0.25 and len(self._partitions) > 1:
            self._report.counts["repeat_elsewhere"] += 1
            step = 1 + int(self._random.random() * (len(self._partitions) - 1))
            elsewhere = ((record.partition or 0) + step) % len(self._partitions)
            self._hold(record._replace(partition=elsewhere))
        else:
            self._report.counts["repeat"] += 1
            self._hold(record)

    def _change(self, record: Record, event_type: str) -> Record:
        """Perhaps the same event with something in it that nobody expects."""
        dice = self._random.random()
        chaos = self._chaos
        if dice > chaos.unknown_fields + chaos.unknown_enums + chaos.blank_updated_at:
            return record
        event: Json = orjson.loads(record.value or b"{}")
        thing = event["object"]
        category = event_type.partition(".")[0]
        enum, new_value = _NEW_VALUES.get(category, ("", ""))
        if dice < chaos.blank_updated_at and "updated_at" in thing:
            kind = "blank_updated_at"
            thing["updated_at"] = "" if self._random.random() < 0.5 else None
            if self._random.random() < 0.3:
                del thing["updated_at"]
        elif dice < chaos.blank_updated_at + chaos.unknown_enums and enum in thing:
            kind = "unknown_enum"
            thing[enum] = new_value
        else:
            kind = "unknown_field"
            event["trace"] = {"id": "zq", "hops": [1, 2, 3]}
            thing["sustainability"] = {"score": "0.5", "labels": ["a", None]}
        self._report.counts[kind] += 1
        return record._replace(value=encode(event))

    def _added(self, near: Record) -> Iterator[Record]:
        """Records of the chaos's own, in some partition, about where ``near`` stands."""
        if self._happens(self._chaos.unknown_types, "unknown_type"):
            kind = _UNKNOWN_TYPES[int(self._random.random() * len(_UNKNOWN_TYPES))]
            thing: Json = {"id": self._uuid(), "balance": "1.00", "nested": {"a": [1, "2"]}}
            yield self._aside(near, encode(self._envelope(kind, thing)))
        if self._happens(self._chaos.bad_amounts, "bad_amount"):
            event = self._bad_amount()
            self._report.bad_amounts.append((event["id"], event["type"]))
            yield self._aside(near, encode(event))
        if self._random.random() < self._chaos.malformed:
            # One after the other, so that every kind comes.
            kind = _KINDS[self._spoilt % len(_KINDS)]
            self._spoilt += 1
            self._report.counts[kind] += 1
            order = self._envelope("ORDER.NEW", self._order())
            event = self._envelope("FOO.BAR", {"id": self._uuid(), "n": "@"})
            yield self._aside(near, MALFORMED[kind](near.value or b"", order, event))

    def _aside(self, near: Record, value: bytes | None) -> Record:
        key = None if self._random.random() < 0.3 else b"\xff\x00 not text"
        return near._replace(partition=self._any_partition(), key=key, value=value)

    def _uuid(self) -> str:
        text = f"{self._random.getrandbits(128):032x}"
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"

    def _envelope(self, event_type: str, thing: Json) -> Json:
        return {
            "id": self._uuid(),
            "created_at": "2026-01-05T07:00:00Z",
            "type": event_type,
            "object": thing,
        }

    def _order(self) -> Json:
        return {
            "id": self._uuid(),
            "created_at": "2026-01-05T07:00:00Z",
            "updated_at": "2026-01-05T07:00:00Z",
            "user_id": self._uuid(),
            "account_id": self._uuid(),
            "cash_amount": "100.00",
            "currency": "EUR",
            "side": "BUY",
            "instrument_id": "DE00ZQZZZZZ0",
            "instrument_id_type": "ISIN",
            "order_type": "MARKET",
            "quantity": "",
            "status": "NEW",
            "fee": "0",
            "initiation_flow": "API",
            "executions": [],
            "client_reference": "",
        }

    def _bad_amount(self) -> Json:
        amount = _BAD_AMOUNTS[int(self._random.random() * len(_BAD_AMOUNTS))]
        kind = int(self._random.random() * 4)
        if kind == 0:
            return self._envelope("ORDER.NEW", {**self._order(), "cash_amount": amount})
        if kind == 1:
            execution: Json = {
                "id": self._uuid(),
                "order_id": self._uuid(),
                "side": "BUY",
                "cash_amount": "1.00",
                "share_quantity": "1",
                "price": amount,
                "currency": "EUR",
                "transaction_time": "2026-01-05T07:00:00Z",
                "settlement_date": "2026-01-07",
                "status": "FILLED",
                "taxes": [{"type": "TOTAL", "amount": "0"}],
            }
            return self._envelope("EXECUTION.FILLED", execution)
        if kind == 2:
            position: Json = {
                "account_id": self._uuid(),
                "instrument": {"uuid": self._uuid(), "isin": "DE00ZQZZZZZ0"},
                "quantity": amount,
                "locked_for_trading": "0",
                "pending_settlement": "0",
                "available_for_trading": "0",
            }
            return self._envelope("POSITION.UPDATED", position)
        entry: Json = {
            "id": self._uuid(),
            "type": "TOPUP",
            "account_group_id": self._uuid(),
            "delta": {"amount": amount, "currency": "EUR"},
            "booking_date": "2026-01-05T07:00:00Z",
            "value_date": "2026-01-05T07:00:00Z",
            "created_at": "2026-01-05T07:00:00Z",
            "updated_at": "2026-01-05T07:00:00Z",
            "taxes": [],
            "references": [{"id": self._uuid(), "type": "TOPUP"}],
        }
        return self._envelope("CASH_TRANSACTION.EXECUTED", entry)


def _with(json: bytes) -> Callable[[bytes, Json, Json], bytes]:
    """An event of an unknown type that has this JSON somewhere inside it."""
    return lambda _near, _order, event: encode(event).replace(b'"@"', json)


def _in_order(json: bytes) -> Callable[[bytes, Json, Json], bytes]:
    """An order with this JSON as its client reference."""
    blank = b'"client_reference":""'
    return lambda _near, order, _event: encode(order).replace(blank, blank[:-2] + json)


# What each kind of malformed record holds: from a real record's value, an order of nobody's, and
# an event of an unknown type. None of them may become a row of any read model.
MALFORMED: Final[dict[str, Callable[[bytes, Json, Json], bytes | None]]] = {
    "tombstone": lambda _near, _order, _event: None,
    "empty": lambda _near, _order, _event: b"",
    "not_utf8": lambda _near, _order, event: encode(event).replace(b'"@"', b'"\xff\xfe\xc3"'),
    "not_json": lambda _near, _order, _event: b"<html>502 Bad Gateway</html>",
    "truncated": lambda near, _order, _event: near[: len(near) * 2 // 3],
    "nul_escape": _in_order(rb'"a\u0000b"'),
    "lone_surrogate": _in_order(rb'"\ud800"'),
    "duplicate_keys": _with(b'{"a":1,"a":2}'),
    "exponent_400": _with(b"1E400"),
    "exponent_200000": _with(b"1e200000"),
    "digits_40": _with(b"1234567890" * 4),
    "nested_2000": _with(b"[" * 2_000 + b"]" * 2_000),
    "nested_100000": _with(b"[" * 100_000 + b"]" * 100_000),
    "bom": lambda _near, _order, event: b"\xef\xbb\xbf" + encode(event),
    "scalar": lambda _near, _order, _event: b"42",
    "array": lambda _near, order, _event: b"[" + encode(order) + b"]",
    "no_envelope": lambda _near, order, _event: encode(order["object"]),
    "wrong_envelope_types": lambda _near, _order, _event: (
        b'{"id":42,"created_at":true,"type":["ORDER.NEW"],"object":"none"}'
    ),
}
_KINDS: Final = tuple(MALFORMED)
