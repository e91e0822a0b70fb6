"""The query that names the events of a range which break a rule, after a statement has failed."""

from collections.abc import Sequence

from pipeline.db.identifiers import literal
from pipeline.readmodel.batch import WHERE
from pipeline.readmodel.checking import holds_objects
from pipeline.readmodel.fields import ELEMENT, Field, Shape
from pipeline.readmodel.model import Declared
from pipeline.readmodel.reading import array_path, objects_in, read

_Rule = tuple[str, str, str]
"""Column, rule of ``pipeline.first_invalid`` (``!``: must be set), paths separated by ``|``."""

_OBJECT: _Rule = ("object", "object!", ELEMENT)


def screening_query(projector: Declared) -> str:
    """Names the events of a range that break a rule, and the column: exact, but slower.

    It must never name an event that the statements would accept alone, or the neighbours would
    decide whether an event is accepted. What it does not name, bisection finds.
    """
    parts: list[str] = []
    for source in projector.sources:
        taken = projector.condition(source)
        joins, item = "", "e.payload -> 'object'"
        if source.each:
            rules: list[_Rule] = [_OBJECT, (source.each, "list", source.each)]
            parts.append(_rejected(taken, joins, item, rules))
            joins, item = _tolerant_elements(item, source.each, "i"), "i.item"
        needed = [projector.column(name) for name in sorted(projector.only_with)]
        lists: list[_Rule] = [(child.path, "list", child.path) for child in projector.child_tables]
        must = [
            field.column
            for field in projector.key_fields
            if not (field.by_event or field.envelope or field.column in source.inherit)
        ]
        rules = [_OBJECT, *_rules(projector.columns, must), *lists]
        parts.append(_rejected(taken, joins, item, rules, needed))
        for child in projector.child_tables:
            elements = joins + _tolerant_elements(item, child.path, "c")
            is_object = [_OBJECT] if holds_objects(child.fields) else []
            rules = [*is_object, *_rules(child.fields)]
            parts.append(_rejected(taken, elements, "c.item", rules, needed, around=item))
        if projector.keeps_first:
            parts.append(
                "SELECT e.\"offset\", 'event_id', '23502' "  # noqa: S608 - constants only
                f"FROM pipeline.events AS e\nWHERE {WHERE} AND {taken} "
                "AND e.event_id IS NULL"
            )
    return "\nUNION ALL\n".join(parts)


def _rules(fields: Sequence[Field], must: Sequence[str] = ()) -> list[_Rule]:
    read = [field for field in fields if field.paths]
    return [
        *((path, "object", path) for path in objects_in(read)),
        *(
            (
                field.column,
                field.kind.shape.value + ("!" if field.column in must else ""),
                "|".join(field.paths),
            )
            for field in read
            if field.kind.shape is not Shape.FREE or field.column in must
        ),
    ]


def _tolerant_elements(of: str, path: str, alias: str) -> str:
    array = f"{of} #> {array_path(path)}"
    return (
        f"\nCROSS JOIN LATERAL jsonb_array_elements(CASE WHEN jsonb_typeof({array}) = 'array' "
        f"THEN {array} ELSE '[]' END) AS {alias}(item)"
    )


def _rejected(
    taken: str,
    joins: str,
    item: str,
    rules: Sequence[_Rule],
    needed: Sequence[Field] = (),
    *,
    around: str | None = None,
) -> str:
    columns, kinds, paths = (
        "CAST(ARRAY[" + ", ".join(literal(rule[at]) for rule in rules) + "] AS text[])"
        for at in range(3)
    )
    is_set = "".join(f" AND {read(field, around or item)} IS NOT NULL" for field in needed)
    return (
        'SELECT e."offset", f.invalid[1] AS column_name, f.invalid[2] AS sqlstate\n'
        f"FROM pipeline.events AS e{joins}\n"
        f"CROSS JOIN LATERAL pipeline.first_invalid({item}, {columns}, {kinds}, {paths}) "
        "AS f(invalid)\n"
        f"WHERE {WHERE} AND {taken}{is_set} AND f.invalid IS NOT NULL"
    )
