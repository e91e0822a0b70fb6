"""Exact decimal arithmetic: nothing here ever rounds unless a call says so.

Python's operators on Decimal round to 28 digits; Upvest's amounts may have 63 digits before the
point and 27 after it. So amounts are never added with ``+`` in this package, but here.
"""

from decimal import ROUND_DOWN, ROUND_HALF_UP, ROUND_UP, Context, Decimal, Inexact
from functools import reduce
from typing import Final

_EXACT = Context(prec=200)
_EXACT.traps[Inexact] = True
_ROUNDED = Context(prec=200)

ZERO: Final = Decimal(0)
CENT: Final = Decimal("0.01")
_UNITS = [Decimal(1).scaleb(-places) for places in range(28)]


def add(*amounts: Decimal) -> Decimal:
    """The exact sum, 0 for no amounts."""
    return reduce(_EXACT.add, amounts, ZERO)


def subtract(amount: Decimal, less: Decimal) -> Decimal:
    """The exact difference; never a negative zero."""
    return _EXACT.subtract(amount, less)


def negate(amount: Decimal) -> Decimal:
    """The amount with the other sign; never a negative zero."""
    return _EXACT.subtract(ZERO, amount)


def multiply(amount: Decimal, factor: Decimal) -> Decimal:
    """The exact product."""
    return _EXACT.multiply(amount, factor)


def cents(amount: Decimal, rounding: str = ROUND_HALF_UP) -> Decimal:
    """The amount in whole cents, halves away from zero by default."""
    return amount.quantize(CENT, rounding, _ROUNDED)


def cents_up(amount: Decimal) -> Decimal:
    """The amount in whole cents, never less than it was."""
    return cents(amount, ROUND_UP)


def units(cash: Decimal, price: Decimal, places: int) -> Decimal:
    """How many units ``cash`` buys, cut (not rounded) to so many places after the point."""
    return _ROUNDED.divide(cash, price).quantize(_UNITS[places], ROUND_DOWN, _ROUNDED)


def part(amount: Decimal, per_mille: int, places: int) -> Decimal:
    """So many thousandths of an amount, cut to so many places after the point."""
    share = _EXACT.multiply(amount, Decimal(per_mille).scaleb(-3))
    return share.quantize(_UNITS[places], ROUND_DOWN, _ROUNDED)


def plain(amount: Decimal) -> str:
    """As Upvest spells most amounts: no exponent, no zeros at the end ("250", "2.7286680689")."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
