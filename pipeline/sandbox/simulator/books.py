"""The simulator's own books: what every read model must contain after the events so far.

They take the events as the broker emits them, in the order of time and once each, so they need
none of the rules by which a projector finds the newest version; that is what makes them an oracle.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from decimal import Decimal
from types import MappingProxyType
from typing import Final, NamedTuple
from uuid import UUID

from pipeline.sandbox.simulator.exact import ZERO, add
from pipeline.sandbox.simulator.timeline import Json, SimulatedEvent

Value = UUID | Decimal | date | str | int | bool | None
"""A column's value, of the type in which psycopg gives it."""

_Reader = Callable[[object], Value]


def _text(value: object) -> str | None:
    return str(value) if value not in (None, "") else None


def _uuid(value: object) -> UUID | None:
    return UUID(str(value)) if value not in (None, "") else None


def _number(value: object) -> Decimal | None:
    return Decimal(str(value)) if value not in (None, "") else None


def _date(value: object) -> date | None:
    return date.fromisoformat(str(value)) if value not in (None, "") else None


def _as_is(value: object) -> int | bool | None:
    return value if isinstance(value, int) else None


class _Column(NamedTuple):
    name: str
    path: tuple[str, ...]
    read: _Reader


def _columns(*spelled: tuple[str, str, _Reader]) -> tuple[_Column, ...]:
    return tuple(_Column(name, tuple(path.split(".")), read) for name, path, read in spelled)


class _Table(NamedTuple):
    """A read model: how many of its columns, from the left, are its key, and what they say."""

    name: str
    key: int
    columns: tuple[_Column, ...]

    def pick(self, thing: Json) -> tuple[object, ...]:
        """The columns' values as they stand in an event's object."""
        values: list[object] = []
        for _, path, _ in self.columns:
            value: object = thing
            for step in path:
                value = value.get(step) if isinstance(value, dict) else None
            values.append(value)
        return tuple(values)


_CASH_KEY: Final = (
    ("cash_transaction_id", "id", _uuid),
    ("transaction_type", "type", _text),
)
_SECURITY_KEY: Final = (
    ("security_transaction_id", "id", _uuid),
    ("transaction_type", "type", _text),
)
_INSTRUMENT: Final = (
    ("instrument_uuid", "instrument.uuid", _uuid),
    ("isin", "instrument.isin", _text),
)

_SNAPSHOTS: Final = {
    "USER": _Table(
        "users",
        1,
        _columns(
            ("user_id", "id", _uuid),
            ("first_name", "first_name", _text),
            ("last_name", "last_name", _text),
            ("birth_date", "birth_date", _date),
            ("address_line1", "address.address_line1", _text),
            ("status", "status", _text),
        ),
    ),
    "USER_CHECK": _Table(
        "user_checks",
        1,
        _columns(
            ("check_id", "id", _uuid),
            ("user_id", "user_id", _uuid),
            ("check_type", "type", _text),
            ("status", "status", _text),
        ),
    ),
    "ACCOUNT_GROUP": _Table(
        "account_groups",
        1,
        _columns(
            ("account_group_id", "id", _uuid),
            ("group_type", "type", _text),
            ("status", "status", _text),
            ("securities_account_number", "securities_account_number", _text),
        ),
    ),
    "ACCOUNT": _Table(
        "accounts",
        1,
        _columns(
            ("account_id", "id", _uuid),
            ("account_group_id", "account_group_id", _uuid),
            ("account_type", "type", _text),
            ("account_number", "account_number", _as_is),
            ("name", "name", _text),
            ("status", "status", _text),
        ),
    ),
    "INSTRUMENT": _Table(
        "instruments",
        1,
        _columns(
            ("instrument_uuid", "id", _uuid),
            ("isin", "isin", _text),
            ("wkn", "wkn", _text),
            ("name", "name", _text),
            ("fractional_trading", "fractional_trading", _as_is),
            ("trading_status", "trading_status", _text),
        ),
    ),
    "ORDER": _Table(
        "orders",
        1,
        _columns(
            ("order_id", "id", _uuid),
            ("user_id", "user_id", _uuid),
            ("account_id", "account_id", _uuid),
            ("side", "side", _text),
            ("order_type", "order_type", _text),
            ("isin", "instrument_id", _text),
            ("cash_amount", "cash_amount", _number),
            ("currency", "currency", _text),
            ("quantity", "quantity", _number),
            ("limit_price", "limit_price", _number),
            ("stop_price", "stop_price", _number),
            ("expiry_date", "expiry_date", _date),
            ("fee", "fee", _number),
            ("status", "status", _text),
            ("cancellation_reason", "cancellation_reason", _text),
            ("client_reference", "client_reference", _text),
        ),
    ),
    "EXECUTION": _Table(
        "executions",
        1,
        _columns(
            ("execution_id", "id", _uuid),
            ("order_id", "order_id", _uuid),
            ("side", "side", _text),
            ("cash_amount", "cash_amount", _number),
            ("share_quantity", "share_quantity", _number),
            ("price", "price", _number),
            ("currency", "currency", _text),
            ("settlement_date", "settlement_date", _date),
            ("status", "status", _text),
        ),
    ),
    "POSITION": _Table(
        "positions",
        2,
        _columns(
            ("account_id", "account_id", _uuid),
            *_INSTRUMENT,
            ("quantity", "quantity", _number),
            ("locked_for_trading", "locked_for_trading", _number),
            ("pending_settlement", "pending_settlement", _number),
            ("available_for_trading", "available_for_trading", _number),
        ),
    ),
    "CASH_BALANCE": _Table(
        "cash_balances",
        2,
        _columns(
            ("account_group_id", "account_group_id", _uuid),
            ("currency", "currency", _text),
            ("balance", "balance", _number),
            ("locked_for_trading", "locked_for_trading", _number),
            ("pending_settlement", "pending_settlement", _number),
            ("available_for_withdrawal", "available_for_withdrawal", _number),
            ("available_for_trading", "available_for_trading", _number),
        ),
    ),
    "CASH_TRANSACTION": _Table(
        "cash_transactions",
        2,
        _columns(
            *_CASH_KEY,
            ("account_group_id", "account_group_id", _uuid),
            ("account_id", "account_id", _uuid),
            ("amount", "delta.amount", _number),
            ("currency", "delta.currency", _text),
            *_INSTRUMENT,
        ),
    ),
    "SECURITY_TRANSACTION": _Table(
        "security_transactions",
        2,
        _columns(
            *_SECURITY_KEY,
            ("account_group_id", "account_group_id", _uuid),
            ("account_id", "account_id", _uuid),
            ("quantity", "delta.amount", _number),
            *_INSTRUMENT,
        ),
    ),
}

