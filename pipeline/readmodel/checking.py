"""Conditions under which the values of an event are valid, in SQL: casts alone accept too much."""

from collections.abc import Iterable, Mapping, Sequence

from pipeline.readmodel.fields import ELEMENT, Field, Shape
from pipeline.readmodel.model import Children
from pipeline.readmodel.reading import cast, json_of, objects_in, value_of

# Nearly all times and dates are written in one way. These patterns recognise it at half the price
# of pipeline.is_rfc3339(): which characters are where, and that the others are digits. Pairs of
# digits, so that the regular expression has few states to compute per row.
USUAL_DATE = "____-__-__"
USUAL = f"{USUAL_DATE}T__:__:__"
USUAL_DIGITS = "^([0-9][0-9]([-T:]|([.][0-9]+)?Zx|x)?)*$"
# Between values that are checked at once. A letter, since the cast refuses a time with a letter in
# it and ignores punctuation.
BETWEEN = "x"
# With nothing but these, PostgreSQL's casts accept decimal numbers and nothing else.
NO_NUMBER = "[^0-9.+-]"


def _of_shape(values: Mapping[Field, str], *shapes: Shape) -> list[str]:
    return [value for field, value in values.items() if field.paths and field.kind.shape in shapes]


def checks(values: Mapping[Field, str], objects: Iterable[str]) -> list[str]:
    """Conditions for what casts alone would accept."""
    conditions = [f"coalesce(jsonb_typeof({path}), 'object') = 'object'" for path in objects]
    if numbers := _of_shape(values, Shape.NUMBER, Shape.INTEGER):
        conditions.append(f"concat({', '.join(numbers)}) !~ '{NO_NUMBER}'")
    conditions += [
        f"({value} IN ('true', 'false')) IS NOT FALSE" for value in _of_shape(values, Shape.BOOLEAN)
    ]
    return conditions + _check_moments(values)


def _check_moments(values: Mapping[Field, str]) -> list[str]:
    """Whether all times and dates of a row follow RFC 3339; the usual spelling is seen at once."""
    times, dates = _of_shape(values, Shape.TIME), _of_shape(values, Shape.DATE)
    if not times + dates:
        return []
    joined = f"concat_ws('{BETWEEN}', {', '.join(times + dates)}, '')"
    usual = [
        *(f"({value} LIKE '{USUAL}Z' OR {value} LIKE '{USUAL}.%') IS NOT FALSE" for value in times),
        *(f"({value} LIKE '{USUAL_DATE}') IS NOT FALSE" for value in dates),
        f"{joined} ~ '{USUAL_DIGITS}'",
    ]
    rule = [f"pipeline.is_rfc3339({value}) IS NOT FALSE" for value in times + dates]
    return [f"({' AND '.join(usual)} OR {' AND '.join(rule)})"]


def demand(conditions: Sequence[str]) -> str:
    """A condition that holds, or ends the statement with an error."""
    return f"CASE WHEN {' AND '.join(conditions)} THEN true ELSE pipeline.reject() END"


def holds_objects(fields: Iterable[Field]) -> bool:
    """Whether the elements of an array must be objects: a field reads a member of them."""
    return any(path != ELEMENT for field in fields for path in field.paths)


def check_children(child: Children, items: str) -> str:
    """Whether every element of an array is valid, also of a parent that is about to lose.

    If only winners' arrays were looked at, the order of arrival would decide which events are
    rejected, and with them what else they hold.
    """
    values = {field: value_of(field, "c.item") for field in child.fields}
    casts = ", ".join(cast(field, value) for field, value in values.items())
    conditions = [
        *(["jsonb_typeof(c.item) = 'object'"] if holds_objects(child.fields) else []),
        *checks(values, [json_of("c.item", path) for path in objects_in(child.fields)]),
        # Counting the NULLs is a way to have every value cast.
        f"num_nulls({casts}) >= 0",
    ]
    every = (
        f"SELECT bool_and({' AND '.join(conditions)}) "  # noqa: S608 - declared names
        f"FROM jsonb_array_elements({items}) AS c(item)"
    )
    return f"({items} IS NULL OR {items} = '[]' OR coalesce(({every}), true))"
