"""Instruments: invented names with valid ISINs, prices that wander, master data that changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from pipeline.sandbox.simulator.timeline import DAY, HOUR, Json, Timeline

_FIRST: Final = (
    "Nordsee", "Alpen", "Hanse", "Prairie", "Thames", "Rhein", "Baltic", "Polar", "Iberia",
    "Cascade", "Elbe", "Highland",
)  # fmt: skip
_SECOND: Final = (
    "Windkraft", "Semiconductor", "Biotech", "Water Meters", "Logistik", "Robotics", "Solar",
    "Foods & Grain", "Rail", "Software",
)  # fmt: skip
_FUNDS: Final = ("World Equity", "Euro Bond", "Small Cap", "Emerging Markets", "Clean Energy")
_LISTINGS: Final = (
    # country, legal form, currency, business days to settlement
    ("DE", "AG", "EUR", 2),
    ("US", "Corp", "EUR", 1),
    ("IE", "UCITS ETF", "EUR", 2),
    ("FR", "SA", "EUR", 2),
    ("DE", "SE", "EUR", 2),
    ("GB", "plc", "GBP", 1),
    ("LU", "Fund I", "EUR", 2),
    ("IE", "UCITS ETF (Acc)", "GBP", 2),
)
_BASE36: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TICKS: Final = 10_000
"""Prices are whole ten-thousandths."""


def check_digit(body: str) -> str:
    """The twelfth character of an ISIN (Luhn over the characters read in base 36)."""
    digits = "".join(str(_BASE36.index(character)) for character in body)
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value // 10 + value % 10
    return str(-total % 10)


@dataclass(slots=True)
class Instrument:
    """An instrument as Upvest last reported it, with its price, which no event contains."""

    id: str
    isin: str
    wkn: str
    name: str
    currency: str
    settlement_days: int
    places: int
    ticks: int
    created_at: str
    updated_at: str
    fractional: bool = True
    active: bool = False
    details: Json | None = None

    @property
    def key(self) -> bytes:
        """What the producer partitions by."""
        return self.id.encode()

    @property
    def price(self) -> Decimal:
        """The price of one unit now."""
        return Decimal(self.ticks).scaleb(-4)

    def reference(self) -> Json:
        """How positions and transactions name the instrument."""
        return {"uuid": self.id, "isin": self.isin}

    def object(self) -> Json:
        """The object of an INSTRUMENT event."""
        thing: Json = {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "isin": self.isin,
            "name": self.name,
            "fractional_trading": self.fractional,
            "trading_status": "ACTIVE" if self.active else "INACTIVE",
            "wkn": self.wkn,
        }
        if self.details is not None:
            thing["details"] = self.details
        return thing


class Market:
    """The instruments that customers can trade.

    Args:
        timeline: Where events are emitted and steps are scheduled.
        instruments: How many there are after the first hour; one more comes every few days.
    """

    def __init__(self, timeline: Timeline, *, instruments: int = 40) -> None:
        self._timeline = timeline
        self._universe = instruments
        self._listed = 0
        self._isins = 0
        self.all: list[Instrument] = []
        for _ in range(instruments):
            timeline.after((0, 600), self._onboard)
        timeline.at(timeline.now_ns + DAY // 3, self._change_something)

    def tradable(self, currency: str) -> Sequence[Instrument]:
        """The active instruments of a currency."""
        return [
            instrument
            for instrument in self.all
            if instrument.active and instrument.currency == currency
        ]

    def move(self, instrument: Instrument) -> Decimal:
        """Let the price of an instrument wander a little; the new price."""
        drift = self._timeline.random.random() * 0.012 - 0.0058
        instrument.ticks = max(_TICKS, int(instrument.ticks * (1 + drift)))
        return instrument.price

    def list_one(self) -> Instrument:
        """Tell of one new instrument, not yet tradable."""
        timeline = self._timeline
        self._listed += 1
        country, form, currency, days = _LISTINGS[self._listed % len(_LISTINGS)]
        kind = _FUNDS if country in ("IE", "LU") else _SECOND
        first = _FIRST[self._listed % len(_FIRST)]
        second = kind[self._listed // len(_FIRST) % len(kind)]
        created_at = timeline.stamp()
        instrument = Instrument(
            id=timeline.uuid(),
            isin=self._new_isin(country),
            wkn=f"ZQ{_base36(self._listed, 4)}",
            name=f"{first} {second} {form}",
            currency=currency,
            settlement_days=days,
            # Funds are reported with all the digits that Upvest's format allows.
            places=27 if country == "LU" else 10,
            ticks=timeline.between(5 * _TICKS, 400 * _TICKS),
            created_at=created_at,
            updated_at=created_at,
            fractional=not timeline.chance(0.1),
            details={"distribution_policy": "ACCUMULATING"} if country == "IE" else None,
        )
        self.all.append(instrument)
        timeline.emit(instrument.key, "INSTRUMENT.ONBOARDED", instrument.object())
        return instrument

    def _onboard(self) -> None:
        instrument = self.list_one()
        self._timeline.after((5, 300), self._activate, instrument)

    def _new_isin(self, country: str) -> str:
        self._isins += 1
        body = f"{country}00ZQ{_base36(self._isins, 5)}"
        return body + check_digit(body)

    def _tell(self, instrument: Instrument, action: str) -> None:
        instrument.updated_at = self._timeline.stamp()
        self._timeline.emit(instrument.key, f"INSTRUMENT.{action}", instrument.object())

    def _activate(self, instrument: Instrument) -> None:
        instrument.active = True
        self._tell(instrument, "ACTIVATED")

    def _set_fractional(self, instrument: Instrument) -> None:
        instrument.fractional = not instrument.fractional
        action = "ENABLED" if instrument.fractional else "DISABLED"
        self._tell(instrument, f"FRACTIONAL_TRADING_{action}")

    def _change_something(self) -> None:
        """Two or three times a day: a name, an ISIN, a pause in trading, a new listing."""
        timeline = self._timeline
        instrument = timeline.pick(self.all)
        dice = timeline.random.random()
        if dice < 0.3:
            instrument.name = instrument.name.removesuffix(" (new)") + " (new)"
            self._tell(instrument, "DATA_CHANGED")
        elif dice < 0.5:
            instrument.isin = self._new_isin(instrument.isin[:2])
            self._tell(instrument, "DATA_CHANGED")
        elif dice < 0.7:
            self._set_fractional(instrument)
            timeline.at(timeline.in_hours(DAY), self._set_fractional, instrument)
        elif dice < 0.9:
            if instrument.active:
                instrument.active = False
                self._tell(instrument, "DEACTIVATED")
                timeline.at(timeline.in_hours(6 * HOUR), self._activate, instrument)
        elif len(self.all) < 2 * self._universe:
            self._onboard()
        timeline.at(timeline.in_hours(timeline.between(3 * HOUR, 6 * HOUR)), self._change_something)


def _base36(number: int, width: int) -> str:
    text = ""
    for _ in range(width):
        number, digit = divmod(number, 36)
        text = _BASE36[digit] + text
    return text
