"""The times of RFC 3339: what they mean, and which texts are none."""

import calendar
import re
from datetime import datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.rfc3339 import micros
from tests.records import rfc3339_times


@st.composite
def spelled_times(draw):
    """A time's spelling, and the microseconds since 1970 that it means."""
    moment = draw(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)))  # noqa: DTZ001 - its zone is drawn
    seconds = calendar.timegm(moment.timetuple())
    text = f"{moment:%H:%M}:{moment.second:02}"
    # A time of day ends at 24:00:00.
    if f"{moment:%H:%M}" != "23:59" and draw(st.integers(0, 3)) == 0:
        text, seconds = f"{moment:%H:%M}:60", seconds - moment.second + 60
    fraction = draw(st.text("0123456789", max_size=12))
    sign, hours, minutes = draw(
        st.tuples(st.sampled_from("+-"), st.integers(0, 15), st.integers(0, 59))
    )
    zone = draw(st.sampled_from(["Z", "z", f"{sign}{hours:02}:{minutes:02}"]))
    if len(zone) > 1:
        seconds -= (1 if sign == "+" else -1) * (hours * 3600 + minutes * 60)
    date = f"{moment.year:04}-{moment:%m-%d}"
    text = f"{date}{draw(st.sampled_from('Tt '))}{text}{'.' if fraction else ''}{fraction}{zone}"
    return text, seconds * 1_000_000 + round(float(f"0.{fraction}0") * 1_000_000)


@settings(max_examples=400)
@given(spelled_times())
@example(("1969-12-31T23:59:59.999999499Z", -1))
@example(("1969-12-31T23:59:59.9999996Z", 0))
@example(("1969-12-31T23:59:58.9999996Z", -1_000_000))
@example(("2016-12-31T23:59:60Z", 1_483_228_800_000_000))
@example(("2016-12-31T24:00:00Z", 1_483_228_800_000_000))
def test_a_time_is_read_by_rfc_3339(spelled):
    text, meant = spelled

    assert micros(text) == meant


_GRAMMAR = re.compile(
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"([Tt ]([01][0-9]|2[0-4]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?"
    r"([Zz]|[+-](0[0-9]|1[0-5]):[0-5][0-9]))?"
)


@settings(max_examples=600)
@given(rfc3339_times())
@example("2026-01-12T10:00:000ZZ")
@example("2026-01-12T10:00:00.000000:")
@example("2026-01-12T10:00:00+00:60")
@example("2026-01-12T10:00:00+16:00")
@example("2026-01-12T24:00:01Z")
@example("2026-01-12T24:00:00.000001Z")
@example("2026-01-12T23:59:60.000001Z")
@example("2026-01-12T10:00:00+01:00Z")
@example("2026-01-12T10:00:00.5+01:00Z")
@example("2026-01-12T10:00:00,5Z")
@example("2026-01-12T10:00:00.Z")
@example("2026-01-12T10:00:00.5ZZ")
@example("2026-01-12T10:00:00")
@example("2026-01-12T10:00:00\uff11Z")
def test_text_outside_rfc_3339_is_no_time(text):
    found = micros(text)

    if _GRAMMAR.fullmatch(text) is None:
        assert found is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1970-01-02", 86_400_000_000),
        ("2026-02-29", None),
        ("2026-02-29T10:00:00Z", None),
        ("0000-01-01T00:00:00Z", None),
        ("now", None),
        ("infinity", None),
        ("", None),
        (None, None),
        (1_768_212_000, None),
        ("9999-12-31T23:59:60-15:59", 253_402_300_800_000_000 + (15 * 60 + 59) * 60_000_000),
        ("0001-01-01T00:00:00+15:59", -62_135_596_800_000_000 - (15 * 60 + 59) * 60_000_000),
        (f"1970-01-01T00:00:00.{'5' * 128}Z", 555_556),
        (f"1970-01-01T00:00:00.{'5' * 129}Z", None),
    ],
)
def test_dates_and_the_ends_of_the_calendar_are_read(text, meant):
    assert micros(text) == meant