_REJECTIONS: Final = _Table(
    "order_cancellation_rejections",
    1,
    _columns(
        ("event_id", "event_id", _uuid),
        ("order_id", "order_id", _uuid),
        ("status", "status", _text),
        ("reason", "reason", _text),
    ),
)
_ISINS: Final = _Table(
    "instrument_isins", 2, _columns(("isin", "isin", _text), ("instrument_uuid", "id", _uuid))
)

# Array of the object -> the table of its elements. The parent's key comes before their columns.
_GROUP_KEY: Final = ("account_group_id", "", _uuid)
_MEMBERS: Final = (("user_id", "id", _uuid), ("role", "type", _text))
_TAXES: Final = (("tax_type", "type", _text), ("amount", "amount", _number))
_REFERENCES: Final = (("reference_id", "id", _uuid), ("reference_type", "type", _text))
_CHILDREN: Final = {
    "ACCOUNT_GROUP": {"users": _Table("account_group_users", 1, _columns(_GROUP_KEY, *_MEMBERS))},
    "ACCOUNT": {
        "users": _Table("account_users", 1, _columns(("account_id", "", _uuid), *_MEMBERS))
    },
    "EXECUTION": {
        "taxes": _Table("execution_taxes", 1, _columns(("execution_id", "", _uuid), *_TAXES))
    },
    "CASH_TRANSACTION": {
        "taxes": _Table(
            "cash_transaction_taxes",
            2,
            _columns(*_CASH_KEY, *_TAXES, ("currency", "currency", _text)),
        ),
        "references": _Table("cash_transaction_references", 2, _columns(*_CASH_KEY, *_REFERENCES)),
    },
    "SECURITY_TRANSACTION": {
        "references": _Table(
            "security_transaction_references", 2, _columns(*_SECURITY_KEY, *_REFERENCES)
        ),
    },
}

_TABLES: Final = {
    table.name: table
    for table in (
        *_SNAPSHOTS.values(),
        _REJECTIONS,
        _ISINS,
        *(child for children in _CHILDREN.values() for child in children.values()),
    )
}


class Break(NamedTuple):
    """A balance that is not the sum of its transactions.

    Attributes:
        table: ``cash_balances`` or ``positions``.
        key: The balance's key.
        reported: The balance as last reported, None if it never was.
        summed: What its transactions add up to.
    """

    table: str
    key: tuple[str, str]
    reported: Decimal | None
    summed: Decimal


