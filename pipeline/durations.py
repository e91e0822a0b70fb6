"""Lengths of time for people: `12 s`, `2.1 d`."""

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def duration(seconds: float) -> str:
    """A length of time, in the largest unit of which it has two: ``119 s``, ``2.5 h``."""
    for unit, size in _UNITS:
        if seconds >= 2 * size:
            return f"{_short(seconds / size).removesuffix('.0')} {unit}"
    return f"{_short(seconds)} s"


def _short(number: float) -> str:
    # 9.95 has two digits before the point once it is rounded.
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"
