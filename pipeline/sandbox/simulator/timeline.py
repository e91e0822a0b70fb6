"""The simulation's clock, dice and agenda: what makes a run the same for the same seed."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from random import Random
from time import gmtime, strftime
from typing import Any, Final, NamedTuple, TypeVar

Json = dict[str, Any]
"""A JSON object as it goes into an event."""

SECOND: Final = 1_000_000_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

_OPENING_HOUR, _CLOSING_HOUR = 7, 20
_EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
# Upvest's public examples show times with none, 2, 3 and 9 digits after the second; Go, which cuts
# zeros off at the end, makes any number of them possible.
_FRACTION_DIGITS = (0, 0, 0, 0, 2, 2, 2, 3, 3, 6, 6, 6, 9, 9, 9, 1, 4, 5, 7, 8)

STEP_EVENTS_MAX: Final = 12
"""No step of the agenda tells more events than this."""

_T = TypeVar("_T")


class SimulatedEvent(NamedTuple):
    """One event of the broker, before anybody has put it into bytes.

    Attributes:
        key: Whose it is: the id of the user, business or instrument.
        event: The envelope with the object in it.
        occurred_ns: Nanoseconds since 1970; every event has a later one than the event before.
    """

    key: bytes
    type: str
    event: Json
    occurred_ns: int


def day_of(nanos: int) -> int:
    """The day a time falls on (UTC), counted from 1970-01-01."""
    return nanos // DAY


def date_text(day: int) -> str:
    """A day as YYYY-MM-DD."""
    return date.fromordinal(_EPOCH_ORDINAL + day).isoformat()


def is_weekend(day: int) -> bool:
    """Whether a day is a Saturday or a Sunday; 1970-01-01 was a Thursday."""
    return (day + 3) % 7 in (5, 6)


def business_day(day: int, *, later: int = 0) -> int:
    """The first business day from ``day`` on, and so many business days later."""
    while is_weekend(day):
        day += 1
    for _ in range(later):
        day += 1
        while is_weekend(day):
            day += 1
    return day


class Timeline:
    """Time that only goes forward, one seeded source of chance, and what is to happen when.

    Every time written into an event is later than every time written before it, by a millisecond
    or more: no two versions of anything tie, however a reader rounds.

    Args:
        seed: The same seed gives the same events, in any process, on any machine.
        start_ns: Nanoseconds since 1970.
    """

    def __init__(self, seed: int | str, start_ns: int) -> None:
        self.random = Random(f"simulator {seed}")
        self.now_ns = start_ns
        self.stopped = False
        self._agenda: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._booked = 0
        self._told: list[SimulatedEvent] = []
        self._second = -1
        self._second_text = ""
        self._webhook_id = self.uuid()

    def uuid(self) -> str:
        """A new random id (version 4)."""
        bits = self.random.getrandbits(128)
        bits = bits & ~(0xF000 << 64 | 0xC000 << 48) | 0x4000 << 64 | 0x8000 << 48
        text = f"{bits:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def chance(self, probability: float) -> bool:
        """True in so many of 1 cases."""
        return self.random.random() < probability

    def pick(self, things: Sequence[_T]) -> _T:
        """One of these, each as likely."""
        return things[int(self.random.random() * len(things))]

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` up to, and without, ``high``."""
        return low + int(self.random.random() * (high - low))

    def stamp(self) -> str:
        """Let a moment pass; the time now, as Upvest writes it: 0 to 9 digits after the second."""
        digits = self.pick(_FRACTION_DIGITS)
        grain = 10 ** (9 - digits)
        moment = self.now_ns + 1_000_000 + int(self.random.random() * 600_000_000)
        # Rounded up, so that a time with few digits still is later than the one before.
        self.now_ns = moment + -moment % grain
        seconds, nanos = divmod(self.now_ns, SECOND)
        if seconds != self._second:
            self._second = seconds
            self._second_text = strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))
        if digits == 0:
            return f"{self._second_text}Z"
        return f"{self._second_text}.{nanos:09d}"[: 20 + digits] + "Z"

    def emit(self, key: bytes, event_type: str, thing: Json, *, bare_date: bool = False) -> str:
        """Publish an event; returns its id.

        Args:
            key: What the producer partitions by.
            event_type: CATEGORY.ACTION.
            thing: The event's object; must not be changed afterwards.
            bare_date: Write the envelope's time as a date only, as was once met in a guide.
        """
        event_id = self.uuid()
        created_at = self.stamp()
        event: Json = {
            "id": event_id,
            "created_at": created_at[:10] if bare_date else created_at,
            "type": event_type,
        }
        dice = self.random.random()
        if dice < 0.1:  # promised for webhooks, not for Kafka
            event["object"] = thing
        elif dice < 0.2:  # the order of the fields is not promised either
            event["webhook_id"] = self._webhook_id
            event["object"] = thing
        else:
            event["object"] = thing
            event["webhook_id"] = self._webhook_id
        self._told.append(SimulatedEvent(key, event_type, event, self.now_ns))
        return event_id

    def at(self, moment_ns: int, step: Callable[..., None], *args: object) -> None:
        """Put a step on the agenda. What it tells is reported at once, with nothing in between."""
        self._booked += 1
        heapq.heappush(self._agenda, (moment_ns, self._booked, step, args))

    def after(self, seconds: tuple[float, float], step: Callable[..., None], *args: object) -> None:
        """Put a step on the agenda, some time from now."""
        low, high = seconds
        delay = low + self.random.random() * (high - low)
        self.at(self.now_ns + int(delay * SECOND), step, *args)

    def in_hours(self, delay_ns: int) -> int:
        """The time so far from now, or the next morning if the market is closed by then."""
        moment = self.now_ns + delay_ns
        day, time = divmod(moment, DAY)
        if time >= _CLOSING_HOUR * HOUR:
            day, time = day + 1, 0
        if time < _OPENING_HOUR * HOUR or is_weekend(day):
            day = business_day(day)
            time = _OPENING_HOUR * HOUR + int(self.random.random() * 2 * HOUR)
        return day * DAY + time

    def on_day(self, day: int, hour: int) -> int:
        """Some time within an hour of a day."""
        return day * DAY + hour * HOUR + int(self.random.random() * HOUR)

    def run(self, events: int | None, filler: Callable[[], None]) -> Iterator[SimulatedEvent]:
        """Work the agenda off; yield exactly ``events`` events, or for ever if None.

        Ends only between two steps, so whatever a step does is reported whole: a booking never
        without its balance. ``filler`` tells one event that changes no books; it fills up the end.
        """
        left = events
        while self._agenda and not self.stopped:
            if left is not None and left < STEP_EVENTS_MAX:
                break
            moment, _, step, args = heapq.heappop(self._agenda)
            self.now_ns = max(self.now_ns, moment)
            step(*args)
            reported, self._told = self._told, []
            if left is not None:
                left -= len(reported)
            yield from reported
        while left and not self.stopped:
            filler()
            left -= 1
            yield self._told.pop()
