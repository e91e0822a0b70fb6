"""One form for lengths of time, wherever people read them."""

import pytest

from pipeline.durations import duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59, "59 s"),
        (119, "119 s"),
        (120, "2 min"),
        (150, "2.5 min"),
        (7200, "2 h"),
        (185_400, "2.1 d"),
        (7_776_000, "90 d"),
        (86_400_000_000, "1,000,000 d"),
        (float("inf"), "inf d"),
    ],
)
def test_a_length_of_time_has_a_unit_that_is_precise_enough(seconds, shown):
    assert duration(seconds) == shown
