"""Times and other values that PostgreSQL stores and Python's own types cannot hold.

A ``timestamptz`` reaches from 4713 BC to the year 294276, and has two infinities; Python's
``datetime`` ends at the year 9999. A producer that writes microseconds where Kafka expects
milliseconds is enough to have one in the log. ``psycopg`` raises an error for each; the loaders
here return a value that can be shown, compared and sent back.
"""

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Self

import psycopg
from psycopg.abc import AdaptContext, Loader
from psycopg.adapt import Dumper

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST = datetime(1, 1, 1, tzinfo=UTC)
_LATEST = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
# The Gregorian calendar repeats itself after this long.
_CYCLE_YEARS = 400
_CYCLE_MICROS = 146_097 * 86_400 * 1_000_000
_CYCLE_FROM = datetime(2000, 1, 1, tzinfo=UTC)
_STORED = re.compile(
    r"(?P<year>\d{4,})-(?P<rest>\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,6})?)"
    r"(?P<zone>[+-]\d\d(?::?\d\d(?::?\d\d)?)?)(?P<era> BC)?"
)


class FarTime(datetime):
    """A time that ``datetime`` cannot hold, in UTC, or one of the two infinities.

    It compares with every ``datetime`` that has a time zone by its true value, subtracts to a true
    length, and its text is what PostgreSQL writes in JSON and reads back:
    ``10000-01-01T00:30:00+00:00``, ``0044-03-15T12:00:00+00:00 BC``, ``infinity``. What is left of
    ``datetime`` (``year``, ``date()`` …) must not be used: it is that of the nearest time that
    Python can hold.

    Args:
        text: As PostgreSQL writes it, with ``DateStyle`` ISO.
    """

    micros: float
    """Microseconds since 1970, an exact ``int``; or plus or minus infinity."""

    def __new__(cls, text: str) -> Self:
        """The time that PostgreSQL wrote.

        Raises:
            ValueError: The text is no time.
        """
        micros = _micros_of(text)
        nearest = _LATEST if micros > 0 else _EARLIEST
        far = super().__new__(
            cls,
            nearest.year,
            nearest.month,
            nearest.day,
            nearest.hour,
            nearest.minute,
            nearest.second,
            nearest.microsecond,
            UTC,
        )
        far.micros = micros
        return far

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:  # noqa: ARG002 - datetime's
        """As PostgreSQL writes it in JSON."""
        if math.isinf(self.micros):
            return "infinity" if self.micros > 0 else "-infinity"
        cycles, within = divmod(int(self.micros) - _micros(_CYCLE_FROM), _CYCLE_MICROS)
        near = _CYCLE_FROM + within * _MICROSECOND
        year = near.year + cycles * _CYCLE_YEARS
        text = near.isoformat(sep)[4:]
        return f"{year:04}{text}" if year > 0 else f"{1 - year:04}{text} BC"

    def __str__(self) -> str:
        return self.isoformat()

    def __repr__(self) -> str:
        return f"FarTime({self.isoformat()!r})"

    def __format__(self, _spec: str) -> str:
        return self.isoformat()

    def __reduce_ex__(self, _protocol: object) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.isoformat(),)

    def strftime(self, _format: str) -> str:
        """As PostgreSQL writes it: no other form could be read back."""
        return self.isoformat()

    def astimezone(self, _tz: tzinfo | None = None) -> Self:
        """Itself: it is shown in UTC only."""
        return self

    def timestamp(self) -> float:
        """Seconds since 1970."""
        return self.micros / 1_000_000

    def __hash__(self) -> int:
        return hash(self.micros)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datetime) and self.micros == _micros(other)

    def __lt__(self, other: datetime) -> bool:  # type: ignore[override]
        return self.micros < _micros(other)

    def __le__(self, other: datetime) -> bool:  # type: ignore[override]
        return self.micros <= _micros(other)

    def __gt__(self, other: datetime) -> bool:  # type: ignore[override]
        return self.micros > _micros(other)

    def __ge__(self, other: datetime) -> bool:  # type: ignore[override]
        return self.micros >= _micros(other)

    def __sub__(self, other: Any) -> Any:  # noqa: ANN401 - datetime's own has two meanings
        return _length(self.micros - _micros(other))

    def __rsub__(self, other: datetime) -> timedelta:
        return _length(_micros(other) - self.micros)


def _micros(time_: datetime) -> float:
    if isinstance(time_, FarTime):
        return time_.micros
    return (time_ - _EPOCH) // _MICROSECOND


def _length(micros: float) -> timedelta:
    """A length; between infinities and all other times, the longest that there is."""
    if math.isnan(micros):
        return timedelta(0)
    if math.isinf(micros):
        return timedelta.max if micros > 0 else timedelta.min
    return int(micros) * _MICROSECOND


def _micros_of(text: str) -> float:
    if text in ("infinity", "-infinity"):
        return math.inf if text == "infinity" else -math.inf
    found = _STORED.fullmatch(text)
    if found is None:
        raise ValueError("not a time as PostgreSQL writes it")
    year = int(found["year"])
    if found["era"]:
        year = 1 - year
    cycles = (year - _CYCLE_FROM.year) // _CYCLE_YEARS
    near = datetime.fromisoformat(f"{year - cycles * _CYCLE_YEARS}-{found['rest']}{found['zone']}")
    return int(_micros(near)) + cycles * _CYCLE_MICROS


# ----------------------------------------------------------------------------------- on connections


def register(connection: psycopg.Connection[Any]) -> None:
    """Have a connection return every value that PostgreSQL can store.

    A time with a time zone becomes a ``FarTime`` where ``datetime`` cannot hold it. Values of the
    other types whose Python type is too narrow become the text that PostgreSQL writes; no column
    of ours that the program compares has such a type.
    """
    adapters = connection.adapters
    adapters.register_dumper(FarTime, _FarTimeDumper)
    adapters.register_loader("timestamptz", _loader(_usual(adapters, "timestamptz"), _stored_time))
    for name in ("timestamp", "date", "time", "timetz", "interval", "json", "jsonb"):
        adapters.register_loader(name, _loader(_usual(adapters, name), _text))


def _usual(adapters: Any, name: str) -> type[Loader]:  # noqa: ANN401 - psycopg's own
    usual: type[Loader] = adapters.get_loader(adapters.types[name].oid, psycopg.pq.Format.TEXT)
    return usual


def _stored_time(data: bytes) -> datetime:
    time_ = FarTime(data.decode())
    # In another time zone than UTC, the year 10000 may begin before it does in UTC.
    if _EARLIEST <= time_ <= _LATEST:
        return _EPOCH + int(time_.micros) * _MICROSECOND
    return time_


def _text(data: bytes) -> str:
    return data.decode()


def _loader(usual: type[Loader], otherwise: Callable[[bytes], object]) -> type[Loader]:
    """The usual loader, and what to return for a value that it refuses."""

    class Tolerant(psycopg.adapt.Loader):
        def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
            super().__init__(oid, context)
            self._usual = usual(oid, context)

        def load(self, data: Any) -> object:  # noqa: ANN401 - psycopg's buffer
            try:
                return self._usual.load(data)
            except (psycopg.DataError, ValueError, OverflowError, RecursionError):
                return otherwise(bytes(data))

    return Tolerant


class _FarTimeDumper(Dumper):
    oid = psycopg.postgres.types["timestamptz"].oid

    def dump(self, obj: FarTime) -> bytes:
        return obj.isoformat().encode()
