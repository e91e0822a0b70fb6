"""The times of RFC 3339, as PostgreSQL reads them. Pure.

The log computes times here, the read models in PostgreSQL, by ``pipeline.is_rfc3339()`` and the
cast to ``timestamptz``. Both must give the same microsecond for every text; where the RFC leaves a
choice, PostgreSQL's cast decides:

- the letters T and Z may be lower case, and a space may replace the T; a bare date is its midnight
  in UTC;
- digits after the microsecond are rounded as ``rint`` rounds the double, so ``.9999995`` may become
  the next second; Upvest sends zero to nine digits (https://docs.upvest.co, examples of the event
  reference);
- second 60 is the next minute, in any minute; ``24:00:00`` is the next midnight, and no time of day
  is later;
- an offset from UTC is at most 15:59; there is no year 0000.
"""

import re
from datetime import UTC, datetime
from typing import TypeAlias

Micros: TypeAlias = int
"""A point in time: microseconds since 1970-01-01 UTC."""

WHOLE_SECONDS_LENGTH = len("2026-01-12T10:00:00Z")
MICROSECONDS_LENGTH = len("2026-01-12T10:00:00.123456Z")
FRACTION_AT = len("2026-01-12T10:00:00")
SEVENTH_DIGIT_AT = len("2026-01-12T10:00:00.123456")
USUAL_LENGTH_MAX = 100

_SECOND = 1_000_000
_DAY = 86_400 * _SECOND
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:([Tt ])([0-9]{2}):([0-5][0-9]):([0-5][0-9]|60)(\.[0-9]+)?"
    r"([Zz]|[+-](?:0[0-9]|1[0-5]):[0-5][0-9]))?"
)
# PostgreSQL copies the parts of the text, each with a NUL after it, into a buffer of this size.
_BUFFER_BYTES = 153


def micros(text: object) -> Micros | None:
    """A time of RFC 3339 or a bare date; None for anything else."""
    if not isinstance(text, str):
        return None
    # The parser takes more than RFC 3339; these marks leave it nothing but digits to read. The
    # regular expression says it in full and costs five times as much.
    marks = text[4:20:3]
    if (
        (
            (marks == "--T::." and text[-1] == "Z" and text[20:-1].isdecimal())
            or (marks == "--T::Z" and len(text) == WHOLE_SECONDS_LENGTH)
        )
        and text.isascii()
        and text[11:13] != "24"
        and len(text) < USUAL_LENGTH_MAX
        and (instant := _instant(text)) is not None
    ):
        if len(text) <= MICROSECONDS_LENGTH:
            return instant
        # Only near the middle the double decides; elsewhere one digit tells.
        if (digit := text[SEVENTH_DIGIT_AT]) < "4":
            return instant
        if digit > "5":
            return instant + 1
        return instant - instant % _SECOND + _rounded(text[FRACTION_AT:-1])
    return _by_rule(text)


def _by_rule(text: str) -> Micros | None:
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    date, separator, hour, minute, second, fraction, zone = match.groups()
    if separator is None:
        return _instant(f"{date}T00:00:00Z")
    # The letter T is a part of its own; a space is not copied.
    copied = len(text) + (2 if separator == " " else 4)
    if copied > _BUFFER_BYTES:
        return None
    midnight = _instant(f"{date}T00:00:00{zone.upper()}")
    seconds = (int(hour) * 60 + int(minute)) * 60 + int(second)
    since_midnight = seconds * _SECOND + (_rounded(fraction) if fraction else 0)
    return None if midnight is None or since_midnight > _DAY else midnight + since_midnight


def _rounded(fraction: str) -> int:
    """The microseconds of ``.123456789``, as PostgreSQL computes them."""
    return round(float(fraction) * _SECOND)


def _instant(text: str) -> Micros | None:
    try:
        since = datetime.fromisoformat(text) - _EPOCH
    except (ValueError, OverflowError):
        return None
    return (since.days * 86_400 + since.seconds) * _SECOND + since.microseconds