class Books:
    """What is so at the broker, by read model, after all events given to ``record``."""

    def __init__(self) -> None:
        self.events_by_type: Counter[str] = Counter()
        self._newest: dict[str, dict[tuple[object, ...], tuple[object, ...]]] = {
            name: {} for name in _TABLES
        }
        self._children: dict[str, dict[tuple[object, ...], list[tuple[object, ...]]]] = {
            name: {} for name in _TABLES
        }
        self._executions_of: defaultdict[str, set[str]] = defaultdict(set)

    @property
    def tables(self) -> tuple[str, ...]:
        """The read models that the books know."""
        return tuple(_TABLES)

    @property
    def events(self) -> int:
        """How many events the books have taken."""
        return self.events_by_type.total()

    def record(self, event: SimulatedEvent) -> None:
        """Take one event; they must come in the order of time, each once."""
        self.events_by_type[event.type] += 1
        category, _, action = event.type.partition(".")
        thing = event.event["object"]
        if action in ("REJECTED", "DATA_CHANGE_FAILED"):
            if category == "ORDER_CANCELLATION":
                self._keep(_REJECTIONS, {**thing, "event_id": event.event["id"]})
            return
        if category not in _SNAPSHOTS:
            return
        self._take(category, thing)
        if category == "ORDER":
            for execution in thing["executions"]:
                self._take("EXECUTION", execution)
        elif category == "INSTRUMENT":
            self._keep(_ISINS, thing)

    def columns(self, table: str) -> tuple[str, ...]:
        """The columns that the books know of a read model; the key first."""
        return tuple(column.name for column in _TABLES[table].columns)

    def rows(self, table: str) -> list[tuple[Value, ...]]:
        """All rows a read model must have, typed as psycopg types them, in no order that counts."""
        readers = [column.read for column in _TABLES[table].columns]
        raw: Iterable[tuple[object, ...]] = self._newest[table].values()
        if self._children[table]:
            raw = (row for rows in self._children[table].values() for row in rows)
        return [tuple(read(value) for read, value in zip(readers, row, strict=True)) for row in raw]

    def count(self, table: str) -> int:
        """How many rows a read model must have."""
        children = sum(len(rows) for rows in self._children[table].values())
        return len(self._newest[table]) + children

    def orders_by_status(self) -> Mapping[str, int]:
        """How many orders stand where."""
        at = self.columns("orders").index("status")
        return Counter(str(row[at]) for row in self._newest["orders"].values())

    def cash_balance(self, account_group_id: str | UUID, currency: str) -> Decimal:
        """The balance as last reported, 0 if none was."""
        row = self._newest["cash_balances"].get((str(account_group_id), currency))
        return ZERO if row is None else Decimal(str(row[2]))

    def position(self, account_id: str | UUID, instrument_uuid: str | UUID) -> Decimal:
        """The quantity as last reported, 0 if none was."""
        row = self._newest["positions"].get((str(account_id), str(instrument_uuid)))
        return ZERO if row is None else Decimal(str(row[3]))

    def filled_quantity(self, order_id: str | UUID) -> Decimal:
        """What was traded for an order and not taken back."""
        known = self.columns("executions")
        quantity, status = known.index("share_quantity"), known.index("status")
        executions = (
            self._newest["executions"][(execution,)]
            for execution in self._executions_of[str(order_id)]
        )
        return add(*(Decimal(str(x[quantity])) for x in executions if x[status] != "CANCELLED"))

    def breaks(self) -> list[Break]:
        """Every balance and position that is not the sum of its transactions; none at any end."""
        cash = self._sums("cash_transactions", "account_group_id", "currency", "amount")
        units = self._sums("security_transactions", "account_id", "instrument_uuid", "quantity")
        return [
            *self._compare("cash_balances", "balance", cash),
            *self._compare("positions", "quantity", units),
        ]

    def _take(self, category: str, thing: Json) -> None:
        table = _SNAPSHOTS[category]
        key = self._keep(table, thing)
        if category == "EXECUTION":
            self._executions_of[thing["order_id"]].add(thing["id"])
        for array, child in _CHILDREN.get(category, _NO_CHILDREN).items():
            rows = [key + child.pick(item)[child.key :] for item in thing.get(array, ())]
            self._children[child.name][key] = rows

    def _keep(self, table: _Table, thing: Json) -> tuple[object, ...]:
        row = table.pick(thing)
        key = row[: table.key]
        self._newest[table.name][key] = row
        return key

    def _sums(self, table: str, *columns: str) -> dict[tuple[str, str], Decimal]:
        first, second, amount = (self.columns(table).index(name) for name in columns)
        sums: defaultdict[tuple[str, str], Decimal] = defaultdict(lambda: ZERO)
        for row in self._newest[table].values():
            key = str(row[first]), str(row[second])
            sums[key] = add(sums[key], Decimal(str(row[amount])))
        return sums

    def _compare(
        self, table: str, column: str, sums: Mapping[tuple[str, str], Decimal]
    ) -> Iterable[Break]:
        at = self.columns(table).index(column)
        reported = {
            (str(row[0]), str(row[1])): Decimal(str(row[at]))
            for row in self._newest[table].values()
        }
        for key in sorted(sums.keys() | reported.keys()):
            if reported.get(key) != sums.get(key, ZERO):
                yield Break(table, key, reported.get(key), sums.get(key, ZERO))


_NO_CHILDREN: Final[Mapping[str, _Table]] = MappingProxyType({})
