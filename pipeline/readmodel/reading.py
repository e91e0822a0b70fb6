"""From the fields of a declaration to SQL that reads their values in an event's object."""

from collections.abc import Iterable

from pipeline.db.identifiers import literal
from pipeline.readmodel.fields import ELEMENT, Field, Shape


def segments(path: str) -> list[str]:
    """The members that a path goes through."""
    return path.split(".") if path != ELEMENT else []


def text_of(of: str, path: str) -> str:
    """The member of a JSON value as text, NULL where it is unset."""
    if path == ELEMENT:
        return f"nullif({of} #>> '{{}}', '')"
    *around, last = segments(path)
    inner = "".join(f" -> {literal(name)}" for name in around)
    return f"nullif({of}{inner} ->> {literal(last)}, '')"


def json_of(of: str, path: str) -> str:
    """The member of a JSON value as JSON, NULL where it is unset."""
    inner = "".join(f" -> {literal(name)}" for name in segments(path))
    return f"nullif(nullif({of}{inner}, 'null'), '\"\"')"


def array_path(dotted: str) -> str:
    """A path as PostgreSQL's ``#>`` takes it."""
    return literal("{" + dotted.replace(".", ",") + "}")


_AS_JSON = (Shape.JSON, Shape.LIST)


def value_of(field: Field, of: str) -> str:
    """The field's value in a JSON value, NULL where unset, as text or JSON and not yet cast."""
    member = json_of if field.kind.shape in _AS_JSON else text_of
    values = [member(of, path) for path in field.paths]
    value = values[0] if len(values) == 1 else f"coalesce({', '.join(values)})"
    if field.only_if is None:
        return value
    path, wanted = field.only_if
    return f"CASE WHEN {text_of(of, path)} = {literal(wanted)} THEN {value} END"


def _by_event(field: Field) -> str:
    """The value that the type of the event says, NULL if it says none."""
    cases = " ".join(
        f"WHEN {pattern.condition} THEN {literal(word)}" for pattern, word in field.by_event
    )
    return f"CASE {cases} END"


def read(field: Field, of: str, *more: str, by_event: bool = True) -> str:
    """What is read for a field: the first that is set of its paths, more, and the event's type."""
    values = [value_of(field, of)] if field.paths else []
    values += more
    if field.by_event and by_event:
        values.append(_by_event(field))
    return values[0] if len(values) == 1 else f"coalesce({', '.join(values)})"


def cast(field: Field, value: str) -> str:
    """A text or JSON value in the field's type."""
    return field.kind.cast.format(value)


def objects_in(fields: Iterable[Field]) -> list[str]:
    """Paths that must be objects where they are set, because fields are inside."""
    return sorted(
        {
            ".".join(segments(path)[:end])
            for field in fields
            for path in field.paths
            for end in range(1, len(segments(path)))
        }
    )
